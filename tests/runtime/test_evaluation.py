"""Perplexity and divergence, against what they are by definition."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lowbit
from lowbit.data import calibration_text, heldout_text
from lowbit.errors import OptionError
from lowbit.evaluation.scores import Score, evaluate
from lowbit.evaluation.windows import Windows, cut


class Bigrams:
    """A model whose logits depend on the last token only, with the interface of transformers."""

    device = torch.device("cpu")

    def __init__(self, table):
        self.table = table

    def __call__(self, ids, use_cache=None):
        return type("Output", (), {"logits": self.table[ids]})


def bigrams(seed, vocabulary=11):
    return Bigrams(torch.randn(vocabulary, vocabulary, generator=torch.Generator().manual_seed(seed)))


@given(
    length=st.integers(2, 60),
    context=st.integers(2, 20),
    stride=st.integers(1, 20),
    bos=st.none() | st.just(99),
)
@settings(deadline=None)
def test_every_token_of_the_windows_is_scored_once(length, context, stride, bos):
    text = context - (bos is not None)
    if stride > text or length < text:
        with pytest.raises(OptionError):
            Windows(torch.arange(length), context, stride, bos)
        return
    windows = Windows(torch.arange(length), context, stride, bos)
    scored = []
    for index in range(len(windows)):
        tokens, count = windows.window(index)
        assert len(tokens) == context
        assert (tokens[0] == 99) == (bos is not None)
        scored += tokens[-count:].tolist()
    end = (len(windows) - 1) * stride + text
    assert length - stride < end <= length
    whole = list(range(end)) if bos is not None else list(range(1, end))
    unscored = set(whole) - set(scored)
    assert sorted(set(scored)) == scored
    assert all(token % stride == 0 and stride == text for token in unscored)  # firsts of windows that do not overlap


def test_perplexity_is_that_of_the_definition():
    model, tokens = bigrams(0), torch.randint(11, (40,), generator=torch.Generator().manual_seed(1))
    (score,), base = evaluate([model], Windows(tokens, 40, 40))
    logs = model.table.double().log_softmax(-1)
    nll = -sum(logs[tokens[i], tokens[i + 1]].item() for i in range(39))
    assert base is None
    assert (score.tokens, score.mean_divergence, score.divergence_99, score.agreement) == (39, None, None, None)
    assert score.perplexity == pytest.approx(math.exp(nll / 39), rel=1e-6)


def test_overlapping_windows_of_a_bigram_model_give_the_same_perplexity():
    """Two tokens of context are all that it looks at."""
    model, tokens = bigrams(0), torch.randint(11, (41,), generator=torch.Generator().manual_seed(1))
    whole = evaluate([model], Windows(tokens, 41, 41))[0][0]
    pieces = evaluate([model], Windows(tokens, 11, 10))[0][0]
    assert pieces.tokens == whole.tokens
    assert pieces.perplexity == pytest.approx(whole.perplexity, rel=1e-6)


def test_divergence_and_agreement_are_those_of_the_definition(monkeypatch):
    monkeypatch.setattr("lowbit.evaluation.scores._POSITIONS", 7)
    model, base = bigrams(0), bigrams(5)
    tokens = torch.randint(11, (60,), generator=torch.Generator().manual_seed(1))
    (score, same), base_score = evaluate([model, base], Windows(tokens, 20, 20), base)
    p, q = base.table.double().log_softmax(-1), model.table.double().log_softmax(-1)
    by_token = (p.exp() * (p - q)).sum(-1)
    seen = torch.cat([tokens[start : start + 19] for start in (0, 20, 40)])
    assert score.mean_divergence == pytest.approx(by_token[seen].mean().item(), rel=1e-5)
    assert score.divergence_99 == pytest.approx(by_token[seen].quantile(0.99).item(), rel=1e-5)
    assert score.agreement == pytest.approx((p.argmax(-1) == q.argmax(-1))[seen].double().mean().item())
    assert (same.mean_divergence, same.agreement) == (0, 1)
    assert same.perplexity == base_score.perplexity


def test_a_hopeless_model_has_infinite_perplexity():
    assert Score(tokens=1, nll=1e6).perplexity == math.inf


def test_other_vocabularies_are_refused():
    with pytest.raises(OptionError, match="vocabulary of 11, this one of 12"):
        evaluate([bigrams(0, 12)], Windows(torch.arange(10), 5, 5), bigrams(0))


class Letters:
    """A tokenizer of letters; with ``bos`` it starts every text with 0, as Llama's does."""

    def __init__(self, bos=False):
        self.bos_token_id = 0 if bos else None

    def __call__(self, text, add_special_tokens=True, verbose=True):
        start = [0] if self.bos_token_id is not None and add_special_tokens else []
        return {"input_ids": start + [ord(letter) for letter in text]}


def test_windows_take_the_tokenizers_start_and_the_models_context():
    windows = cut(Letters(bos=True), "x" * 100, longest=16)
    assert (windows.context, windows.stride, windows.bos, len(windows)) == (16, 15, 0, 6)
    windows = cut(Letters(), "x" * 5000, longest=None, limit=2)
    assert (windows.context, windows.stride, windows.bos, len(windows)) == (2048, 2048, None, 2)
    assert cut(Letters(), "x" * 100, 64, context=20, stride=7).stride == 7


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"context": 65}, "at most 64 tokens, got --context 65"),
        ({"context": 50}, "40 tokens, less than one window of 50"),
        ({"context": 1}, "at least 2"),
        ({"context": 10, "stride": 11}, "stride must be 1 to the context"),
        ({"context": 10, "limit": 0}, "at least 1, got 0"),
    ],
)
def test_windows_that_make_no_sense_are_refused(options, words):
    with pytest.raises(OptionError, match=words):
        cut(Letters(), "x" * 40, longest=64, **options)


def test_the_texts_ship_and_share_nothing():
    heldout, calibration = heldout_text(), calibration_text()
    assert 100_000 < len(heldout) < 200_000
    assert 200_000 < len(calibration) < 400_000
    paragraphs = {paragraph for paragraph in heldout.split("\n\n") if len(paragraph) > 60}
    assert not any(paragraph in calibration for paragraph in paragraphs)


def test_every_layouts_kernel_has_the_perplexity_of_the_dequantized_model(pair, transformers):
    packed, plain = (lowbit.load(path, dtype=torch.float32) for path in pair)
    tokens = torch.randint(257, (128,), generator=torch.Generator().manual_seed(3))
    first, second = evaluate([packed, plain], Windows(tokens, 64, 64))[0]
    assert first.perplexity == pytest.approx(second.perplexity, rel=1e-4)
