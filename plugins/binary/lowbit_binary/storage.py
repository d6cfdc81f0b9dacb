"""What may be stored: finite values only, in the scheme's dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.errors import WeightError


def check_finite(values: Tensor) -> None:
    """Raise WeightError when a weight is NaN or infinite."""
    if not bool(torch.isfinite(values).all()):
        raise WeightError("holds NaN or infinity; repair the checkpoint, or keep this tensor with a rule PATTERN=none")


def store(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Round finite float32 scales to ``dtype``. Raises WeightError where ``dtype`` overflows."""
    stored = scales.to(dtype)
    if not bool(torch.isfinite(stored).all()):
        name = str(dtype).removeprefix("torch.")
        raise WeightError(
            f"needs a scale of {float(scales.abs().max()):g}, beyond {torch.finfo(dtype).max:g}, the largest {name}; set "
            f"scale_dtype to {'bfloat16 or float32' if dtype is torch.float16 else 'float32'}"
        )
    return stored
