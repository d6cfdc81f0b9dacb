"""The two-level schemes of GGUF's K-quants, and how a float scale becomes an integer under a float16 one.

    Q2_K  2 bits  groups of 16, minimum     scales and minimums of 4 bits, a float16 for 16 groups
    Q3_K  3 bits  groups of 16, symmetric   signed scales of 6 bits, 16 groups
    Q4_K  4 bits  groups of 32, minimum     6 bits, 8 groups
    Q5_K  5 bits  groups of 32, minimum     6 bits, 8 groups
    Q6_K  6 bits  groups of 16, symmetric   signed scales of 8 bits, 16 groups

(ggml-common.h of llama.cpp; one super-group is 256 weights.) A minimum is added, is never above zero, and is stored as
``-dmin * unit``; a scale that is not signed is never below zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from lowbit.scheme import Grid, ScaleFormat, Scheme, Zero
from lowbit_autoround.storage import store

SUPER_WEIGHTS = 256


def _scheme(bits: int, group_size: int, scale_bits: int, symmetric: bool) -> Scheme:
    zero = Zero.SYMMETRIC if symmetric else Zero.MINIMUM
    scales = ScaleFormat("float16", bits=scale_bits, super_group=SUPER_WEIGHTS // group_size, signed=symmetric)
    return Scheme(Grid.AFFINE, bits, group_size, zero, scales)


K_SCHEMES: Mapping[int, Scheme] = MappingProxyType(
    {
        2: _scheme(2, 16, 4, symmetric=False),
        3: _scheme(3, 16, 6, symmetric=True),
        4: _scheme(4, 32, 6, symmetric=False),
        5: _scheme(5, 32, 6, symmetric=False),
        6: _scheme(6, 16, 8, symmetric=True),
    }
)
"""The scheme of each number of bits."""


class Units:
    """Multiples of one float16 step for every super-group of a row; steps stay, multiples follow the values.

    The extreme of each super-group lands on the end of the range: the largest unit, or the most negative one where units are
    signed, so that all of them are used.

    Args:
        values: float32 (rows, groups): what the multiples shall be near to. Not signed: all of one sign.
        bits: Bits of a unit.
        super_group: Groups that share a step; the last super-group of a row may be short.
        signed: Whether units are -2^(bits-1) to 2^(bits-1) - 1 rather than 0 to 2^bits - 1.
        what: The word for the values in errors.

    Raises WeightError when a step is beyond float16.
    """

    def __init__(self, values: Tensor, bits: int, super_group: int, signed: bool, what: str) -> None:
        self._groups, self._super_group = values.shape[1], super_group
        self._dtype = torch.int8 if signed else torch.uint8
        self._low = -(2 ** (bits - 1)) if signed else 0
        self._high = self._low + 2**bits - 1
        end = self._low if signed else self._high
        self.steps = store(self._extremes(values) / end, torch.float16, what)
        spread = self.steps.float().repeat_interleave(super_group, dim=1)[:, : self._groups]
        self._spread, self._divisor = spread, spread.masked_fill(spread == 0, 1.0)

    def units(self, values: Tensor) -> Tensor:
        """Return the multiples nearest to ``values``, int8 or uint8 (rows, groups)."""
        return (values / self._divisor).round_().clamp_(self._low, self._high).to(self._dtype)

    def decode(self, units: Tensor) -> Tensor:
        """Return units times steps in float32, as ``lowbit.grids.decode_scales`` does."""
        return units.float() * self._spread

    def _extremes(self, values: Tensor) -> Tensor:
        missing = -values.shape[1] % self._super_group
        blocks = torch.nn.functional.pad(values, (0, missing)).view(len(values), -1, self._super_group)
        low, high = blocks.amin(-1), blocks.amax(-1)
        return torch.where(high >= -low, high, low)
