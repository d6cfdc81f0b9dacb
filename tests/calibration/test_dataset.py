"""Sources of calibration texts, and how they are cut into samples."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from lowbit.calibration.dataset import Sampling, parse_mix, sample
from lowbit.errors import OptionError

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer(llama):
    from lowbit.runtime.tokenizer import load_tokenizer

    return load_tokenizer(llama)


def text_of(tokenizer, tokens):
    return "".join(tokenizer.convert_ids_to_tokens(tokens)).replace("Ġ", " ").replace("Ċ", "\n")


def write(path, content):
    path.write_text(content, encoding="utf-8")
    return str(path)


def test_the_default_needs_no_file(tokenizer):
    samples = sample(Sampling(nsamples=5, seqlen=32), tokenizer, 128)
    assert samples.shape == (5, 32)
    assert samples.dtype == torch.int64


def test_the_seed_decides_and_nothing_global_is_touched(tokenizer):
    before = torch.get_rng_state()
    first, again, other = (sample(Sampling(nsamples=4, seqlen=16, seed=seed), tokenizer, None) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())


def test_a_text_is_cut_into_windows_without_overlap(tokenizer, tmp_path):
    text = "".join(f"{number:03d}." for number in range(100))
    samples = sample(Sampling(write(tmp_path / "a.txt", text), nsamples=200, seqlen=40), tokenizer, None)
    assert samples.shape == (10, 40)
    assert sorted(text_of(tokenizer, window) for window in samples) == [text[at : at + 40] for at in range(0, 400, 40)]


def test_a_mixture_takes_samples_by_weight(tokenizer, tmp_path):
    first, second = write(tmp_path / "a.txt", "a" * 1000), write(tmp_path / "b.txt", "b" * 1000)
    samples = sample(Sampling(f"{first}:0.7,{second}:0.3", nsamples=10, seqlen=16), tokenizer, None)
    assert sorted(text_of(tokenizer, window)[0] for window in samples) == ["a"] * 7 + ["b"] * 3


def test_documents_of_json_lines_are_joined_with_the_end_of_text(tokenizer, tmp_path):
    lines = [json.dumps({"text": letter * 7}) for letter in "abcdefgh"]
    samples = sample(Sampling(write(tmp_path / "a.jsonl", "\n".join(lines)), nsamples=7, seqlen=9), tokenizer, None)
    assert (samples == tokenizer.eos_token_id).sum() >= 6
    assert len(samples) == 7


def test_chats_go_through_the_template(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    chat = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}
    shared = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]}
    for record in (chat, shared):
        samples = sample(Sampling(write(tmp_path / "a.jsonl", json.dumps(record)), 1, 24), tokenizer, None)
        assert text_of(tokenizer, samples[0]) == "<user>hi\n<assistant>yes\n"


def test_chats_without_a_template_are_refused(tokenizer, tmp_path):
    path = write(tmp_path / "a.jsonl", json.dumps({"messages": []}))
    with pytest.raises(OptionError, match="the tokenizer has no chat template"):
        sample(Sampling(path, 1, 4), tokenizer, None)


def test_a_tokenizer_that_starts_texts_starts_samples(tokenizer):
    class Starts:
        bos_token_id, eos_token_id = 9, None

        def __call__(self, text, add_special_tokens=True, verbose=True):
            return {"input_ids": [9] * add_special_tokens + [10 + ord(letter) % 7 for letter in text]}

    samples = sample(Sampling(nsamples=3, seqlen=8), Starts(), None)
    assert samples.shape == (3, 8)
    assert samples[:, 0].tolist() == [9, 9, 9]
    assert bool((samples[:, 1:] > 9).all())


def test_names_go_to_datasets_when_it_is_there(tokenizer, monkeypatch):
    asked = []
    fake = SimpleNamespace(
        __spec__=SimpleNamespace(),
        load_dataset=lambda name, split: asked.append((name, split)) or [{"text": "some text of it"}] * 9,
    )
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert len(sample(Sampling("someone/texts", 4, 8), tokenizer, None)) == 4
    assert asked == [("someone/texts", "train")]


def test_parquet_rows_are_documents_when_pyarrow_is_there(tokenizer, tmp_path, monkeypatch):
    table = SimpleNamespace(to_pylist=lambda: [{"text": "some text of it"}] * 9)
    parquet = SimpleNamespace(read_table=lambda path: table)
    monkeypatch.setitem(sys.modules, "pyarrow", SimpleNamespace(__spec__=SimpleNamespace(), parquet=parquet))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", parquet)
    assert len(sample(Sampling(write(tmp_path / "a.parquet", ""), 4, 8), tokenizer, None)) == 4


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.txt", "", "is empty"),
        ("a.txt", "abc", "has 3 tokens, less than one sample of 16"),
        ("a.jsonl", "{", "is no JSON"),
        ("a.jsonl", '{"title": "x"}', "has no text or content or messages"),
        ("a.txt", b"\xff\xfe\xff", "cannot be read as UTF-8"),
    ],
)
def test_bad_files_are_one_sentence(tokenizer, tmp_path, name, content, sentence):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(OptionError, match=sentence):
        sample(Sampling(str(path), 4, 16), tokenizer, None)


@pytest.mark.parametrize(
    ("source", "package"), [("someone/texts", "pip install datasets"), ("a.parquet", "pip install pyarrow")]
)
def test_missing_packages_are_named(tokenizer, tmp_path, monkeypatch, source, package):
    monkeypatch.setattr("lowbit.calibration.dataset.find_spec", lambda name: None)
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.parquet", "")
    with pytest.raises(OptionError, match=package):
        sample(Sampling(source, 4, 16), tokenizer, None)


@pytest.mark.parametrize(
    ("text", "mix"), [("a:1,b:3", [("a", 1), ("b", 3)]), ("x", [("x", 1)]), ("c:/d", [("c:/d", 1)])]
)
def test_mixtures_are_sources_with_weights(text, mix):
    assert parse_mix(text) == mix


@pytest.mark.parametrize("text", ["a:0", "a:-1", "a:inf", ",", ""])
def test_mixtures_that_mean_nothing_are_refused(text):
    with pytest.raises(OptionError, match="--dataset"):
        parse_mix(text)


def test_lengths_fit_the_model():
    assert Sampling().length(None) == 2048
    assert Sampling().length(512) == 512
    with pytest.raises(OptionError, match="at most 512 tokens, got --seqlen 1024"):
        Sampling(seqlen=1024).length(512)
    with pytest.raises(OptionError, match="--nsamples must be at least 1"):
        Sampling(nsamples=0)
