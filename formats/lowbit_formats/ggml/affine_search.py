"""The search for a scale and a minimum: ``x ~ scale * q + minimum`` with codes ``q = 0..highest``, least weighted squared error.

As in llama.cpp's ``make_qkx2_quants`` and ``make_qkx3_quants`` (ggml-quants.c), several trial scales give codes, and for given
codes the best scale and minimum follow from two linear equations. With these the error is

    sum w (x - s q - m)^2  =  sum w x x - gain,        gain = s sum w x q + m sum w x

so a trial needs three sums and no second pass over the weights. llama.cpp tries 16 to 37 scales; fewer, each of the best then
refined by encoding again with its own solution, reach a lower error sooner (``bench/test_ggml.py``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowbit_formats.ggml.weighted_groups import CodeSums, WeightedGroups, quotient, reciprocal


def search_affine(
    groups: WeightedGroups, highest: int, spans: Sequence[float], refinements: int, positive_minimum: bool = False
) -> tuple[Tensor, Tensor]:
    """Return scales >= 0 and minimums (groups,) of least weighted squared error among the trials.

    Args:
        groups: The weights.
        highest: The highest code.
        spans: Trial scales are ``(max - min) / span``, max and min those of the group.
        refinements: How often the best solution is encoded again.
        positive_minimum: Whether a minimum may be above zero; K-quants store its negative without a sign.
    """
    low, high = groups.x.amin(1), groups.x.amax(1)
    if not positive_minimum:
        low.clamp_max_(0)
    best = _Best((high - low) / highest, low)
    inverse = reciprocal(high - low)
    shifted = groups.x - low.unsqueeze(1)
    for span in spans:
        torch.mul(shifted, (span * inverse).unsqueeze(1), out=groups.codes).round_()
        if span >= highest + 0.5:
            groups.codes.clamp_max_(highest)
        best.offer(*solve_affine(groups, groups.sums(), positive_minimum))
    for _ in range(refinements):
        groups.encode(best.scale, best.minimum, 0, highest)
        best.offer(*solve_affine(groups, groups.sums(), positive_minimum))
    return best.scale, best.minimum


def solve_affine(groups: WeightedGroups, sums: CodeSums, positive_minimum: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the best scale and minimum for given codes, and what they gain over the error of zeros.

    The gain is 0 where all codes of a group are equal: such codes leave the scale open.
    """
    determinant = groups.sum_w * sums.qq - sums.q * sums.q
    scale = quotient(groups.sum_w * sums.xq - groups.sum_wx * sums.q, determinant)
    minimum = quotient(sums.qq * groups.sum_wx - sums.q * sums.xq, determinant)
    if not positive_minimum:
        above = minimum > 0
        scale = torch.where(above, quotient(sums.xq, sums.qq), scale)
        minimum.masked_fill_(above, 0)
    return scale, minimum, scale * sums.xq + minimum * groups.sum_wx


class _Best:
    """The best trial so far of every group."""

    def __init__(self, scale: Tensor, minimum: Tensor) -> None:
        self.scale, self.minimum = scale, minimum
        self._gain = torch.zeros_like(scale)

    def offer(self, scale: Tensor, minimum: Tensor, gain: Tensor) -> None:
        """Keep the trial where it gains more."""
        better = (gain > self._gain) & (scale > 0)
        self.scale = torch.where(better, scale, self.scale)
        self.minimum = torch.where(better, minimum, self.minimum)
        self._gain = torch.where(better, gain, self._gain)
