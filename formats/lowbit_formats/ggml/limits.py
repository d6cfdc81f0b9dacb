"""What no ggml type can hold is refused: NaN, infinity, and weights beyond float16, the type of all scales."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.errors import WeightError

FLOAT16_MAX = 65504.0


def check_weights(x: Tensor) -> None:
    """Raise WeightError for such a weight: two comparisons on the extremes, which NaN does not pass."""
    low, high = (float(value) for value in torch.aminmax(x))
    if not (low >= -FLOAT16_MAX and high <= FLOAT16_MAX):
        if x.isfinite().all():
            raise WeightError(
                f"holds {high if high > -low else low:g}, beyond {FLOAT16_MAX:g}, the largest float16; ggml's types cannot hold it, "
                f"keep this tensor with a rule PATTERN=none"
            )
        raise WeightError("holds NaN or infinity; repair the checkpoint, or keep this tensor with a rule PATTERN=none")


def check_extremes(magnitudes: Tensor, x: Tensor) -> float:
    """Do the same for weights ``x`` whose largest magnitudes are known, NaN among them; return the smallest of these."""
    low, high = torch.aminmax(magnitudes)
    if not float(high) <= FLOAT16_MAX:
        check_weights(x)
    return float(low)
