"""AutoRound from the command line: whole models tuned block by block, mixtures of experts too, and the same bytes each time."""

import sys

import pytest
from safetensors.torch import load_file

import lowbit.cli

SMALL = ("--dataset", "default", "--nsamples", "8", "--seqlen", "32", "--bits", "3", "--group-size", "32")
TUNED = ("--quantizer", "autoround", "--set", "recipe=light", "--set", "iters=6", "--set", "lr=0.03")


def convert(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["lowbit", "convert", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        lowbit.cli.main()
    return ended.value.code


@pytest.mark.parametrize("model", ["llama", "experts"])
def test_every_block_is_tuned_and_written(model, request, tmp_path, monkeypatch, capsys):
    folder = request.getfixturevalue(model)
    assert convert(monkeypatch, folder, tmp_path / "out", *TUNED, *SMALL, "--format", "gptq") == 0
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if "loss" in line]
    assert len(lines) == len({line.split()[0] for line in lines}) >= 2, said.err
    for line in lines:
        words = line.replace(",", "").split()
        before, after = (float(words[words.index("->") + step]) for step in (-1, 1))
        assert after < before, line


def test_the_same_command_gives_the_same_bytes_and_tuning_other_codes_than_rounding(
    llama, tmp_path, monkeypatch, capsys
):
    for name, settings in {"one": TUNED, "two": TUNED, "rounded": TUNED[:2]}.items():
        assert convert(monkeypatch, llama, tmp_path / name, *settings, *SMALL, "--format", "gptq", "--quiet") == 0
    one, two, rounded = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two", "rounded"))
    assert all((one[name] == two[name]).all() for name in one)
    assert any((one[name] != rounded[name]).any() for name in one if name.endswith("qweight"))


def test_layers_of_an_average_of_bits_are_tuned_together(llama, tmp_path, monkeypatch, capsys):
    small = [word if word != "3" else "3.8" for word in SMALL]
    assert convert(monkeypatch, llama, tmp_path / "out", *TUNED, *small) == 0
    said = capsys.readouterr()
    assert "loss" in said.err
    assert said.out.count("bit g32") > 1, said.out


def test_going_on_removes_the_empty_folder_that_a_kill_left(llama, tmp_path, monkeypatch, capsys):
    empty, full = (tmp_path / f".out.{number:08x}.partial" for number in range(2))
    empty.mkdir()
    (full / "native").mkdir(parents=True)
    words = (*TUNED, *SMALL, "--format", "native,gptq", "--resume", "--quiet")
    assert convert(monkeypatch, llama, tmp_path / "out", *words) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [full.name, "out"]


def test_opt_rtn_weighs_the_search_by_what_calibration_measured(llama, tmp_path, monkeypatch, capsys):
    words = ("--quantizer", "autoround", "--set", "recipe=opt_rtn", *SMALL, "--format", "gptq")
    assert convert(monkeypatch, llama, tmp_path / "out", *words) == 0
    assert "calibrating on 8 samples of 32 tokens" in capsys.readouterr().err
    plain = ("--quantizer", "autoround", "--set", "scale=search", *SMALL[-4:], "--format", "gptq", "--quiet")
    assert convert(monkeypatch, llama, tmp_path / "plain", *plain) == 0
    weighed, even = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "plain"))
    assert any((weighed[name] != even[name]).any() for name in even if name.endswith("scales"))
