"""Groups of weights with a weighting, and the sums that every search needs.

All arrays are float32. A piece of a weight is viewed as ``(groups, size)``; what belongs to a group is ``(groups,)``. Codes are
kept as whole float32 numbers until they are final. Sums over a group are the only reductions, so that results do not depend
on how a weight is cut into pieces or on the number of threads. Every pass over a piece costs about 0.15 ns a weight on one
core (AMD EPYC, 2026-11-21, torch 2.13, pieces of 2**18 that stay in cache), which is why operations write into two scratch
arrays instead of making new ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit_formats.ggml.scratch import SCRATCH

LEAST = 2.0**-126
"""Smallest normal float32: the reciprocal of anything smaller may be infinite."""


@dataclass(frozen=True, slots=True)
class CodeSums:
    """Weighted sums over the codes ``q`` of each group: of ``w q``, ``w q q`` and ``w x q``."""

    q: Tensor
    qq: Tensor
    xq: Tensor


class WeightedGroups:
    """Weights ``x`` (groups, size) and how much the square of each one's error counts.

    Attributes:
        x: The weights; not written to.
        w: Positive factors of the squared errors, same shape.
        wx: ``w * x``.
        sum_w, sum_wx: Their sums over each group.
        codes: Scratch for codes.
    """

    def __init__(self, x: Tensor, w: Tensor) -> None:
        self.x, self.w, self.wx = x, w, w * x
        self.sum_w, self.sum_wx = w.sum(1), self.wx.sum(1)
        self.codes = torch.empty_like(x)
        self._room = torch.empty_like(x)

    def encode(self, scale: Tensor, minimum: Tensor | None, lowest: int, highest: int) -> None:
        """Set ``codes`` to the nearest of ``(x - minimum) / scale``; to the one nearest 0 where the scale vanishes."""
        inverse = reciprocal(scale).unsqueeze(1)
        if minimum is None:
            torch.mul(self.x, inverse, out=self.codes)
        else:
            torch.sub(self.x, minimum.unsqueeze(1), out=self.codes).mul_(inverse)
        self.codes.round_().clamp_(lowest, highest)

    def sums(self) -> CodeSums:
        """Return the sums over ``codes``."""
        room = torch.mul(self.w, self.codes, out=self._room)
        q = room.sum(1)
        qq = room.mul_(self.codes).sum(1)
        return CodeSums(q, qq, torch.mul(self.wx, self.codes, out=room).sum(1))

    def symmetric_sums(self) -> tuple[Tensor, Tensor]:
        """Return the sums of ``w q q`` and ``w x q`` over ``codes``."""
        room = torch.mul(self.w, self.codes, out=self._room)
        qq = room.mul_(self.codes).sum(1)
        return qq, torch.mul(self.wx, self.codes, out=room).sum(1)


def reciprocal(values: Tensor) -> Tensor:
    """Return 1 / values, and 0 where a value is 0 or so small that it has no finite reciprocal."""
    return values.reciprocal().masked_fill_(values.abs() < LEAST, 0)


def quotient(above: Tensor, below: Tensor) -> Tensor:
    """Return above / below for below >= 0, and 0 where below vanishes."""
    return (above / below.clamp_min(LEAST)).masked_fill_(below < LEAST, 0)


def group_extremes(groups: Tensor) -> Tensor:
    """Return the weight of largest magnitude of each group with its sign, the first of several: (groups, size) to (groups,)."""
    return extremes_and_negated(groups)[0]


def extremes_and_negated(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``group_extremes``, and the negated groups in the scratch room ``values``.

    The bits of floats, read as whole numbers, order positive ones rightly and stay below zero for the others; they are compared
    twice as fast. A group without a positive weight has some ``high`` that is not above zero.
    """
    negated = torch.neg(groups, out=SCRATCH.room("values", groups))
    high, depth = (values.view(torch.int32).amax(1).view(torch.float32) for values in (groups, negated))
    lead = high - depth
    extremes = torch.maximum(high, depth).copysign_(lead)
    if int(lead.count_nonzero()) < len(lead):
        tied = (lead == 0).nonzero().squeeze(1)
        first = groups[tied].abs().argmax(1, keepdim=True)
        extremes[tied] = groups[tied].gather(1, first).squeeze(1) + 0.0  # -0 + 0 is 0
    return extremes, negated
