"""``lowbit generate``, ``eval`` and ``bench``."""

import json
import sys
import types

import pytest
import torch

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
    assert "the heldout text that lowbit ships: 189 tokens scored in 3 windows of 64, stride 64" in out


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


def test_datasets_are_texts_that_ship(run, folder):
    options = ("--context", "32", "--windows", "2", "--json")
    texts = {}
    for name in ("heldout", "calibration"):
        code, out, _ = run("eval", folder / "packed", "--dataset", name, *options)
        assert code == 0
        texts[name] = json.loads(out)
        assert texts[name]["text"] == f"the {name} text that lowbit ships"
    perplexities = [document["results"][0]["perplexity"] for document in texts.values()]
    assert perplexities[0] != perplexities[1]


def test_tasks_without_the_harness_name_the_extra(run, folder, monkeypatch):
    monkeypatch.setattr("lowbit.evaluation.tasks.find_spec", lambda name: None)
    code, out, err = run("eval", folder / "packed", "--tasks", "arc_easy")
    assert (code, out) == (2, "")
    assert err == "Error: --tasks needs the lm-evaluation-harness; pip install 'lowbit[eval]'\n"


def test_tasks_run_the_loaded_model(run, folder, monkeypatch):
    """With a stand-in for the harness, which asks the model that it is handed."""
    asked = {}

    class Wrapper:
        def __init__(self, pretrained, tokenizer, batch_size):
            self.model, self.tokenizer = pretrained, tokenizer

    class Manager:
        def match_tasks(self, names):
            return [name for name in names if name == "known"]

    def evaluate(model, tasks, limit, **_):
        asked.update(tasks=tasks, limit=limit)
        ids = torch.tensor([model.tokenizer("Once")["input_ids"]])
        score = model.model(ids).logits.detach().softmax(-1).amax()
        return {"results": {task: {"acc,none": score.item(), "alias": task, "acc_stderr,none": 0.5} for task in tasks}}

    modules = {
        "lm_eval": {"simple_evaluate": evaluate},
        "lm_eval.models": {},
        "lm_eval.models.huggingface": {"HFLM": Wrapper},
        "lm_eval.tasks": {"TaskManager": Manager},
    }
    for name, members in modules.items():
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**members))
    monkeypatch.setattr("lowbit.evaluation.tasks.find_spec", lambda name: object())
    code, out, _ = run("eval", folder / "packed", "--tasks", "known", "--examples", "3", "--json")
    metrics = json.loads(out)["results"][str(folder / "packed")]["known"]
    assert code == 0
    assert asked == {"tasks": ["known"], "limit": 3}
    assert metrics.keys() == {"acc,none", "acc_stderr,none"}
    assert 0 < metrics["acc,none"] < 1
    code, _, err = run("eval", folder / "packed", "--tasks", "known,other")
    assert code == 2
    assert "knows no task 'other'" in err


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
    assert all(layer["packed_us"] > 0 < layer["dense_us"] and not layer["replayed"] for layer in document["layers"])


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
        (
            ["eval", "packed", "--dataset", "c4"],
            "no dataset 'c4', only heldout and calibration; give other texts by --text",
        ),
        (["eval", "packed", "--dataset", "heldout", "--text", "short"], "give either --text"),
        (["eval", "packed", "--tasks", "arc_easy", "--text", "short"], "leave --text out"),
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
