"""Which columns of a weight the columns of its units hold: the same ones, or others, and then rows of x are gathered to match.

Units hold groups of 16, 32, 64, 128 or 256 columns. Three things need another order than the weight's own:

    act-order          columns of a group lie anywhere: they are put side by side
    groups of 16       a fragment of ``unit.cuh`` takes four columns here and four there out of 32: they change places within the 32
    other group sizes  (24, 100, ...) a group is filled up to a multiple of 16; what is filled up with meets an x of 0
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit_cuda.units import COLUMNS, GROUP_SIZES

SMALLEST_GROUP = 16
"""Smaller groups would be filled up to this, at more than the price of wider codes."""


def why_not_groups(group_size: int | None) -> str | None:
    """Return None when units can hold groups of ``group_size`` (None: the whole row), else the reason."""
    if group_size is not None and group_size < SMALLEST_GROUP:
        return f"takes groups of {SMALLEST_GROUP} columns or more, not of {group_size}"
    return None


def unit_group(group_size: int | None, columns: int) -> int:
    """Return how many columns of a unit share a scale: of the sizes that fill up groups least, the largest."""
    if group_size is None or group_size >= columns:
        return COLUMNS
    return min(reversed(GROUP_SIZES), key=lambda size: -(-group_size // size) * size)


@dataclass(frozen=True, slots=True, eq=False)
class ColumnOrder:
    """Where the columns and groups of a weight lie in its units.

    Attributes:
        groups: int64 (groups of the units in a row,): the weight's group of each.
        source: int64 (columns of the units,): the weight's column of each, ``columns`` where there is none; None: each its own.
    """

    groups: Tensor
    source: Tensor | None = None


def natural(group_size: int | None, columns: int, permuted: bool) -> bool:
    """Return whether units hold the columns in the weight's own order."""
    if columns % 8:  # rows of x are read 16 bytes at a time
        return False
    if group_size is None or group_size >= columns:
        return True
    size = unit_group(group_size, columns)
    return not permuted and size > 16 and group_size % size == 0


def column_order(group_size: int | None, columns: int, group_index: Tensor | None, device: torch.device) -> ColumnOrder:
    """Return the order for groups of neighbours, or for those that ``group_index`` (columns,) names."""
    size, length = unit_group(group_size, columns), min(group_size or columns, columns)
    if natural(group_size, columns, group_index is not None):
        return ColumnOrder(torch.arange(0, columns, size, device=device) // length)
    of_column = torch.arange(columns, device=device) // length if group_index is None else group_index.long()
    by_group = torch.argsort(of_column, stable=True)
    counts = torch.bincount(of_column)
    filled = -(-counts // size) * size
    first, first_filled = counts.cumsum(0) - counts, filled.cumsum(0) - filled
    own = of_column[by_group]  # the group of each column, in the order of groups
    place = first_filled[own] + torch.arange(columns, device=device) - first[own]
    groups = torch.arange(len(counts), device=device).repeat_interleave(filled // size)
    total = int(filled.sum())
    if size == 16:  # two groups share 32 columns
        total = -(-total // 32) * 32
        groups = torch.nn.functional.pad(groups, (0, total // 16 - len(groups)))
    source = torch.full((total,), columns, dtype=torch.int64, device=device)
    source[place] = by_group
    if size == 16:  # unit columns 8t .. 8t+3 belong to the even fragment, 8t+4 .. 8t+7 to the odd one
        source = source.view(-1, 2, 4, 4).transpose(1, 2).reshape(-1)
    return ColumnOrder(groups, source)


def gather(values: Tensor, source: Tensor | None) -> Tensor:
    """Return ``values`` (rows, columns) in the order of the units, 0 where a unit has no column."""
    if source is None:
        return values
    if len(source) != values.shape[1]:  # an order without gaps has as many columns
        values = torch.nn.functional.pad(values, (0, 1))
    return values.index_select(1, source)
