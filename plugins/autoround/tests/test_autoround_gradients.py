"""The written-out gradients are those that autograd finds through the formulas, rounding passed straight through."""

import pytest
import torch

from lowbit import Scheme
from lowbit.scheme import Grid, Zero
from lowbit_autoround.ranges import IntegerRange, MinimumRange, SearchedScales, SymmetricRange
from lowbit_autoround.tuned_weight import TunedWeight, grouped

BITS, ROWS, SIZE, GROUPS = 3, 8, 16, 4
LAST, HALF = 2**BITS - 1, 2 ** (BITS - 1)


def straight(rounded, value):
    return (rounded - value).detach() + value


def stored(value):
    return straight(value.detach().half().float(), value)


def symmetric(w, v, below, above):
    low, high = -w.amin(-1, keepdim=True) * below, w.amax(-1, keepdim=True) * above
    scale = stored(torch.where(high >= low, -1.0, 1.0) * torch.maximum(low, high) / HALF)
    x = w / scale + v
    return scale * straight(x.round(), x).clamp(-HALF, HALF - 1)


def integer(w, v, below, above):
    low, high = -w.amin(-1, keepdim=True) * below, w.amax(-1, keepdim=True) * above
    scale = stored((high + low) / LAST)
    zero = low / scale
    zero, x = straight(zero.round(), zero), w / scale + v
    return scale * ((straight(x.round(), x) + zero).clamp(0, LAST) - zero)


def minimum(w, v, below, above):
    low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
    reach = (high - low) / 2
    lowest, highest = low + reach * (1 - below), high - reach * (1 - above)
    scale, offset = stored((highest - lowest) / LAST), stored(lowest)
    x = (w - offset) / scale + v
    return scale * straight(x.round(), x).clamp(0, LAST) + offset


def searched(w, v, below, above):
    start, offset = w.abs().amax(-1, keepdim=True) / HALF, w.amin(-1, keepdim=True)
    scale = stored(start * above)
    moved = stored(offset + start * (LAST / 2) * (below - 1))
    x = (w - moved) / scale + v
    return scale * straight(x.round(), x).clamp(0, LAST) + moved


def searched_ranges(groups, bits, dtype):
    return SearchedScales(groups.abs().amax(-1) / HALF, bits, dtype, offsets=groups.amin(-1))


CASES = {
    "symmetric": (symmetric, SymmetricRange, Zero.SYMMETRIC),
    "integer": (integer, IntegerRange, Zero.INTEGER),
    "minimum": (minimum, MinimumRange, Zero.MINIMUM),
    "searched": (searched, searched_ranges, Zero.MINIMUM),
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_autograd(case, monkeypatch):
    formula, make, zero = CASES[case]
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(ROWS, SIZE * GROUPS, generator=generator)
    groups = grouped(weight, SIZE)
    ranges = make(groups, BITS, torch.float16)
    tuned = TunedWeight(Scheme(Grid.AFFINE, BITS, SIZE, zero), tuple(weight.shape), groups, ranges, lr=0.01)
    ranges.below.copy_(
        0.6 + 0.4 * torch.rand(ranges.below.shape, generator=generator)
    )  # narrow ranges: codes are clamped
    ranges.above.copy_(0.6 + 0.4 * torch.rand(ranges.below.shape, generator=generator))
    tuned._values.copy_(torch.rand(groups.shape, generator=generator) - 0.5)
    leaves = [
        value.clone().requires_grad_() for value in (tuned._values, ranges.below[..., None], ranges.above[..., None])
    ]
    expected = formula(groups, *leaves)
    decoded = torch.empty_like(weight)
    tuned.decode(decoded)
    torch.testing.assert_close(decoded, expected.detach().view(ROWS, -1), rtol=1e-5, atol=1e-6)

    gradient = torch.randn(weight.shape, generator=generator)
    by_value, by_below, by_above = torch.autograd.grad((expected.view(ROWS, -1) * gradient).sum(), leaves)
    assert (by_value == 0).any(), "some codes must be clamped for the test to mean anything"
    seen = {}
    monkeypatch.setattr(ranges, "learn", lambda *sums: seen.update(sums=sums[:2]))
    before = tuned._values.clone()
    tuned.learn([gradient.clone()], 1.0, tune_scales=True)
    found = ranges.gradients(*seen["sums"])
    torch.testing.assert_close(found[0], by_below[..., 0], rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(found[1], by_above[..., 0], rtol=2e-3, atol=2e-3)
    moved = (before - 0.01 * by_value.sign()).clamp(-0.5, 0.5)
    torch.testing.assert_close(tuned._values, moved, rtol=0, atol=1e-6)
