"""Where torch puts the codes of an int4 weight: ``_convert_weight_to_int4pack_for_cpu`` does not document it, so it is asked.

On AVX2 (torch 2.13), for a block of 32 rows of the weight and one column k, 16 bytes lie together:

    byte j:  [ row 16 + j | row j ]     high nibble, low nibble

and blocks of 64 rows on AVX-512, of 16 elsewhere; a last short block has neighbours in a byte. Instead of trusting that, small
weights whose codes spell their own row and column are packed and read back.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

_COLUMNS = 32
_BLOCKS = (64, 32, 16)


def pack(codes: Tensor) -> Tensor:
    """Pack int codes below 16 (rows, columns), rows a multiple of 16, as torch's int4 product wants them."""
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int().contiguous(), 1)
    return packed


def unpack(packed: Tensor, rows: int, columns: int) -> Tensor:
    """Undo ``pack``: uint8 codes (rows, columns)."""
    found = orders(rows)
    assert found is not None
    nibbles = torch.stack((packed & 0xF, packed >> 4), dim=-1).reshape(-1)
    codes = torch.empty(rows, columns, dtype=torch.uint8)
    start = 0
    for order in found:  # blocks of one size, then a shorter last one
        height = order.shape[1]
        part = nibbles[start * columns : (start + order.numel()) * columns].reshape(-1, columns, height)
        codes[order.reshape(-1)] = part.transpose(1, 2).reshape(-1, columns)
        start += order.numel()
    return codes


@cache
def orders(rows: int) -> tuple[Tensor, ...] | None:
    """Return the row of each nibble, (blocks, block height) for whole blocks and for a short last one.

    None when this torch arranges codes in any other way than blocks of rows, column after column.
    """
    row = _ask(torch.arange(rows)[:, None].expand(rows, _COLUMNS), rows)
    column = _ask(torch.arange(_COLUMNS).expand(rows, _COLUMNS), _COLUMNS)
    for height in _BLOCKS:
        whole = rows // height * height
        pieces = [(0, whole, height), (whole, rows, rows - whole)]
        found = [_block_order(row, column, *piece) for piece in pieces if piece[0] < piece[1]]
        if all(order is not None for order in found):
            return tuple(order for order in found if order is not None)
    return None


def _ask(values: Tensor, limit: int) -> Tensor:
    """Pack ``values`` (rows, columns), digit by hexadecimal digit, and return which value is at each nibble."""
    total = torch.zeros(values.numel(), dtype=torch.int64)
    for digit in range((limit.bit_length() + 3) // 4):
        packed = pack(values >> 4 * digit & 0xF)
        total += torch.stack((packed & 0xF, packed >> 4), dim=-1).reshape(-1).long() << 4 * digit
    return total


def _block_order(row: Tensor, column: Tensor, start: int, stop: int, height: int) -> Tensor | None:
    part = slice(start * _COLUMNS, stop * _COLUMNS)
    rows, columns = (values[part].reshape(-1, _COLUMNS, height) for values in (row, column))
    in_order = torch.equal(columns, torch.arange(_COLUMNS)[None, :, None].expand_as(columns))
    same = torch.equal(rows, rows[:, :1].expand_as(rows))
    return rows[:, 0] if in_order and same else None
