"""The order of columns in units, on a CPU: every column once, beside the columns of its group, and products unchanged."""

import pytest
import torch

from lowbit_cuda.columns import column_order, gather, natural, unit_group, why_not_groups

CPU = torch.device("cpu")


def groups_of_units(order, size, length):
    """The weight's group of each column of the units, from the drawing of unit.cuh."""
    column = torch.arange(length)
    fragment = column // 32 * 2 + column % 8 // 4
    return order.groups[fragment if size == 16 else column // size]


@pytest.mark.parametrize("irregular", [False, True])
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("columns", [512, 576, 200, 99])
@pytest.mark.parametrize("group", [16, 17, 24, 32, 48, 64, 100, 128, 1000, None])
def test_every_column_lies_in_its_group(group, columns, permuted, irregular):
    generator = torch.Generator().manual_seed(columns)
    length = min(group or columns, columns)
    index = torch.arange(columns) // length
    if permuted:
        index = index[torch.randperm(columns, generator=generator)]
    if irregular:  # groups of other sizes than the scheme says
        index = torch.randint(int(index.max()) + 1, (columns,), generator=generator)
    order = column_order(group, columns, index if permuted or irregular else None, CPU)
    size = unit_group(group, columns)
    if order.source is None:
        assert natural(group, columns, permuted or irregular)
        assert torch.equal(groups_of_units(order, size, columns), index if length < columns else index * 0)
        return
    real = order.source < columns
    assert len(order.source) % 8 == 0
    assert torch.equal(order.source[real].sort().values, torch.arange(columns))
    assert torch.equal(groups_of_units(order, size, len(order.source))[real], index[order.source[real]])
    weight, x = torch.randn(3, columns, generator=generator).double(), torch.randn(2, columns).double()
    torch.testing.assert_close(gather(x, order.source) @ gather(weight, order.source).T, x @ weight.T)


@pytest.mark.parametrize(
    ("group", "size"),
    [(16, 16), (24, 32), (48, 16), (17, 32), (100, 16), (96, 32), (384, 128), (512, 256), (None, 256)],
)
def test_groups_are_filled_up_as_little_as_possible(group, size):
    assert unit_group(group, 1024) == size


def test_what_units_hold_as_it_is_is_not_gathered():
    assert natural(64, 4096, False)
    assert natural(None, 4096, True)  # one group: there is nothing to put side by side
    assert not natural(64, 4096, True)
    assert not natural(64, 4100, False)
    assert not natural(16, 4096, False)
    assert "groups of 16 columns or more, not of 8" in why_not_groups(8)
    assert why_not_groups(None) is why_not_groups(16) is None
