"""How much the error of each weight counts: llama.cpp's weightings (ggml-quants.c), one for each family of types.

Without calibration, large weights count more, since they are few and carry much of the output. With an importance matrix the
error of a weight counts as its input's mean square times ``sqrt(mean x x + x x)`` over a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEAST_IMPORTANCE = 1e-4
"""Of the mean: an input that calibration never saw may still occur."""


def relative_importance(importance: Tensor) -> Tensor:
    """Return importance (in,) relative to its mean, float32 and positive, so that sums stay in float32's range."""
    mean = importance.double().mean()
    if mean <= 0:
        return torch.ones_like(importance, dtype=torch.float32)
    return (importance.double() / mean).clamp_min(LEAST_IMPORTANCE).float()


def spread_weighting(groups: Tensor) -> Tensor:
    """Return ``rms + |x|`` for groups (groups, size), the root mean square being the group's."""
    rms = torch.linalg.vector_norm(groups, dim=1, keepdim=True) * groups.shape[1] ** -0.5
    return groups.abs().add_(rms)


def calibrated_weighting(x: Tensor, importance: Tensor, block: int) -> Tensor:
    """Return ``importance * sqrt(mean x x + x x)`` for x (rows, columns), the mean over blocks of ``block`` weights."""
    blocks = x.view(len(x), -1, block)
    squares = blocks.square()
    squares.add_(squares.mean(2, keepdim=True).mul_(2)).sqrt_()
    return squares.view(x.shape).mul_(importance)
