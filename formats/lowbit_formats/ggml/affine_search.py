"""The search for a scale and a minimum: ``x ~ s q + m`` with codes ``q = 0..highest``, least weighted squared error.

As in llama.cpp's ``make_qkx2_quants`` and ``make_qkx3_quants`` (ggml-quants.c), several trial scales give codes, and for given
codes the best scale and minimum solve two linear equations. Their error needs no second pass over the weights::

    sum w (x - s q - m)^2  =  sum w x x - gain,      gain = s s sum w q q + m (2 sum w x - m sum w)

for the best scale that belongs to m. llama.cpp tries 16 to 37 scales; fewer over a wider range, the best of them encoded
again with its own solution, reach a lower error sooner (``bench/test_ggml.py``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowbit_formats.ggml.weighted_groups import LEAST, WeightedGroups, reciprocal


def search_affine(
    groups: WeightedGroups, highest: int, spans: Sequence[float], refinements: int, above_zero: bool = False
) -> tuple[Tensor, Tensor]:
    """Return scales and minimums (groups,) of least weighted squared error among the trials.

    Args:
        groups: The weights.
        highest: The highest code.
        spans: Trial scales are ``(max - min) / span``, max and min those of the group.
        refinements: How often the best solution is encoded again.
        above_zero: Whether a minimum may be above zero; K-quants store its negative without a sign.
    """
    low, high = groups.x.amin(1), groups.x.amax(1)
    if not above_zero:
        low.clamp_max_(0)
    search = _Search(groups, (high - low) / highest, low, above_zero)
    inverse = reciprocal(high - low)
    shifted = groups.x - low.unsqueeze(1)
    for span in (highest, *spans):  # the range itself first, so that no group ends worse than rounding over it
        torch.mul(shifted, (span * inverse).unsqueeze(1), out=groups.codes).round_()
        if span >= highest + 0.5:
            groups.codes.clamp_max_(highest)
        search.solve()
    for _ in range(refinements):
        groups.encode(search.scale, search.minimum, 0, highest)
        search.solve()
    return search.scale, search.minimum


class _Search:
    """The best scale and minimum so far of every group."""

    def __init__(self, groups: WeightedGroups, scale: Tensor, minimum: Tensor, above_zero: bool) -> None:
        self.scale, self.minimum = scale, minimum
        self._groups, self._above_zero = groups, above_zero
        self._gain = torch.zeros_like(scale)
        self._twice_wx = 2 * groups.sum_wx

    def solve(self) -> None:
        """Find the best scale and minimum for the codes in ``groups``; keep them where they gain more.

        Equal codes leave the two open: the determinant is zero or what rounding left of it, and the minimum NaN, infinite or
        anything. The gain is computed for this very minimum, so it is NaN or low then, and nothing is kept.
        """
        groups, sums = self._groups, self._groups.sums()
        determinant = (groups.sum_w * sums.qq).sub_(sums.q * sums.q)
        minimum = (sums.qq * groups.sum_wx).sub_(sums.q * sums.xq).div_(determinant)
        if not self._above_zero:
            minimum.clamp_max_(0)
        scale = (sums.xq - minimum * sums.q).div_(sums.qq.clamp_min(LEAST))
        gain = (scale * scale).mul_(sums.qq).add_((self._twice_wx - minimum * groups.sum_w).mul_(minimum))
        better = gain > self._gain
        self.scale = torch.where(better, scale, self.scale)
        self.minimum = torch.where(better, minimum, self.minimum)
        self._gain = torch.where(better, gain, self._gain)
