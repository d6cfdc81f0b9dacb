"""The importance of a weight's input columns, as searches weigh their errors by it."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.errors import WeightError
from lowbit.interfaces import Calibration

LEAST_IMPORTANCE = 1e-4  # of the mean: an input that calibration never saw may still occur


def relative_importance(calibration: Calibration | None, weight: Tensor, hessian: bool = False) -> Tensor | None:
    """Return the importance of each column relative to the mean, float32 (in,) on the weight's device, if it was measured.

    With ``hessian`` the diagonal of a Hessian serves where there is no importance. Raises WeightError when it is NaN or infinite.
    """
    measured = calibration.importance if calibration else None
    if measured is None and hessian and calibration is not None and calibration.hessian is not None:
        measured = calibration.hessian.diagonal()
    if measured is None:
        return None
    measured = measured.to(weight.device, torch.float64)
    assert measured.shape == weight.shape[1:], (measured.shape, weight.shape)
    if not bool(torch.isfinite(measured).all()):
        raise WeightError("has calibration inputs that are NaN or infinite; calibrate again in bfloat16 or float32")
    return (measured / measured.mean().clamp_min(1e-30)).clamp_min(LEAST_IMPORTANCE).float()
