"""The order in which GEMV kernels read affine codes: units of 16 rows x 256 columns, one fragment load after the other.

``include/lowbit/affine.cuh`` draws the fragments and ``gemv.cuh`` the units; ``_FIELDS`` below says the same as the decoders there:
for fragment m, register r of a lane's chunk, which bit of which word holds bit b of the code (the other code of the register lies
16 bits higher). Packing runs on the device that holds the codes.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

ROWS, COLUMNS = 16, 256
BITS = (1, 2, 3, 4, 8)
GROUP_SIZES = (32, 64, 128, 256)
Place = tuple[int, int]


def unit_bytes(bits: int, group_size: int, zeros: bool) -> int:
    """Return the bytes of one unit: codes, then fp16 scales, then fp16 zeros when each group has its own."""
    return 512 * bits + 32 * (COLUMNS // group_size) * (2 if zeros else 1)


def pack_units(codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int) -> Tensor:
    """Arrange codes uint8 (out, in), scales and zeros fp16 (out, groups) as uint8 (row tiles, column units, unit_bytes).

    Rows and columns are padded with codes and scales of 0. Raises ValueError for bits or groups that no kernel has.
    """
    if bits not in BITS or group_size not in GROUP_SIZES:
        raise ValueError(f"bits must be one of {BITS} and group_size one of {GROUP_SIZES}, got {bits} and {group_size}")
    tiles, units = -(-codes.shape[0] // ROWS), -(-codes.shape[1] // COLUMNS)
    parts = [_code_bytes(_padded(codes, tiles * ROWS, units * COLUMNS), bits)]
    for values in (scales,) if zeros is None else (scales, zeros):
        groups = _padded(values, tiles * ROWS, units * (COLUMNS // group_size))
        ordered = (
            groups.view(tiles, 2, 8, units, -1).permute(0, 3, 2, 4, 1).contiguous()
        )  # (tile, unit, g, group, row half)
        parts.append(ordered.view(tiles, units, -1).view(torch.uint8))
    return torch.cat(parts, dim=2)


def _padded(values: Tensor, rows: int, columns: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, columns - values.shape[1], 0, rows - values.shape[0]))


def _code_bytes(codes: Tensor, bits: int) -> Tensor:
    tiles, units = codes.shape[0] // ROWS, codes.shape[1] // COLUMNS
    # rows: (tile, row half, g); columns: (unit, chunk, pair, t, fragment of the pair, register half, code of the register)
    split = codes.view(tiles, 2, 8, units, 4, 2, 4, 2, 2, 2)
    words = torch.zeros(tiles, units, 4, bits, 8, 4, dtype=torch.int32, device=codes.device)  # (.., chunk, word, g, t)
    for (fragment, register), places in _fields(bits).items():
        chosen = split[
            :, register % 2, :, :, :, fragment // 2, :, fragment % 2, register // 2
        ]  # (tile, g, unit, chunk, t, code)
        for code in range(2):
            values = chosen[..., code].permute(0, 2, 3, 1, 4).int()  # (tile, unit, chunk, g, t)
            for bit, (word, place) in enumerate(places):
                words[:, :, :, word] |= (values >> bit & 1) << (place + 16 * code)
    lanes = words.reshape(tiles, units, 4 * bits, 32).transpose(2, 3)  # (tile, unit, lane, words of the lane)
    slabs = (
        lanes.reshape(tiles, units, 32, bits, 4).transpose(2, 3).contiguous()
    )  # 16 bytes of every lane, slab by slab
    return slabs.view(tiles, units, -1).view(torch.uint8)


@cache
def _fields(bits: int) -> dict[tuple[int, int], list[Place]]:
    """Return (word, bit) of every code bit, for fragments 0..3 and registers 0..3."""
    table = {1: _one_bit, 2: _two_bits, 3: _three_bits, 4: _four_bits, 8: _eight_bits}[bits]
    return {(fragment, register): table(fragment, register) for fragment in range(4) for register in range(4)}


def _run(word: int, first: int, bits: int) -> list[Place]:
    return [(word, first + bit) for bit in range(bits)]


def _one_bit(fragment: int, register: int) -> list[Place]:
    return _run(0, 2 * fragment + register // 2 + 8 * (register % 2), 1)


def _two_bits(fragment: int, register: int) -> list[Place]:
    return _run(fragment // 2, 4 * (fragment % 2) + 2 * (register // 2) + 8 * (register % 2), 2)


def _three_bits(fragment: int, register: int) -> list[Place]:
    if fragment == 3:
        return _run(1 + register % 2, 9 + 3 * (register // 2), 3)
    if register < 3:
        return _run(register, 3 * fragment, 3)
    if fragment == 2:
        return [(0, 15), (1, 15), (2, 15)]  # the top bit of each word
    return _run(0, 9 + 3 * fragment, 3)


def _four_bits(fragment: int, register: int) -> list[Place]:
    return _run(fragment, 4 * (register // 2) + 8 * (register % 2), 4)


def _eight_bits(fragment: int, register: int) -> list[Place]:
    return _run(2 * fragment + register // 2, 8 * (register % 2), 8)
