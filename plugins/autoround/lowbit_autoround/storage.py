"""What may be stored: finite values only, in the scheme's dtype, and no scale that vanishes under a group that is not zero."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.errors import WeightError

SMALLEST_FLOAT16 = 2.0**-24
"""Smallest float16 above zero. bfloat16 and float32 go down to 1e-40, where no weight differs from zero for any purpose."""


def check_finite(low: Tensor, high: Tensor) -> None:
    """Raise WeightError when a group's extremes are NaN or infinite: then one of its weights is."""
    if not bool(torch.isfinite(low).all() and torch.isfinite(high).all()):
        raise WeightError("holds NaN or infinity; repair the checkpoint, or keep this tensor with a rule PATTERN=none")


def store_scales(scales: Tensor, dtype: torch.dtype, check: bool = True) -> Tensor:
    """Round float32 scales to ``dtype``; float16 rounds away from zero below its smallest value, so that only 0 becomes 0.

    AutoRound keeps |scale| >= 1e-5 instead (``q_scale_thresh``), which turns 4-bit groups with an absmax below 4e-5 into zeros
    and costs small groups their precision; here they keep as many codes as float16 has scales for. Raises WeightError where
    ``dtype`` overflows, if asked to ``check``.
    """
    stored = store(scales, dtype, "scale", check)
    if dtype is torch.float16:
        smallest = (scales.sign() * SMALLEST_FLOAT16).half()  # 0 for 0
        return torch.where(stored == 0, smallest, stored)
    return stored


def store(values: Tensor, dtype: torch.dtype, what: str, check: bool = True) -> Tensor:
    """Round float32 values to ``dtype``, zeros to +0.

    Raises WeightError where ``dtype`` overflows; to ``check`` waits for the device that the values are on.
    """
    stored = values.to(dtype)
    if check and not bool(torch.isfinite(stored).all()):
        name = str(dtype).removeprefix("torch.")
        raise WeightError(
            f"needs a {what} of {float(values.abs().max()):g}, beyond {torch.finfo(dtype).max:g}, the largest {name}; set "
            f"scale_dtype to {'bfloat16 or float32' if dtype is torch.float16 else 'float32'}"
        )
    return stored.add_(0.0)


def divisors(scales: Tensor) -> Tensor:
    """Return stored scales as float32 (rows, groups, 1) to divide by; 1 in place of 0, as the group holds zeros only."""
    widened = scales.float()
    return widened.masked_fill_(widened == 0, 1.0)[..., None]
