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

from lowbit.workers import map_ranges

_COLUMNS = 32
_BLOCKS = (64, 32, 16)


def pack(codes: Tensor) -> Tensor:
    """Pack uint8 codes below 16 (rows, columns), rows a multiple of 16, as torch's int4 product wants them.

    The same bytes as ``torch_pack`` gives (measured 2026-11, 2 Zen 3 cores: 110 million weights a second there, 700 here).
    """
    rows, columns = codes.shape
    found = orders(rows)
    assert found is not None
    packed, start = torch.empty(rows, columns // 2, dtype=torch.uint8), 0
    stored = packed.view(-1)
    for order in found:  # blocks of one size, then a shorter last one
        stop = start + order.numel() * columns // 2
        _pack_blocks(codes, order, stored[start:stop].view(order.shape[0], columns, -1))
        start = stop
    return packed


def _pack_blocks(codes: Tensor, order: Tensor, stored: Tensor) -> None:
    """Write the rows of ``codes`` that ``order`` names to blocks of bytes (blocks, columns, height / 2)."""
    blocks, columns, half = stored.shape

    def fill(start: int, stop: int) -> None:
        low = codes.index_select(0, order[start:stop, 0::2].reshape(-1))  # (blocks * half, columns)
        high = codes.index_select(0, order[start:stop, 1::2].reshape(-1))
        stored[start:stop] = high.bitwise_left_shift_(4).bitwise_or_(low).view(-1, half, columns).transpose(1, 2)

    map_ranges(fill, blocks, columns * 2 * half)


def torch_pack(codes: Tensor) -> Tensor:
    """Pack codes below 16 (rows, columns) by torch's own function, which wants them as int32."""
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int().contiguous(), 1)
    return packed


def unpack(packed: Tensor, rows: int, columns: int) -> Tensor:
    """Undo ``pack``: uint8 codes (rows, columns)."""
    found = orders(rows)
    assert found is not None
    codes = torch.empty(rows, columns, dtype=torch.uint8)
    stored, start = packed.reshape(-1), 0
    for order in found:  # blocks of one size, then a shorter last one
        stop = start + order.numel() * columns // 2
        _unpack_blocks(stored[start:stop].view(order.shape[0], columns, -1), order, codes)
        start = stop
    return codes


def _unpack_blocks(stored: Tensor, order: Tensor, codes: Tensor) -> None:
    """Write blocks of bytes (blocks, columns, height / 2) to the rows of ``codes`` that ``order`` names."""
    columns, height = stored.shape[1], order.shape[1]

    def fill(start: int, stop: int) -> None:
        bytes_of = stored[start:stop].transpose(1, 2).contiguous()  # (blocks, height / 2, columns)
        codes[order[start:stop, 0::2].reshape(-1)] = (bytes_of & 0xF).view(-1, columns)
        codes[order[start:stop, 1::2].reshape(-1)] = (bytes_of >> 4).view(-1, columns)

    map_ranges(fill, len(stored), columns * height)


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
        packed = torch_pack(values >> 4 * digit & 0xF)
        total += torch.stack((packed & 0xF, packed >> 4), dim=-1).reshape(-1).long() << 4 * digit
    return total


def _block_order(row: Tensor, column: Tensor, start: int, stop: int, height: int) -> Tensor | None:
    part = slice(start * _COLUMNS, stop * _COLUMNS)
    rows, columns = (values[part].reshape(-1, _COLUMNS, height) for values in (row, column))
    in_order = torch.equal(columns, torch.arange(_COLUMNS)[None, :, None].expand_as(columns))
    same = torch.equal(rows, rows[:, :1].expand_as(rows))
    return rows[:, 0] if in_order and same else None
