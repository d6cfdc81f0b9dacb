"""The search for one signed scale: ``x ~ scale * value``, the values whole numbers or a codebook, least weighted squared error.

As in llama.cpp's ``make_qx_quants`` and ``quantize_row_iq4_nl_impl`` (ggml-quants.c), trial scales put a group's weight of
largest magnitude near the lowest value, and for given codes the best scale is ``sum w x v / sum w v v``; it leaves an error of
``sum w x x - (sum w x v)^2 / sum w v v``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from lowbit_formats.ggml.weighted_groups import LEAST, WeightedGroups, group_extremes, reciprocal


class Values(Protocol):
    """The values that codes stand for."""

    def nearest(self, groups: WeightedGroups, inverse: Tensor) -> None:
        """Set ``groups.codes`` to the values nearest to ``x * inverse``, inverse (groups,)."""


class WholeNumbers:
    """The values lowest to highest."""

    def __init__(self, lowest: int, highest: int) -> None:
        self._lowest, self._highest = lowest, highest

    @classmethod
    def signed(cls, bits: int) -> WholeNumbers:
        """Return two's complement's values, -2**(bits - 1) to 2**(bits - 1) - 1."""
        half = 1 << bits - 1
        return cls(-half, half - 1)

    def nearest(self, groups: WeightedGroups, inverse: Tensor) -> None:
        """Round and clamp."""
        torch.mul(groups.x, inverse.unsqueeze(1), out=groups.codes).round_().clamp_(self._lowest, self._highest)


class Codebook:
    """Ascending whole numbers: twice a midpoint is whole, so floor(2 x) tells the nearest value; the upper one of two."""

    def __init__(self, values: Sequence[int]) -> None:
        doubled = [low + high for low, high in pairwise(values)]  # twice the midpoints
        self._shift, self._slots = 1 - doubled[0], doubled[-1] - doubled[0] + 1  # slot 0: below every midpoint
        slots = torch.arange(self._slots + 1) - self._shift
        self._codes = (slots[:, None] >= torch.tensor(doubled)).sum(1).to(torch.uint8)
        self._values = torch.tensor(values, dtype=torch.float32).index_select(0, self._codes.int())

    def nearest(self, groups: WeightedGroups, inverse: Tensor) -> None:
        """Look the values up."""
        torch.index_select(self._values, 0, self._slot(groups, inverse), out=groups.codes.view(-1))

    def codes(self, groups: WeightedGroups, inverse: Tensor) -> Tensor:
        """Return the codes uint8 (groups, size) nearest to ``x * inverse``."""
        return self._codes.index_select(0, self._slot(groups, inverse)).view(groups.x.shape)

    def _slot(self, groups: WeightedGroups, inverse: Tensor) -> Tensor:
        doubled = torch.mul(groups.x, (2 * inverse).unsqueeze(1), out=groups.codes)
        return doubled.add_(self._shift).clamp_(0, self._slots).to(torch.int32).view(-1)


def search_scale(groups: WeightedGroups, values: Values, targets: Sequence[float], refinements: int) -> Tensor:
    """Return the signed scales (groups,) of least weighted squared error among the trials.

    Args:
        groups: The weights.
        values: The values that codes stand for.
        targets: Trial scales put the group's weight of largest magnitude at each of these.
        refinements: How often the best scale is encoded again.
    """
    inverse_extremes = reciprocal(group_extremes(groups.x))
    best = torch.zeros_like(inverse_extremes)
    most = torch.zeros_like(best)
    for target in targets:
        values.nearest(groups, target * inverse_extremes)
        best, most = _better(groups, best, most)
    for _ in range(refinements):
        values.nearest(groups, reciprocal(best))
        best, most = _better(groups, best, most)
    return best


def _better(groups: WeightedGroups, best: Tensor, most: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scale and gain of the codes in ``groups`` where they gain more, else those given."""
    vv, xv = groups.symmetric_sums()
    scale = xv / vv.clamp_min_(LEAST)  # both are 0 where all values are
    gain = scale * xv
    better = gain > most
    return torch.where(better, scale, best), torch.where(better, gain, most)
