"""The searches behind the quantizer ``ggml``: never worse than rounding to the range, and what they say of errors is true."""

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from lowbit_formats.ggml.affine_search import search_affine
from lowbit_formats.ggml.encoders import CODEBOOK_TARGETS, SPANS, TARGETS
from lowbit_formats.ggml.scale_search import Codebook, WholeNumbers, search_scale
from lowbit_formats.ggml.two_level import affine_units, symmetric_units
from lowbit_formats.ggml.weighted_groups import WeightedGroups, group_extremes
from lowbit_formats.gguf.simple_blocks import IQ4_NL_VALUES

seeds = st.integers(0, 2**32 - 1)


def make_groups(seed, size=32, groups=64):
    """Gaussian groups of different magnitudes and offsets, and a weighting of large ratios."""
    source = torch.Generator().manual_seed(seed)
    x = torch.randn(groups, size, generator=source) + 2 * torch.randn(groups, 1, generator=source)
    x = x * torch.exp(2 * torch.randn(groups, 1, generator=source))
    return WeightedGroups(x, torch.exp(1.5 * torch.randn(groups, size, generator=source)))


def errors(groups, decoded):
    """Weighted squared error of each group, float64."""
    return ((decoded.double() - groups.x.double()).square() * groups.w.double()).sum(1)


def affine_errors(groups, scale, minimum, highest):
    groups.encode(scale, minimum, 0, highest)
    return errors(groups, groups.codes * scale[:, None] + minimum[:, None])


@given(seed=seeds, bits=st.sampled_from(sorted(SPANS)), above_zero=st.booleans())
def test_affine_search_is_no_worse_than_the_range(seed, bits, above_zero):
    groups, highest = make_groups(seed), 2**bits - 1
    low, high = groups.x.amin(1), groups.x.amax(1)
    if not above_zero:
        low = low.clamp_max(0)
    rounded = affine_errors(groups, (high - low) / highest, low, highest)
    scale, minimum = search_affine(groups, highest, SPANS[bits], 1, above_zero)
    assert above_zero or bool((minimum <= 0).all())
    assert bool((affine_errors(groups, scale, minimum, highest) <= rounded * (1 + 1e-4)).all())


@given(seed=seeds, bits=st.sampled_from(sorted(TARGETS)))
def test_scale_search_is_no_worse_than_its_first_trial(seed, bits):
    groups, values, half = make_groups(seed), WholeNumbers.signed(bits), 2 ** (bits - 1)
    plain = group_extremes(groups.x) / -half
    found = search_scale(groups, values, TARGETS[bits], 1)
    by_scale = []
    for scale in (found, plain):
        groups.encode(scale, None, -half, half - 1)
        by_scale.append(errors(groups, groups.codes * scale[:, None]))
    assert bool((by_scale[0] <= by_scale[1] * (1 + 1e-4)).all()), "the extreme at -half is among the trials"


@given(seed=seeds)
def test_codebook_finds_the_nearest_value(seed):
    groups, values = make_groups(seed), torch.tensor(IQ4_NL_VALUES, dtype=torch.float32)
    book = Codebook(IQ4_NL_VALUES)
    inverse = -127 / group_extremes(groups.x)
    wanted = groups.x * inverse[:, None]
    book.nearest(groups, inverse)
    distance = (wanted[:, :, None] - values).abs()
    assert torch.allclose((wanted - groups.codes).abs(), distance.amin(2), atol=1e-4)
    assert torch.equal(values[book.codes(groups, inverse).long()], book_values(book, groups, inverse))


def book_values(book, groups, inverse):
    book.nearest(groups, inverse)
    return groups.codes.clone()


def test_codebook_ties_go_to_the_upper_value():
    midpoints = torch.tensor([(low + high) / 2 for low, high in itertools.pairwise(IQ4_NL_VALUES)])
    groups = WeightedGroups(midpoints[None], torch.ones(1, 15))
    assert Codebook(IQ4_NL_VALUES).codes(groups, torch.ones(1))[0].tolist() == list(range(1, 16))
    outside = WeightedGroups(torch.tensor([[-1e4, 1e4]]), torch.ones(1, 2))
    assert Codebook(IQ4_NL_VALUES).codes(outside, torch.ones(1))[0].tolist() == [0, 15]


@given(seed=seeds)
def test_searched_codebook_scale_is_no_worse_than_its_first_trial(seed):
    groups, book = make_groups(seed), Codebook(IQ4_NL_VALUES)
    by_scale = []
    for scale in (search_scale(groups, book, CODEBOOK_TARGETS, 1), group_extremes(groups.x) / -127):
        book.nearest(groups, 1 / scale)
        by_scale.append(errors(groups, groups.codes * scale[:, None]))
    assert bool((by_scale[0] <= by_scale[1] * (1 + 1e-4)).all())


@given(seed=seeds)
def test_second_level_of_affine_scales(seed):
    """Eight groups of like magnitude lose little to 6-bit units, and what is stored means what the fit computed."""
    source = torch.Generator().manual_seed(seed)
    x = torch.randn(64, 32, generator=source)
    groups = WeightedGroups(x, x.abs() + 1)
    scale, minimum = search_affine(groups, 15, SPANS[4], 1)
    single = affine_errors(groups, scale, minimum, 15).sum()
    parts = affine_units(groups, scale, minimum, 15, 63, 8)
    d, dmin = parts["super_scales"].float(), parts["super_minimums"].float()
    decoded = parts["codes"] * (d * parts["scales"]).view(-1, 1) + (dmin * parts["minimums"]).view(-1, 1)
    assert int(parts["scales"].max()) <= 63
    assert int(parts["minimums"].max()) <= 63
    assert bool((dmin <= 0).all())
    assert float(errors(groups, decoded).sum()) <= 1.05 * float(single)


@given(seed=seeds)
def test_second_level_of_signed_scales(seed):
    source = torch.Generator().manual_seed(seed)
    x = torch.randn(64, 16, generator=source)
    groups = WeightedGroups(x, x.abs() + 1)
    scale = search_scale(groups, WholeNumbers.signed(3), TARGETS[3], 1)
    groups.encode(scale, None, -4, 3)
    single = errors(groups, groups.codes * scale[:, None]).sum()
    parts = symmetric_units(groups, scale, 4, 32, 16)
    units = parts["scales"].view(-1, 1)
    decoded = (parts["codes"].float() - 4) * (parts["super_scales"].float().repeat_interleave(16, 0) * units)
    assert -32 <= int(units.min()) <= int(units.max()) <= 31
    assert float(errors(groups, decoded).sum()) <= 1.05 * float(single)
