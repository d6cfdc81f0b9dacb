"""From weights to the parts of each ggml type: which weighting, which search, how many trials.

An encoder takes x float32 (rows, columns), contiguous, and the relative importance (columns,) or None; it returns the parts
of these rows, each of as many elements as the scheme says, in any shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from lowbit_formats.ggml.affine_search import search_affine
from lowbit_formats.ggml.limits import check_weights
from lowbit_formats.ggml.rounded_types import (
    Parts,
    round_absmax,
    round_mxfp4,
    round_range,
    round_signed,
    round_ternary,
    sign_planes,
)
from lowbit_formats.ggml.scale_search import Codebook, WholeNumbers, search_scale
from lowbit_formats.ggml.two_level import affine_units, symmetric_units, to_half
from lowbit_formats.ggml.weighted_groups import WeightedGroups, reciprocal
from lowbit_formats.ggml.weighting import calibrated_weighting, spread_weighting
from lowbit_formats.gguf.simple_blocks import IQ4_NL_VALUES

Encoder = Callable[[Tensor, Tensor | None], Parts]

BLOCK = 256
"""Weights in a super-block."""

# Where the trials put the ends of a group, by bits. Chosen among some fifty candidates each, one after the other, by what it
# still lowers the error of a mix of Gaussian, Laplace, heavy-tailed and channel-scaled weights, calibrated or not (2026-11-21).
# Spans below the highest code leave codes unused, those above it clip the ends; wider choices lower a group's own error, but a
# larger scale makes the steps of the whole block coarser.
SPANS: Mapping[int, tuple[float, ...]] = {
    2: (3.2, 2.6, 4, 2.9, 3.6),
    4: (15, 14, 15.9, 14.5, 15.4, 13.2, 16.6),
    5: (31, 30, 31.7, 29, 30.5, 28, 26.5),
}
TARGETS: Mapping[int, tuple[float, ...]] = {
    2: (-2, -1.25, -2.7, 3),
    3: (-4, -3.15, -4.4, 4.7, -5, -3.7),
    4: (-8, -8.4, -8.9, -7.6, -7.2, 9, -10, -6.5),
    5: (-16, -17, -15, -14, -18.5, -15.5, -16.5, -13),
    6: (-32, -30, -28, -31),
}
CODEBOOK_TARGETS = (-127, 115, -108, -136, 100, 130, -118)
REFINEMENTS = 1


def encode_affine_k(x: Tensor, importance: Tensor | None, bits: int, size: int, unit_bits: int) -> Parts:
    """Q2_K, Q4_K, Q5_K: scales and minimums in two levels."""
    groups = x.view(-1, size)
    weights = spread_weighting(groups) if importance is None else _calibrated(x, importance, BLOCK, size)
    weighted = WeightedGroups(groups, weights)
    highest = (1 << bits) - 1
    scale, minimum = search_affine(weighted, highest, SPANS[bits], REFINEMENTS)
    return affine_units(weighted, scale, minimum, highest, (1 << unit_bits) - 1, BLOCK // size)


def encode_symmetric_k(x: Tensor, importance: Tensor | None, bits: int, size: int, unit_bits: int) -> Parts:
    """Q3_K, Q6_K: signed scales in two levels."""
    groups = x.view(-1, size)
    weights = spread_weighting(groups) if importance is None else _calibrated(x, importance, BLOCK, size)
    weighted = WeightedGroups(groups, weights)
    half = 1 << bits - 1
    scale = search_scale(weighted, WholeNumbers.signed(bits), TARGETS[bits], REFINEMENTS)
    return symmetric_units(weighted, scale, half, 1 << unit_bits - 1, BLOCK // size)


def encode_range(x: Tensor, importance: Tensor | None, bits: int, size: int) -> Parts:
    """Q4_1, Q5_1: rounded to the range of a group, or searched when calibrated."""
    if importance is None:
        return round_range(x, bits, size)
    highest = (1 << bits) - 1
    weighted = WeightedGroups(x.view(-1, size), _calibrated(x, importance, size, size))
    scale, minimum = (to_half(v) for v in search_affine(weighted, highest, SPANS[bits], REFINEMENTS, True))
    weighted.encode(scale.float(), minimum.float(), 0, highest)
    return {"codes": weighted.codes.to(torch.int8).view(torch.uint8), "scales": scale, "minimums": minimum}


def encode_signed(x: Tensor, importance: Tensor | None, bits: int, size: int) -> Parts:
    """Q4_0, Q5_0: rounded to the extreme of a group, or searched when calibrated. Q2_0: searched always."""
    if importance is None and bits > 2:
        return round_signed(x, bits, size)
    check_weights(x)
    groups = x.view(-1, size)
    weights = torch.ones_like(groups) if importance is None else _calibrated(x, importance, size, size)
    weighted = WeightedGroups(groups, weights)
    half = 1 << bits - 1
    scale = to_half(search_scale(weighted, WholeNumbers.signed(bits), TARGETS[bits], REFINEMENTS))
    weighted.encode(scale.float(), None, -half, half - 1)
    return {"codes": weighted.codes.to(torch.int8).add_(half).view(torch.uint8), "scales": scale}


def encode_iq4_nl(x: Tensor, importance: Tensor | None, size: int = 32) -> Parts:
    """IQ4_NL: sixteen fixed values, closer together near zero."""
    groups = x.view(-1, size)
    weights = spread_weighting(groups) if importance is None else _calibrated(x, importance, size, size)
    weighted, values = WeightedGroups(groups, weights), Codebook(IQ4_NL_VALUES)
    scale = to_half(search_scale(weighted, values, CODEBOOK_TARGETS, REFINEMENTS))
    return {"codes": values.codes(weighted, reciprocal(scale.float())), "scales": scale}


def _calibrated(x: Tensor, importance: Tensor, block: int, size: int) -> Tensor:
    return calibrated_weighting(x, importance, block).view(-1, size)


ENCODERS: Mapping[str, Encoder] = {
    "q4_0": partial(encode_signed, bits=4, size=32),
    "q4_1": partial(encode_range, bits=4, size=32),
    "q5_0": partial(encode_signed, bits=5, size=32),
    "q5_1": partial(encode_range, bits=5, size=32),
    "q8_0": lambda x, importance: round_absmax(x),
    "q2_k": partial(encode_affine_k, bits=2, size=16, unit_bits=4),
    "q3_k": partial(encode_symmetric_k, bits=3, size=16, unit_bits=6),
    "q4_k": partial(encode_affine_k, bits=4, size=32, unit_bits=6),
    "q5_k": partial(encode_affine_k, bits=5, size=32, unit_bits=6),
    "q6_k": partial(encode_symmetric_k, bits=6, size=16, unit_bits=8),
    "iq4_nl": encode_iq4_nl,
    "mxfp4": lambda x, importance: round_mxfp4(x),
    "tq1_0": lambda x, importance: round_ternary(x),
    "tq2_0": lambda x, importance: round_ternary(x),
    "q2_0": partial(encode_signed, bits=2, size=64),
    "q1_0": sign_planes,
}
"""The encoder of every type."""

CHECKING = frozenset(("q4_0", "q5_0", "q2_0", "q8_0", "mxfp4", "tq1_0", "tq2_0"))
"""Types whose encoders refuse NaN, infinity and weights beyond float16 by themselves: where extremes are known, that costs no pass."""
ROUNDED = frozenset(("q4_0", "q5_0", "q8_0", "tq1_0", "tq2_0"))
"""Types that are rounded without a search, unless calibrated, in a few passes."""
