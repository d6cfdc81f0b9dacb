"""The exact arithmetic of ``kbit``: every implementation, on every device, gives these bits.

All steps are IEEE float32, round to nearest even, subnormals kept (no flush to zero), no fused multiply-add; a CUDA kernel
uses ``__fmul_rn``, ``__fadd_rn``, ``__frcp_rn``. For each group of weights, the last of a row perhaps short:

1.  w         the weights as float32 (exact from float16 and bfloat16).
2.  extreme   ``absmax``: the largest |w|. ``signed``: the w with the largest |w|, the positive one of two.
3.  scale     ``extreme`` rounded to the scale's dtype. Below 2^-126 as float32 it becomes +0, as it does for a group of zeros;
              an infinite result is refused (WeightError names the dtypes that can hold it), never clamped.
4.  r         1 / float32(scale), and 0 for a scale of 0.
5.  x         w * r.
6.  code      the number of midpoints strictly below x, a midpoint being (entry + next entry) * 0.5: the nearest entry, and
              the lower one of two. A group whose scale is 0 has x = 0, so all its codes are the one nearest to zero.

With ``scale_bits`` b, step 3 goes on, for each row, L being 2^b - 1 for ``absmax`` (and ``search`` with a codebook that is its own
mirror image), else 2^(b-1) - 1:

3a. d         (largest |extreme| of the row) * float32(1 / L), rounded to the scale's dtype as in step 3.
3b. u         extreme * (1 / d) rounded to an integer, halves to even, kept within L; the scale is float32(u) * float32(d).

Stochastic rounding replaces step 6 (``lowbit_kbit.rounding``).

The meaning of a code is ``codebook[code] * float32(scale)`` (``lowbit.grids``). ``search`` puts another scale in the place of
step 3; its own arithmetic is in ``lowbit_kbit.search``, and steps 4 to 6 follow with the scale that it stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.errors import WeightError

SMALLEST_SCALE = 2.0**-126
"""Smallest normal float32: the reciprocal of anything smaller may be infinite."""
NOT_FINITE = "holds NaN or infinity; repair the checkpoint, or keep this tensor with a rule PATTERN=none"


def absmax(groups: Tensor) -> Tensor:
    """Return the largest magnitude of each group: (rows, groups, size) to float32 (rows, groups)."""
    return torch.maximum(groups.amax(-1), groups.amin(-1).neg_())


def signed_absmax(groups: Tensor) -> Tensor:
    """Return the element of largest magnitude of each group, the positive one of two: (rows, groups, size) to (rows, groups)."""
    high, low = groups.amax(-1), groups.amin(-1)
    return torch.where(high >= -low, high, low)


def check_finite(extremes: Tensor) -> None:
    """Raise WeightError when a group's extreme is NaN or infinite: then one of its weights is."""
    if not bool(torch.isfinite(extremes).all()):
        raise WeightError(NOT_FINITE)


def store(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Round finite float32 scales to ``dtype``; those below 2^-126 become 0. Raises WeightError where ``dtype`` overflows."""
    stored = scales.to(dtype)
    widened = stored.float()
    if bool(torch.isinf(widened).any()):
        raise overflow(float(scales.abs().max()), dtype)
    return stored.masked_fill_(widened.abs() < SMALLEST_SCALE, 0)


def overflow(worst: float, dtype: torch.dtype) -> WeightError:
    """Return the error of a scale that ``dtype`` cannot hold."""
    name = str(dtype).removeprefix("torch.")
    return WeightError(
        f"needs a scale of {worst:g}, beyond {torch.finfo(dtype).max:g}, the largest {name}; set scale_dtype to "
        f"{'bfloat16 or float32' if dtype is torch.float16 else 'float32'}"
    )


def reciprocals(scales: Tensor) -> Tensor:
    """Return 1 / float32(scale), and 0 where the scale is 0 or too small to have one."""
    widened = scales.float()
    return widened.reciprocal().masked_fill_(widened.abs() < SMALLEST_SCALE, 0)


def second_level(scales: Tensor, bits: int, signed: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return integers (rows, groups), int8 or uint8, and a float of ``dtype`` for each row (rows, 1): scale = integer * float."""
    largest = (1 << bits - signed) - 1
    steps = store(scales.abs().amax(1, keepdim=True) * (1 / largest), dtype)
    units = (scales * reciprocals(steps)).round_().clamp_(-largest if signed else 0, largest)
    return units.to(torch.int8 if signed else torch.uint8), steps


def tree_sum(values: Tensor) -> Tensor:
    """Sum float32 ``values`` over the first dimension in a fixed order, and overwrite them.

    The upper half is added to the lower until one is left, as if zeros filled the dimension up to a power of two: the order of
    a butterfly of warp shuffles, the same on every device and for every number of threads.
    """
    length = len(values)
    while length > 1:
        half = 1 << (length - 1).bit_length() - 1
        values[: length - half].add_(values[half:length])
        length = half
    return values[0]
