"""The importance of input columns as the searches weigh it."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit import Calibration
from lowbit.errors import WeightError

LEAST_IMPORTANCE = 1e-4  # of the mean: an input that calibration never saw may still occur


def relative_importance(calibration: Calibration | None, weight: Tensor) -> Tensor | None:
    """Return the importance of each column relative to the mean, float32 (in,) on the weight's device, if it was measured.

    Raises WeightError when it is NaN or infinite.
    """
    if calibration is None or calibration.importance is None:
        return None
    measured = calibration.importance.to(weight.device, torch.float64)
    assert measured.shape == weight.shape[1:], (measured.shape, weight.shape)
    if not bool(torch.isfinite(measured).all()):
        raise WeightError("has calibration inputs that are NaN or infinite; calibrate again in bfloat16 or float32")
    return (measured / measured.mean().clamp_min(1e-30)).clamp_min(LEAST_IMPORTANCE).float()
