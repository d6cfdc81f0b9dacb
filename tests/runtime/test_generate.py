"""The decoding loop."""

import pytest
import torch

import lowbit
from lowbit.errors import OptionError
from lowbit.runtime.generate import Detokenizer, Sampling, max_context, stop_tokens, stream


@pytest.fixture
def model(llama_folder):
    return lowbit.load(llama_folder, dtype=torch.float32)


PROMPT = [5, 9, 30, 77]


def test_greedy_text_is_that_of_transformers(model):
    ids = torch.tensor([PROMPT])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert list(stream(model, PROMPT, 8)) == out[0, 4:].tolist()


def test_a_seed_repeats_a_draw(model):
    def draw(seed):
        return list(stream(model, PROMPT, 12, Sampling(2.0, 0.95, seed)))

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_generation_ends_before_a_stop_token_and_at_the_context(model):
    tokens = list(stream(model, PROMPT, 8))
    assert list(stream(model, PROMPT, 8, stop=[tokens[3]])) == tokens[: tokens.index(tokens[3])]
    assert max_context(model) == 128
    assert len(list(stream(model, [1] * 120, 50))) == 8


def test_draws_follow_the_distribution():
    logits, source = torch.tensor([2.0, 1.0, 0.0, -5.0]), torch.Generator().manual_seed(0)
    counts = torch.bincount(torch.tensor([Sampling(1.0).choose(logits, source) for _ in range(4000)]), minlength=4)
    torch.testing.assert_close(counts / 4000, logits.softmax(-1), atol=0.03, rtol=0)
    assert {Sampling(1.0, 0.7).choose(logits, source) for _ in range(200)} == {0, 1}  # 0.66, then 0.24 reaches 0.7
    assert {Sampling(1.0, 0.5).choose(logits, source) for _ in range(50)} == {0}
    assert Sampling().choose(logits, source) == 0


@pytest.mark.parametrize(
    ("use", "words"),
    [
        (lambda model: list(stream(model, [], 3)), "no tokens"),
        (lambda model: list(stream(model, [1] * 128, 3)), "128 tokens, and the model's context ends at 128"),
        (lambda model: Sampling(temperature=-1), "temperature must be 0"),
        (lambda model: Sampling(top_p=0), "top-p must lie above 0"),
    ],
)
def test_what_makes_no_sense_is_refused(model, use, words):
    with pytest.raises(OptionError, match=words):
        use(model)


class Bytes:
    """A tokenizer of UTF-8 bytes."""

    eos_token_id = 3

    def decode(self, tokens, skip_special_tokens=True):
        return bytes(tokens).decode("utf-8", errors="replace")


def test_characters_of_several_tokens_come_out_whole():
    detokenizer, text = Detokenizer(Bytes()), "naïve 漢字\nand 🙂 on"
    pieces = [detokenizer.add(token) for token in text.encode()]
    assert "".join(pieces) == text
    assert "漢" in pieces


def test_stop_tokens_are_those_of_model_and_tokenizer():
    def model(said):
        return type("Model", (), {"generation_config": type("Config", (), {"eos_token_id": said})})

    assert stop_tokens(model([1, 2]), Bytes()) == {1, 2, 3}
    assert stop_tokens(model(None), Bytes()) == {3}
    assert stop_tokens(object(), Bytes()) == {3}
