"""Codes as 32-bit words, on any device: ``cuda/stream.cuh`` draws both layouts.

Codes are numbered through the whole weight, row after row, and neither blocks nor rows start a new word. On a GPU the kernels of
``cuda/repack.cu`` do the work; elsewhere, and with LOWBIT_CUDA=0, plain torch does, with the same bits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowbit.bits import pack_bits, unpack_bits
from lowbit.errors import WeightError
from lowbit.workers import map_ranges
from lowbit_cuda.available import why_not_cuda

WORDS, DENSE = "words", "dense"
LAYOUTS = (WORDS, DENSE)
MOST_CODES = 2**31  # that the kernels count
_PIECE = 1 << 20
_CODES_OF_A_STEP = 480  # whole words of every layout, and whole bytes: a multiple of 4, 5, 6, 8, 10, 16 and 32


def word_count(layout: str, bits: int, count: int) -> int:
    """Return the 32-bit words that ``count`` codes take."""
    return -(-count // (32 // bits)) if layout == WORDS else -(-count * bits // 32)


def pack_stream(layout: str, codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes of any shape into int32 ``(word_count,)``. Raises WeightError for a code of more than ``bits`` bits."""
    flat = codes.contiguous().view(-1)
    return _convert("codes", layout, flat, bits, flat.numel())


def unpack_stream(layout: str, words: Tensor, bits: int, count: int) -> Tensor:
    """Undo ``pack_stream``: uint8 ``(count,)``."""
    return _convert(layout, "codes", words, bits, count)


def convert_stream(source: str, target: str, words: Tensor, bits: int, count: int) -> Tensor:
    """Return ``count`` codes in another layout: int32 words again."""
    return words if source == target else _convert(source, target, words, bits, count)


def _convert(source: str, target: str, buffer: Tensor, bits: int, count: int) -> Tensor:
    size = count if target == "codes" else word_count(target, bits, count)
    out = torch.empty(size, dtype=torch.uint8 if target == "codes" else torch.int32, device=buffer.device)
    if not count:
        return out
    if buffer.is_cuda and count < MOST_CODES and why_not_cuda(buffer.device.index) is None:
        from lowbit_kbit.launches import repack

        aligned = buffer if buffer.data_ptr() % 16 == 0 else buffer.clone()
        repack(source.capitalize(), target.capitalize(), bits, aligned.contiguous(), count, out)
        return out

    def convert(start: int, stop: int) -> None:
        first, codes = start * _CODES_OF_A_STEP, min(stop * _CODES_OF_A_STEP, count) - start * _CODES_OF_A_STEP
        part = _part(buffer, source, bits, first, codes)
        plain = part if source == "codes" else _UNPACK[source](part, bits, codes)
        _part(out, target, bits, first, codes).copy_(plain if target == "codes" else _PACK[target](plain, bits))

    map_ranges(convert, math.ceil(count / _CODES_OF_A_STEP), _CODES_OF_A_STEP, piece=_PIECE)
    return out


def _part(buffer: Tensor, layout: str, bits: int, first: int, codes: int) -> Tensor:
    """Return the units that hold ``codes`` codes from ``first`` on, which starts a unit."""
    if layout == "codes":
        return buffer[first : first + codes]
    start = word_count(layout, bits, first)
    return buffer[start : start + word_count(layout, bits, codes)]


def _pack_words(codes: Tensor, bits: int) -> Tensor:
    _check(codes, bits)
    per_word = 32 // bits
    padded = torch.nn.functional.pad(codes, (0, -len(codes) % per_word)).view(-1, per_word)
    words = torch.zeros(len(padded), dtype=torch.int32, device=codes.device)
    for place in range(per_word):
        words |= padded[:, place].int() << bits * place  # the sign bit is a bit like any other
    return words


def _unpack_words(words: Tensor, bits: int, count: int) -> Tensor:
    per_word = 32 // bits
    codes = torch.empty(len(words), per_word, dtype=torch.uint8, device=words.device)
    for place in range(per_word):
        codes[:, place] = (words >> bits * place & (1 << bits) - 1).to(torch.uint8)
    return codes.view(-1)[:count]


def _pack_dense(codes: Tensor, bits: int) -> Tensor:
    _check(codes, bits)
    stream = pack_bits(codes[None], bits)[0]
    length = 4 * word_count(DENSE, bits, len(codes))  # pack_bits pads to whole bytes of eight codes: more, or less
    return torch.nn.functional.pad(stream, (0, max(0, length - len(stream))))[:length].view(torch.int32)


def _unpack_dense(words: Tensor, bits: int, count: int) -> Tensor:
    length = -(-count // 8) * bits
    stream = words.contiguous().view(torch.uint8)
    stream = torch.nn.functional.pad(stream, (0, max(0, length - len(stream))))[:length]
    return unpack_bits(stream[None], bits, count)[0]


_PACK = {WORDS: _pack_words, DENSE: _pack_dense}
_UNPACK = {WORDS: _unpack_words, DENSE: _unpack_dense}


def _check(codes: Tensor, bits: int) -> None:
    if len(codes) and (highest := int(codes.max())) >> bits:
        raise WeightError(f"a code is {highest}, which does not fit {bits} bits; the quantizer that made it is broken")
