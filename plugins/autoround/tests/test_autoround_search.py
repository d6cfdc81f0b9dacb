"""Searched scales: never worse than the plain ones, as good as AutoRound's own grid, better where calibration says."""

import dataclasses

import pytest
import torch

from lowbit import Calibration, dequantize
from lowbit_autoround.options import AutoRoundOptions
from lowbit_autoround.quantizer import AutoRoundQuantizer

QUANTIZER = AutoRoundQuantizer()
KINDS = {
    "symmetric": {},
    "integer": {"symmetric": False},
    "minimum": {"symmetric": False, "zero": "minimum"},
}
kinds = pytest.mark.parametrize("kind", KINDS)


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def student_t(*shape, degrees=4):
    """Return Student-t weights: a Gaussian over the root of a mean of squares."""
    spread = torch.stack([gaussian(*shape, seed=seed + 1).square() for seed in range(degrees)]).mean(0)
    return gaussian(*shape) / spread.sqrt()


def squares(weight, result):
    return (dequantize(result) - weight).double().square()


@kinds
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_search_is_never_worse_than_the_extremes(kind, bits):
    weight = student_t(32, 256)
    options = AutoRoundOptions(bits, 64, scale_dtype="float32", **KINDS[kind])
    plain = squares(weight, QUANTIZER.quantize(weight, options)).view(32, 4, 64).sum(-1)
    found = QUANTIZER.quantize(weight, dataclasses.replace(options, scale="search"))
    found = squares(weight, found).view(32, 4, 64).sum(-1)
    energy = weight.view(32, 4, 64).double().square().sum(-1)
    # The scores are float32 sums of 64 terms: they may confuse errors that differ by less than their rounding.
    assert (found <= plain + 64 * 2**-24 * energy).all()
    assert found.sum() < plain.sum()


def published_search(groups, bits):
    """AutoRound 0.16's ``search_scales``: a grid of scales of one sign, the last as stored; returns squared errors."""
    half = 2 ** (bits - 1)
    extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    steps = range(-90, 91) if bits == 2 else range(-100, 101)
    width = 0.01 if bits == 2 else half * 0.75 / 100
    best = torch.full(extreme.shape, torch.inf, dtype=torch.float64)
    for step in steps:
        inverse = -(half - width * step) / extreme
        codes = (inverse * groups).round().clamp(-half, half - 1)
        best = torch.minimum(best, (codes / inverse - groups).double().square().sum(-1, keepdim=True))
    return best


@pytest.mark.parametrize("make", [gaussian, student_t])
@pytest.mark.parametrize(("bits", "group_size"), [(2, 64), (3, 128), (4, 32), (4, 128), (5, 32)])
def test_the_search_is_as_good_as_the_published_grid(make, bits, group_size):
    weight = make(64, 512)
    published = published_search(weight.view(-1, group_size), bits).sum()
    options = AutoRoundOptions(bits, group_size, scale="search", scale_dtype="float32")
    found = squares(weight, QUANTIZER.quantize(weight, options)).sum()
    assert found <= 1.005 * published  # 27 + 2 scales against 181 or 201
    if bits == 2:
        assert found <= 0.98 * published


@kinds
def test_importance_lowers_the_weighted_error(kind):
    weight = gaussian(64, 128)
    importance = torch.where(torch.arange(128) % 8 == 0, 100.0, 1.0)
    options = AutoRoundOptions(3, 64, scale="search", **KINDS[kind])
    plain = squares(weight, QUANTIZER.quantize(weight, options))
    weighted = squares(weight, QUANTIZER.quantize(weight, options, Calibration(importance=importance)))
    assert (weighted * importance).sum() < 0.8 * (plain * importance).sum()


@kinds
def test_tiny_and_huge_weights_are_searched_alike(kind):
    """Powers of two change the scale only: the squares inside the search neither vanish nor overflow."""
    weight = student_t(8, 128)
    options = AutoRoundOptions(3, 32, scale="search", scale_dtype="float32", **KINDS[kind])
    expected = QUANTIZER.quantize(weight, options)
    for gain in (2.0**-100, 2.0**100):
        found = QUANTIZER.quantize(weight * gain, options)
        assert torch.equal(found.parts["codes"], expected.parts["codes"])
        assert torch.equal(found.parts["scales"], expected.parts["scales"] * gain)
