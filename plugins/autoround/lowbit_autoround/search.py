"""Searched scales: the parameters of least squared error among many candidates, each refitted in closed form.

AutoRound's ``search_scales`` (SignRoundV2, opt-RTN) tries 181 or 201 scales around the full-range one, of its sign only. These
searches cover the same grids with fewer candidates: spaced by ratio, since the error changes with the ratio; each followed by
the least-squares parameters for its codes; and up to 3 bits, for symmetric grids, of both signs, because the side with one
value more need not be that of the extreme (from 4 bits on that gains nothing, measured). With 27 + 2 candidates the error is
AutoRound's within 0.1 % from 4 bits on, and lower below: at 2 bits by 1 to 4 % on Gaussian and up to 11 % on heavy-tailed
weights (README, measured).

``importance`` h weights the error of each column; it is 1 when None. Every sum runs along the contiguous last dimension, in one
thread, so results do not depend on the number of threads. Groups are brought to unit range first, so no square overflows.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import MappingProxyType

import torch
from torch import Tensor

LOWEST = MappingProxyType({1: 0.2, 2: 0.2, 3: 0.3, 4: 0.5, 5: 0.7, 6: 0.85, 7: 0.9, 8: 0.95})
"""Smallest candidate by bits, relative to the plain range: below the best of 98 in 100 groups of 32 and 128 weights on a uniform
grid, Gaussian and Student-t with 4 degrees of freedom (2, 3, 4, 6 and 8 bits measured 2026-11-21)."""
HIGHEST = 1.2
SCALE_CANDIDATES = 26
END_CANDIDATES = 7
REFITS = 2


class _Buffers:
    """Memory that a search reuses for every candidate: pages asked anew each time fault, and cost more than the arithmetic."""

    def __init__(self, like: Tensor) -> None:
        self.steps = torch.empty_like(like)
        self.weighted = torch.empty_like(like)
        self.product = torch.empty_like(like)


def search_symmetric(groups: Tensor, extremes: Tensor, bits: int, importance: Tensor | None) -> Tensor:
    """Return float32 signed scales (rows, groups) for w = scale * q, -2^(b-1) <= q < 2^(b-1).

    Args:
        groups: float32 (rows, groups, size).
        extremes: The element of largest magnitude of each group, finite.
        bits: Bits of a code.
        importance: float32 (groups, size), or None.
    """
    half = 2 ** (bits - 1)
    unit = groups * _reciprocal(-extremes)[..., None]  # the extreme is -1, and so is its code's value at scale 1 / half
    best, best_score = torch.full_like(extremes, 1 / half), torch.zeros_like(extremes)
    buffers = _Buffers(unit)

    def consider(inverse: Tensor | float) -> None:
        steps = torch.mul(unit, inverse, out=buffers.steps).round_().clamp_(-half, half - 1)
        scale, score = _fit_scale(unit, steps, importance, buffers)
        better = score > best_score
        _keep(better, (best, scale), (best_score, score))

    for factor in _signed_factors(bits):
        consider(half / factor)
    for _ in range(REFITS):
        consider(_reciprocal(best)[..., None])
    return best * -extremes


def search_integer(
    groups: Tensor, low: Tensor, high: Tensor, bits: int, importance: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return float32 scales and whole zeros (rows, groups) for w = scale * (q - zero), 0 <= q, zero < 2^b.

    Both ends of the range [low, high], which holds 0, move on their own: END_CANDIDATES squared pairs.
    """
    last, width = 2**bits - 1, high - low
    unit, low = groups * _reciprocal(width)[..., None], low * _reciprocal(width)
    high = low + 1
    best, best_score = torch.full_like(low, 1 / last), torch.zeros_like(low)
    best_zero = (-low * last).round_()
    buffers = _Buffers(unit)

    def consider(step: Tensor, zero: Tensor) -> None:
        steps = torch.mul(unit, _reciprocal(step)[..., None], out=buffers.steps).round_()
        shift = zero[..., None]
        steps.add_(shift).clamp_(0, last).sub_(shift)
        scale, score = _fit_scale(unit, steps, importance, buffers)
        better = (score > best_score) & (scale > 0)
        _keep(better, (best, scale), (best_zero, zero), (best_score, score))

    for down, up in _end_pairs(bits):
        step = (up * high - down * low) / last
        consider(step, (-down * low * _reciprocal(step)).round_().clamp_(0, last))
    for _ in range(REFITS):
        consider(best.clone(), best_zero.clone())
    return best * width, best_zero


def search_minimum(
    groups: Tensor, low: Tensor, high: Tensor, bits: int, importance: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return float32 scales and minimums (rows, groups) for w = scale * q + minimum, 0 <= q < 2^b.

    Both ends of the range move on their own about its middle: END_CANDIDATES squared pairs, each refitted in two unknowns.
    """
    last, width, middle = 2**bits - 1, high - low, low + (high - low) / 2
    unit = (groups - middle[..., None]).mul_(_reciprocal(width)[..., None])  # within [-0.5, 0.5]
    best, best_score = torch.full_like(low, 1 / last), torch.zeros_like(low)
    best_minimum = torch.full_like(low, -0.5)
    buffers = _Buffers(unit)

    def consider(step: Tensor | float, start: Tensor | float) -> None:
        steps = torch.sub(unit, _column(start), out=buffers.steps).div_(_column(step)).round_().clamp_(0, last)
        scale, minimum, score = _fit_line(unit, steps, importance, buffers)
        better = (score > best_score) & (scale > 0)
        _keep(better, (best, scale), (best_minimum, minimum), (best_score, score))

    for down, up in _end_pairs(bits):
        consider((up + down) / 2 / last, -down / 2)
    for _ in range(REFITS):
        consider(best.clone(), best_minimum.clone())
    return best * width, best_minimum * width + middle


def _factors(bits: int, count: int) -> Iterator[float]:
    low = LOWEST[bits]
    return (low * (HIGHEST / low) ** (index / (count - 1)) for index in range(count))


def _signed_factors(bits: int) -> list[float]:
    if bits > 3:
        return [1.0, *_factors(bits, SCALE_CANDIDATES)]
    factors = list(_factors(bits, SCALE_CANDIDATES // 2))
    return [1.0, *factors, *(-factor for factor in factors)]


def _end_pairs(bits: int) -> list[tuple[float, float]]:
    factors = list(_factors(bits, END_CANDIDATES))
    return [(1.0, 1.0), *((down, up) for down in factors for up in factors)]


def _fit_scale(unit: Tensor, steps: Tensor, importance: Tensor | None, buffers: _Buffers) -> tuple[Tensor, Tensor]:
    """Return the scale of least error for w = scale * steps, <hq, w> / <hq, q>, and how much of <hw, w> it explains."""
    weighted = steps if importance is None else torch.mul(steps, importance, out=buffers.weighted)
    along = torch.mul(weighted, unit, out=buffers.product).sum(-1)
    energy = torch.mul(weighted, steps, out=buffers.product).sum(-1)
    return along / energy, along * along / energy


def _fit_line(
    unit: Tensor, steps: Tensor, importance: Tensor | None, buffers: _Buffers
) -> tuple[Tensor, Tensor, Tensor]:
    """Return scale and minimum of least error for w = scale * steps + minimum, and how much of <hw, w> they explain.

    The normal equations of weighted linear regression; NaN where all steps are equal.
    """
    weighted, total = steps, unit.sum(-1)
    mass = torch.full_like(total, unit.shape[-1])
    if importance is not None:
        weighted = torch.mul(steps, importance, out=buffers.weighted)
        mass, total = importance.sum(-1), torch.mul(unit, importance, out=buffers.product).sum(-1)
    count = weighted.sum(-1)
    along = torch.mul(weighted, unit, out=buffers.product).sum(-1)
    energy = torch.mul(weighted, steps, out=buffers.product).sum(-1)
    scale = (mass * along - count * total) / (mass * energy - count * count)
    minimum = (total - scale * count) / mass
    return scale, minimum, scale * along + minimum * total


def _keep(better: Tensor, *found: tuple[Tensor, Tensor]) -> None:
    """Write the second of each pair to the first where it is ``better``; an assignment by a mask would wait for a GPU to count it."""
    for best, values in found:
        torch.where(better, values, best, out=best)


def _column(value: Tensor | float) -> Tensor | float:
    return value[..., None] if isinstance(value, Tensor) else value


def _reciprocal(values: Tensor) -> Tensor:
    """Return 1 / values, and 0 where that is infinite: groups of zeros, and of weights too small to be normal."""
    return values.reciprocal().nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
