"""The words of ``awq-gemm`` and bit streams along rows: 8x8 codes at a time change from one to the other, as bits of words.

A word of a stream holds eight codes of one row; a word of AWQ holds codes of eight rows in one column. Eight words, one of each
row, become eight words, one of each column, in three steps. Each exchanges one bit of the row's number with one bit of the
nibble's, for all words of a piece at once::

    t = (x >> s ^ y) & m;   y ^= t;   x ^= t << s          x, y: rows whose numbers differ in one bit; s: 4, 8 or 16 bits

AWQ's order of columns in a word (``ORDER``) is a rotation of the number's three bits, n = (c0 c2 c1), so that it costs nothing:
the steps pair other bits, and what is left is a rotation of the bits of j, the column in its word.
"""

from __future__ import annotations

from pathlib import Path

import numpy
import torch
from torch import Tensor

from lowbit.compiled import CLoops, Loop
from lowbit_formats.int_words import CACHE_LINE

_LOOPS = CLoops(Path(__file__).with_name("awq_streams.c"))
_LANES = 8
"""Octets, and words of a stream, that a loop takes at once."""

_STEPS = ((1, 4, 0x0F0F0F0F), (2, 8, 0x00FF00FF), (0, 16, 0x0000FFFF))
"""A bit of the row's number, the bits of a word by which the nibble moves, and the nibbles that stay."""
_ROWS, _COLUMNS = (4, 3, 1, 2, 0), (4, 2, 3, 1, 0)
"""From (octets, j1, j0, j2, words) to (words, j2, j1, j0, octets), and back."""
_PIECE = 512
"""Words of a row at a time: with 16 octets of rows, 270 KB that stay in a core's cache."""

Block = numpy.ndarray[tuple[int, ...], numpy.dtype[numpy.uint32]]


def put(words: Tensor, streams: Tensor) -> None:
    """Write streams, int32 (8 * n, in / 8), into AWQ's words, int32 (in, n), a view of a matrix."""
    if loop := _loop("awq_put", words, streams):
        loop(streams, streams.stride(0), words, words.stride(0), words.shape[1], streams.shape[1])
        return
    rows, octets = streams.numpy().view(numpy.uint32), words.shape[1]
    target = words.view(-1, 2, 2, 2, octets).numpy().view(numpy.uint32)
    for start in range(0, rows.shape[1], _PIECE):
        piece = rows[:, start : start + _PIECE]
        block = _block(octets, piece.shape[1])
        numpy.copyto(block, piece.reshape(block.shape))
        _turn(block)
        numpy.copyto(target[start : start + _PIECE], block.transpose(_ROWS))


def streams(words: Tensor) -> Tensor:
    """Undo ``put``: return the streams, int32 (8 * n, in / 8), of words (in, n)."""
    found = torch.empty(8 * words.shape[1], words.shape[0] // 8, dtype=torch.int32)
    if loop := _loop("awq_streams", words, found):
        loop(words, words.stride(0), found, found.stride(0), words.shape[1], found.shape[1])
        return found
    count, octets = words.shape[0] // 8, words.shape[1]
    result = numpy.empty((8 * octets, count), dtype=numpy.uint32)
    for start in range(0, count, _PIECE):
        piece = words[8 * start : 8 * (start + _PIECE)]
        near = torch.empty(len(piece), octets + 4, dtype=torch.int32)[:, :octets].copy_(piece)
        block = _block(octets, len(piece) // 8)
        torch.from_numpy(block.view(numpy.int32)).copy_(near.view(-1, 2, 2, 2, octets).permute(_COLUMNS))
        _turn(block)
        result[:, start : start + _PIECE] = block.reshape(8 * octets, -1)
    return torch.from_numpy(result.view(numpy.int32))


def same(words: Tensor, wanted: Tensor) -> bool | None:
    """Whether ``streams(words)`` is ``wanted``; None where only asking it can tell."""
    loop = _loop("awq_same", words, wanted)
    return loop and loop(words, words.stride(0), wanted, wanted.stride(0), words.shape[1], wanted.shape[1]) == 1


def _loop(name: str, words: Tensor, streams: Tensor) -> Loop | None:
    """Return the loop that does it, if there is one and these are as it takes them."""
    whole = words.shape[1] % _LANES == 0 == streams.shape[1] % _LANES
    return _LOOPS.find(name) if whole and words.stride(1) == 1 == streams.stride(1) else None


def _block(octets: int, count: int) -> Block:
    """Return room for (octets, 2, 2, 2, words); rows lie a cache line apart, or those of 2 KB would meet in the same lines."""
    return numpy.empty((octets, 2, 2, 2, count + CACHE_LINE), dtype=numpy.uint32)[..., :count]


def _turn(block: Block) -> None:
    """Exchange the bits of rows and nibbles in place; doing it twice changes nothing."""
    room = numpy.empty((len(block), 2, 2, block.shape[4]), dtype=numpy.uint32)
    for bit, shift, stays in _STEPS:
        first, second = numpy.moveaxis(block, 3 - bit, 0)
        numpy.right_shift(first, numpy.uint32(shift), out=room)
        numpy.bitwise_xor(room, second, out=room)
        numpy.bitwise_and(room, numpy.uint32(stays), out=room)
        numpy.bitwise_xor(second, room, out=second)
        numpy.left_shift(room, numpy.uint32(shift), out=room)
        numpy.bitwise_xor(first, room, out=first)
