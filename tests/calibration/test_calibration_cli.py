"""``lowbit convert`` with calibration, from the command line."""

import json
import sys
from contextlib import contextmanager

import pytest

import lowbit.cli
from lowbit.errors import PausedError


def lowbit_command(monkeypatch, *words):
    """Run the command in this process and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["lowbit", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        lowbit.cli.main()
    return ended.value.code


SMALL = ("--dataset", "default", "--nsamples", "4", "--seqlen", "16")
TO_GGUF = ("--quantizer", "ggml", "--format", "gguf:q4_0")


def test_importance_of_a_text_goes_into_gguf(llama, tmp_path, monkeypatch, capsys):
    plain, weighed, kept = tmp_path / "plain.gguf", tmp_path / "weighed.gguf", tmp_path / "imatrix.gguf"
    assert lowbit_command(monkeypatch, "convert", llama, plain, *TO_GGUF, "--json") == 0
    assert lowbit_command(monkeypatch, "convert", llama, weighed, *TO_GGUF, *SMALL, "--save-imatrix", kept) == 0
    said = capsys.readouterr()
    assert "calibrating on 4 samples of 16 tokens of default" in said.err
    assert said.err.count("7 weights, error") == 3
    assert plain.read_bytes() != weighed.read_bytes()
    again = tmp_path / "again.gguf"
    assert lowbit_command(monkeypatch, "convert", llama, again, *TO_GGUF, "--imatrix", kept, "--json") == 0
    assert json.loads(capsys.readouterr().out)["verified"]


def test_a_pause_is_exit_code_75(llama, tmp_path, monkeypatch, capsys):
    @contextmanager
    def paused(*arguments):
        raise PausedError("stopped behind model.layers.0")
        yield

    monkeypatch.setattr("lowbit.convert.calibrated", paused)
    assert lowbit_command(monkeypatch, "convert", llama, tmp_path / "out", *TO_GGUF, *SMALL) == 75
    assert "Paused: stopped behind model.layers.0." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--seqlen", "4096"), "the model takes at most 128 tokens, got --seqlen 4096"),
        (("--nsamples", "0"), "--nsamples must be at least 1"),
        (("--batch-size", "0"), "--batch-size must be at least 1"),
        (("--dataset", "absent.txt"), "absent.txt is no file"),
        (("--device", "abacus"), "no device is named 'abacus'"),
    ],
)
def test_mistakes_are_one_sentence_and_leave_nothing(llama, tmp_path, monkeypatch, capsys, words, sentence):
    said = SMALL if words[0] != "--dataset" else ()
    assert lowbit_command(monkeypatch, "convert", llama, tmp_path / "out", *TO_GGUF, *said, *words) == 2
    assert sentence in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
