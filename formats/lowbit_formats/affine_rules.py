"""What the layouts of integer codes with a scale for each group share: which schemes they hold, and how zeros become codes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.errors import WeightError
from lowbit.scheme import Grid, Scheme, Zero

HALVES = ("float16", "bfloat16")


@dataclass(frozen=True, slots=True)
class AffineRules:
    """The schemes that a layout holds: ``w = scale * (code - zero)``, one scale and one zero for each group of a row.

    Attributes:
        owner: How refusals name the layout.
        bits: Widths of a code.
        zeros: Where the zero may be.
        scales: Dtypes of scales.
        permutation: Whether each column may name its group (act-order).
        elsewhere: What refused zeros can do instead.
    """

    owner: str
    bits: tuple[int, ...]
    zeros: tuple[Zero, ...] = (Zero.SYMMETRIC, Zero.INTEGER)
    scales: tuple[str, ...] = HALVES
    permutation: bool = False
    elsewhere: str = "the layout 'plain' holds it"

    def why_not(self, scheme: Scheme) -> str | None:
        """Return None when the layout holds the scheme, whatever the shape, else the reason."""
        if scheme.grid is not Grid.AFFINE:
            return f"{self.owner} holds affine codes, not {scheme.grid.value} ones; choose the format 'native'"
        if scheme.bits not in self.bits:
            widths = ", ".join(map(str, self.bits))
            return f"{self.owner} has codes of {widths} bits, not {scheme.bits}; choose another width or format"
        return self._why_not_addons(scheme) or self._why_not_groups(scheme)

    def _why_not_addons(self, scheme: Scheme) -> str | None:
        extras = {
            "outliers": scheme.outliers is not None,
            "a rotation": scheme.rotation is not None,
            "flat groups": scheme.flat,
            f"only {scheme.levels} levels": scheme.levels is not None,
        }
        for extra, present in extras.items():
            if present:
                return f"{self.owner} has no place for {extra}; choose the format 'native'"
        if scheme.permutation and not self.permutation:
            return f"{self.owner} has no place for a permutation (act-order); the format 'gptq' stores it as g_idx"
        return None

    def _why_not_groups(self, scheme: Scheme) -> str | None:
        if scheme.zero not in self.zeros:
            kinds = " or ".join(zero.value for zero in self.zeros)
            return f"{self.owner} has {kinds} zeros, not {scheme.zero.value} ones; {self.elsewhere}"
        if scheme.scales.two_level:
            return f"{self.owner} has one float scale for each group, not scales in two levels; choose a GGUF K-type"
        if scheme.scales.dtype not in self.scales:
            return f"{self.owner} has {' or '.join(self.scales)} scales, not {scheme.scales.dtype}"
        return None


def zero_codes(zeros: Tensor, bits: int) -> Tensor:
    """Return integer zeros (rows, groups) as uint8 codes; raise WeightError for one outside 0 .. 2**bits - 1."""
    lowest, highest = (int(extreme) for extreme in zeros.aminmax()) if zeros.numel() else (0, 0)
    if lowest < 0 or highest >> bits:
        wrong = lowest if lowest < 0 else highest
        raise WeightError(
            f"a zero point is {wrong}, and {bits} bits store 0 to {2**bits - 1}; choose the format 'native'"
        )
    return zeros.to(torch.uint8)


def sequential_index(columns: int, group_size: int | None) -> Tensor:
    """Return the group of each column without a permutation: int32 (in,), ``i // group_size``."""
    return torch.arange(columns, dtype=torch.int32) // (group_size or columns)


def is_sequential(index: Tensor, group_size: int | None) -> bool:
    """Whether the groups of columns, int32 (in,), are those without a permutation."""
    return torch.equal(index, sequential_index(len(index), group_size).to(index.device))
