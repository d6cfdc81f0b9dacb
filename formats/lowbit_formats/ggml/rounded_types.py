"""Types that ggml rounds without a search: the same bytes as its reference (``quantize_row_*_ref`` in ggml-quants.c).

Operations and their order are ggml's, in float32, because each one rounds: the codes come from the float32 scale, before it
is stored as float16. C's ``(int8_t) v`` truncates and ``roundf`` rounds halves away from zero.

All functions take x float32 (rows, columns) and return the parts of these rows; codes lie in scratch memory, until the same
thread calls again.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lowbit.compiled import CLoops
from lowbit_formats.ggml.limits import check_extremes
from lowbit_formats.ggml.scratch import SCRATCH
from lowbit_formats.ggml.two_level import to_half
from lowbit_formats.ggml.weighted_groups import LEAST, extremes_and_negated, reciprocal

Parts = dict[str, Tensor]
_LOOPS = CLoops(Path(__file__).with_name("rounded_types.c"))


def round_signed(x: Tensor, bits: int, size: int) -> Parts:
    """Q4_0, Q5_0: the extreme of a group becomes code 0, which has no positive counterpart."""
    half = 1 << bits - 1
    if found := _by_loop("round_signed", x, size, half):
        return found
    extremes, negated = extremes_and_negated(x.view(-1, size))
    smallest = check_extremes(extremes.abs(), x)
    scales = extremes.div_(half)
    values = negated.mul_(_inverse(scales, smallest / half)).add_(half + 0.5)
    codes = _truncated(values).clamp_(max=2 * half - 1)
    return {"codes": codes.view(torch.uint8), "scales": scales.neg_().half()}


def round_range(x: Tensor, bits: int, size: int) -> Parts:
    """Q4_1, Q5_1: the least weight of a group becomes code 0, the greatest the highest code."""
    highest = (1 << bits) - 1
    groups = x.view(-1, size)
    low = groups.amin(1)
    scales = (groups.amax(1) - low).div_(highest)
    values = torch.sub(groups, low.unsqueeze(1), out=SCRATCH.room("values", groups))
    codes = _truncated(values.mul_(reciprocal(scales).unsqueeze(1)).add_(0.5)).clamp_(max=highest)
    return {"codes": codes.view(torch.uint8), "scales": to_half(scales), "minimums": to_half(low)}


def round_absmax(x: Tensor, size: int = 32) -> Parts:
    """Q8_0: codes -127 to 127, stored with 128 added."""
    if found := _by_loop("round_absmax", x, size):
        return found
    groups = x.view(-1, size)
    scales = absmax(groups)
    smallest = check_extremes(scales, groups)
    inverse = _inverse(scales.div_(127), smallest / 127)
    return {"codes": _rounded(groups, inverse, 128), "scales": scales.half()}


def round_ternary(x: Tensor, size: int = 256) -> Parts:
    """TQ1_0, TQ2_0: -1, 0, 1 times the absmax of a block; exact for weights that are ternary already."""
    groups = x.view(-1, size)
    scales = absmax(groups)
    smallest = check_extremes(scales, groups)
    return {"codes": _rounded(groups, _inverse(scales, smallest), 1), "scales": scales.half()}


def round_mxfp4(x: Tensor, size: int = 32) -> Parts:
    """MXFP4: the scale is the power of two that puts the absmax between 4 and 8; E2M1 ends at 6, larger values saturate.

    The rule of OCP Microscaling Formats 1.0, section 6.3. Midpoints of E2M1 (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5) are multiples
    of a quarter, and a tie goes to the smaller magnitude: the code is a table's entry for ceil(4 |x| / scale).
    """
    groups = x.view(-1, size)
    magnitudes = absmax(groups)
    check_extremes(magnitudes, groups)
    exponents = (
        torch.frexp(magnitudes).exponent.add_(124).clamp_(3, 254)
    )  # frexp's mantissa is below 1: 2**(e - 1) <= |x|
    inverse = (256 - exponents << 23).view(torch.float32)  # the bits of 4 * 2**(127 - exponent)
    quarters = (groups.abs() * inverse.unsqueeze(1)).ceil_().clamp_(max=_E2M1_SLOTS - 1)
    codes = _e2m1_codes().to(x.device).index_select(0, quarters.to(torch.int32).view(-1)).view(groups.shape)
    negative = (groups < 0) & (codes > 0)
    codes |= negative.view(torch.uint8) << 3
    exponents.masked_fill_(magnitudes == 0, 0)
    return {"codes": codes, "scales": exponents.to(torch.uint8).view(torch.float8_e8m0fnu)}


def sign_planes(x: Tensor, importance: Tensor | None, size: int = 128) -> Parts:
    """Q1_0: signs times the mean magnitude of a block, which is the scale of least squared error; weighted when calibrated."""
    groups = x.view(-1, size)
    magnitudes = groups.abs()
    if importance is None:
        scales = magnitudes.mean(1)
    else:
        weights = importance.expand_as(x).reshape(groups.shape)
        scales = (magnitudes * weights).sum(1) / weights.sum(1)
    return {"planes": (groups >= 0).view(torch.uint8), "scales": to_half(scales)}


def absmax(groups: Tensor) -> Tensor:
    """Return the largest magnitude of each group: (groups, size) to (groups,).

    Magnitudes are ordered as their bits are, and whole numbers are compared twice as fast.
    """
    magnitudes = torch.abs(groups, out=SCRATCH.room("values", groups))
    return magnitudes.view(torch.int32).amax(1).view(torch.float32)


def _by_loop(name: str, x: Tensor, size: int, *settings: int) -> Parts | None:
    """Return what a loop in C makes of x; None where there is none, or where x holds what is to be refused by name."""
    if x.device.type != "cpu" or not x.numel() or (loop := _LOOPS.find(name)) is None:
        return None
    groups = x.view(-1, size)
    codes, scales = SCRATCH.room("bytes", groups, torch.uint8), groups.new_empty(len(groups))
    refused = loop(groups, codes, scales, len(groups), size, *settings)
    return None if refused else {"codes": codes, "scales": scales.half()}


def _inverse(scales: Tensor, smallest: float) -> Tensor:
    """Return 1 / scales (groups, 1), 0 where ``reciprocal`` says so; the smallest magnitude tells whether it must look."""
    return (scales.reciprocal() if smallest > 2 * LEAST else reciprocal(scales)).unsqueeze(1)


def _truncated(values: Tensor) -> Tensor:
    """Return int8, rounded towards zero as C does."""
    return SCRATCH.room("codes", values, torch.int8).copy_(values)


def _rounded(groups: Tensor, factors: Tensor, offset: int) -> Tensor:
    """Return ``offset`` plus groups * factors rounded as C's ``roundf`` does, halves away from zero: uint8, in the scratch room.

    With t twice the product, cut to a whole number, that is (t + 1) // 2 for t >= 0 and t // 2 below: rounding down, as shifts do.
    """
    doubled = torch.mul(groups, 2 * factors, out=SCRATCH.room("values", groups))
    whole = SCRATCH.room("whole", groups, torch.int16).copy_(doubled)
    signs = torch.bitwise_right_shift(whole, 15, out=SCRATCH.room("signs", groups, torch.int16))
    whole.add_(signs).add_(2 * offset + 1).bitwise_right_shift_(1)
    return SCRATCH.room("bytes", groups, torch.uint8).copy_(whole)


_E2M1_SLOTS = 32


def _e2m1_codes() -> Tensor:
    """Return the code for each ceil(4 |x|): how many of the midpoints 1, 3, 5, 7, 10, 14, 20 (quarters) lie strictly below."""
    midpoints = torch.tensor([1, 3, 5, 7, 10, 14, 20])
    return (torch.arange(_E2M1_SLOTS)[:, None] > midpoints).sum(1).to(torch.uint8)
