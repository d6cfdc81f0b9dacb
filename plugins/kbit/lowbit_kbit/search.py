"""Searched scales: the scale with the least squared error among many candidates, each refitted in closed form.

For codes q of a group w the best scale is s = <hq, w> / <hq, q>, and the error that remains is <hw, w> - <hq, w>^2 / <hq, q>
(h: importance of each column, or 1). So the candidate with the largest <hq, w>^2 / <hq, q> wins. For each group, in float32 and
with ``tree_sum`` for every sum (``lowbit_kbit.arithmetic`` says what that fixes):

    u = w * (1 / extreme)                                      largest magnitude 1; 0 for a group of zeros
    for candidate f, in order:  q = nearest entry of u * (1/f), 1/f rounded to float32
                                a = sum((q*h) * u)   b = sum((q*h) * q)   score = a * a / b   s = a / b
    keep s of the first candidate with the largest score; then REFITS times: q = nearest entry of u * (1/s), and keep the
    new a / b where its score is larger
    scale = extreme * s, kept within the scale's dtype

The candidates are 1, so that no group does worse than with its absmax, then f_i = LOWEST[k] * (HIGHEST / LOWEST[k])^(i / (n-1)). A
codebook that is not its own mirror image is tried with -f_i as well (after all f_i), with the signed absmax as the extreme: a
group then chooses which side of the codebook its tail falls on, for free, as the stored scale has a sign anyway. With a learned
codebook on Gaussian weights that is worth 3 to 10 % of the squared error (README, measured).
"""

from __future__ import annotations

from types import MappingProxyType

import torch
from torch import Tensor

from lowbit_kbit.arithmetic import reciprocals, store, tree_sum
from lowbit_kbit.codebooks import is_antisymmetric
from lowbit_kbit.encoders import Buffers, Encoder

LOWEST = MappingProxyType({2: 0.2, 3: 0.3, 4: 0.5, 5: 0.7, 6: 0.85, 7: 0.9, 8: 0.95})
"""Smallest candidate by bits, relative to the absmax: below the best scale of 98 in 100 groups of 32 and 128 weights, Gaussian and
Student-t with 4 degrees of freedom (2, 3, 4, 6 and 8 bits measured 2026-11-21). Least squares and the refits reach further down."""
HIGHEST = 1.2
REFITS = 2


def candidate_factors(encoder: Encoder, count: int) -> list[float]:
    """Return the factors f that ``search`` tries, relative to a group's extreme."""
    low = LOWEST[(len(encoder.codebook) - 1).bit_length()]
    factors = [low * (HIGHEST / low) ** (index / (count - 1)) for index in range(count)]
    return [1.0, *factors] if is_antisymmetric(encoder.codebook) else [1.0, *factors, *(-factor for factor in factors)]


def search_scales(
    groups: Tensor,
    extremes: Tensor,
    encoder: Encoder,
    factors: list[float],
    dtype: torch.dtype,
    importance: Tensor | None = None,
) -> Tensor:
    """Return the scale of least error for each group, stored in ``dtype``: (rows, groups).

    Args:
        groups: float32 (rows, groups, size).
        extremes: float32 (rows, groups), finite: the absmax, or the signed absmax.
        encoder: The codebook.
        factors: What to try, relative to the extremes.
        dtype: How scales are stored; it can hold the extremes.
        importance: float32 (1, groups, size) or (rows, groups, size), or None for 1.
    """
    unit = (groups * reciprocals(extremes)[..., None]).permute(2, 0, 1).contiguous()  # (size, rows, groups)
    weights = None if importance is None else importance.permute(2, 0, 1).contiguous()
    best, best_score = torch.ones_like(extremes), torch.zeros_like(extremes)
    buffers = Buffers(unit.shape, unit.device)
    for factor in factors:
        entries = encoder.nearest(torch.mul(unit, 1 / factor, out=buffers.x), buffers)
        _keep_better(best, best_score, *_refit(unit, entries, weights, buffers))
    for _ in range(REFITS):
        entries = encoder.nearest(torch.mul(unit, reciprocals(best), out=buffers.x), buffers)
        _keep_better(best, best_score, *_refit(unit, entries, weights, buffers))
    largest = torch.finfo(dtype).max
    return store((extremes * best).clamp_(-largest, largest), dtype)


def _refit(unit: Tensor, entries: Tensor, weights: Tensor | None, buffers: Buffers) -> tuple[Tensor, Tensor]:
    """Return the least-squares scale and its score; NaN where no entry is other than 0."""
    weighted = entries if weights is None else torch.mul(entries, weights, out=buffers.edge)
    along = tree_sum(torch.mul(weighted, unit, out=buffers.product)).clone()
    energy = tree_sum(torch.mul(weighted, entries, out=buffers.product))
    return along / energy, along * along / energy


def _keep_better(best: Tensor, best_score: Tensor, scale: Tensor, score: Tensor) -> None:
    better = score > best_score  # false for NaN
    best[better] = scale[better]
    best_score[better] = score[better]
