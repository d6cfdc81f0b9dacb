"""``lowbit generate``, ``eval`` and ``bench``."""

import json
import sys

import pytest

from lowbit.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny, quantize, add_tokenizer):
    """A quantized model with a byte tokenizer and a chat template; its base beside it."""
    folder = tmp_path_factory.mktemp("cli")
    tiny().save_pretrained(folder / "base")
    add_tokenizer(folder / "base", "{% for m in messages %}<{{ m.content }}>{% endfor %}")
    quantize(folder / "base", folder / "packed")
    return folder


@pytest.fixture
def run(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["lowbit", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return ended.value.code, captured.out, captured.err

    return call


def test_generate_continues_a_prompt_and_shows_its_speed(run, folder):
    code, out, err = run("generate", folder / "packed", "--prompt", "Once", "-n", "6")
    assert code == 0
    assert out.endswith("\n")
    assert "4 tokens of prompt" in err
    assert "tokens/s" in err


def test_generate_as_json_says_the_same(run, folder):
    _, shown, _ = run("generate", folder / "packed", "--prompt", "Once", "-n", "6")
    code, out, err = run("generate", folder / "packed", "--prompt", "Once", "-n", "6", "--json")
    document = json.loads(out)
    assert (code, err) == (0, "")
    assert document["text"] + "\n" == shown
    assert (document["prompt_tokens"], document["tokens"]) == (4, 6)
    assert document["decode_tokens_per_second"] > 0


def test_chat_uses_the_template(run, folder):
    _, out, _ = run("generate", folder / "packed", "--chat", "hello", "-n", "1", "--json")
    assert json.loads(out)["prompt_tokens"] == len("<hello>")


def test_eval_prints_a_row_for_each_model(run, folder):
    code, out, _ = run(
        "eval", folder / "packed", folder / "base", "--against", folder / "base", "--context", "64", "--windows", "3"
    )
    assert code == 0
    assert out.count("base") >= 2
    assert "the text that lowbit ships: 189 tokens scored in 3 windows of 64, stride 64" in out


def test_eval_as_json(run, folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("It was a Sunday evening in October. " * 20)
    code, out, _ = run(
        "eval",
        folder / "packed",
        "--text",
        text,
        "--against",
        folder / "base",
        "--stride",
        "50",
        "--json",
        "--dtype",
        "float32",
    )
    document = json.loads(out)
    base, packed = document["results"]
    assert code == 0
    assert (document["context"], document["stride"]) == (128, 50)
    assert (base["kl_mean"], base["top1_agreement"]) == (None, None)
    assert 0 < packed["kl_mean"] < packed["kl_99"]
    assert 0 < packed["top1_agreement"] < 1
    assert packed["perplexity"] != base["perplexity"]


def test_bench_times_model_and_layers(run, folder):
    code, out, _ = run(
        "bench", folder / "packed", "--prompt-tokens", "8", "--new-tokens", "3", "--repeat", "1", "--explain"
    )
    assert code == 0
    for words in ("prefill", "decode", "peak memory", "cpu-int4", "not cpu-int8: "):
        assert words in out
    _, out, _ = run("bench", folder / "packed", "--prompt-tokens", "8", "--new-tokens", "3", "--repeat", "1", "--json")
    document = json.loads(out)
    assert document["decode_tokens_per_second"] > 0
    assert {layer["layers"] for layer in document["layers"]} == {4, 2}
    assert all(layer["packed_us"] > 0 < layer["dense_us"] for layer in document["layers"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "packed"], "give either --prompt"),
        (["generate", "packed", "--prompt", "a", "--chat", "b"], "give either --prompt"),
        (["generate", "packed", "--prompt", "a", "-n", "0"], "--max-tokens must be at least 1, got 0"),
        (["generate", "packed", "--prompt", "a" * 200], "200 tokens, and the model's context ends at 128"),
        (["generate", "packed", "--prompt", "a", "--temperature", "-1"], "temperature must be 0"),
        (["generate", "packed", "--prompt", "a", "--device", "tpu"], "no device is named 'tpu'"),
        (["generate", "nowhere", "--prompt", "a"], "does not exist"),
        (["eval", "packed", "--context", "129"], "at most 128 tokens, got --context 129"),
        (["eval", "packed", "--text", "short"], "tokens, less than one window"),
        (["eval", "packed", "--text", "nowhere"], "cannot be read as UTF-8 text"),
        (["eval", "packed", "--windows", "0"], "at least 1, got 0"),
        (["bench", "packed", "--new-tokens", "1"], "--new-tokens must be at least 2, got 1"),
    ],
)
def test_mistakes_are_one_sentence(run, folder, monkeypatch, arguments, words):
    (folder / "short").write_text("a few words")
    monkeypatch.chdir(folder)
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1


def test_a_model_without_a_template_has_no_chat(run, folder, tmp_path, tiny, add_tokenizer):
    tiny().save_pretrained(tmp_path)
    add_tokenizer(tmp_path)
    code, _, err = run("generate", tmp_path, "--chat", "hello")
    assert code == 2
    assert "has no chat template; use --prompt" in err
