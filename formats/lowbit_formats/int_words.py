"""Dense bit streams in int32 words: what GPTQ, compressed-tensors and MLX store, along one axis of a weight or the other.

Code i of a stream occupies its bits [b*i, b*i + b), least significant first, so that a code may cross into the next word:

    b = 4:  word 0  [ c7 | c6 | c5 | c4 | c3 | c2 | c1 | c0 ]                             (bit 31 on the left)
    b = 3:  word 0  [ c10 & 3 | c9 | ... | c0 ]      word 1  [ c21 & 1 | c20 | ... | c11 | c10 >> 2 ]      ...

The last word is filled up with zero bits. Words are the little-endian bytes of ``lowbit.bits``; a transpose moves whole words,
32 / b times fewer than there are codes.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from lowbit.bits import pack_bits, packed_width, unpack_bits
from lowbit.compiled import CLoops
from lowbit.errors import WeightError
from lowbit.workers import map_ranges

CACHE_LINE = 64 // 4
"""Words in a cache line: threads that write neighbouring columns stay out of each other's lines."""
_LOOPS = CLoops(Path(__file__).with_name("int_words.c"))
_TURNS = {torch.int32: "turn_words", torch.float16: "turn_halves", torch.bfloat16: "turn_halves"}


def word_count(codes: int, bits: int) -> int:
    """Return the int32 words that a stream of ``codes`` codes takes."""
    return -(-codes * bits // 32)


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Pack each row of uint8 codes (rows, n) below 2**bits into int32 (rows, word_count(n, bits))."""
    packed = pack_bits(_dense(codes), bits)
    missing = 4 * word_count(codes.shape[1], bits) - packed.shape[1]
    stream = pad(packed, (0, missing)) if missing else packed  # a negative pad cuts zeros off
    return _dense(stream).view(torch.int32)


def unpack_words(words: Tensor, bits: int, columns: int) -> Tensor:
    """Undo ``pack_words``: int32 (rows, word_count(columns, bits)) to uint8 (rows, columns)."""
    stream = _dense(words).view(torch.uint8)
    missing = packed_width(columns, bits) - stream.shape[1]
    return unpack_bits(pad(stream, (0, missing)) if missing else stream, bits, columns)


def pack_across(codes: Tensor, bits: int) -> Tensor:
    """Pack a weight's codes (out, in) along in_features into int32 (out, words), rows in parallel.

    Raises WeightError for a code that does not fit ``bits``.
    """
    rows, columns = codes.shape
    words = torch.empty(rows, word_count(columns, bits), dtype=torch.int32, device=codes.device)

    def work(start: int, stop: int) -> None:
        check_codes(codes[start:stop], bits)
        words[start:stop] = pack_words(codes[start:stop], bits)

    map_ranges(work, rows, columns)
    return words


def unpack_across(words: Tensor, bits: int, columns: int) -> Tensor:
    """Undo ``pack_across``: int32 (out, words) to uint8 (out, columns)."""
    codes = torch.empty(words.shape[0], columns, dtype=torch.uint8, device=words.device)

    def work(start: int, stop: int) -> None:
        codes[start:stop] = unpack_words(words[start:stop], bits, columns)

    map_ranges(work, *codes.shape)
    return codes


def pack_down(codes: Tensor, bits: int) -> Tensor:
    """Pack a weight's codes (out, in) along in_features into int32 (words, out), a block of columns at a time.

    Raises WeightError for a code that does not fit ``bits``.
    """
    rows, columns = codes.shape
    words = torch.empty(word_count(columns, bits), rows, dtype=torch.int32, device=codes.device)

    def work(start: int, stop: int) -> None:
        check_codes(codes[start:stop], bits)
        turn_into(words[:, start:stop], pack_words(codes[start:stop], bits))

    map_ranges(work, rows, columns, CACHE_LINE)
    return words


def unpack_down(words: Tensor, bits: int, columns: int) -> Tensor:
    """Undo ``pack_down``: int32 (words, out) to uint8 (out, columns)."""
    rows = words.shape[1]
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=words.device)

    def work(start: int, stop: int) -> None:
        codes[start:stop] = unpack_words(turned(words[:, start:stop]), bits, columns)

    map_ranges(work, rows, columns, CACHE_LINE)
    return codes


def turned(matrix: Tensor) -> Tensor:
    """Return the transpose of a matrix in memory of its own."""
    result = matrix.new_empty(matrix.shape[::-1])
    turn_into(result, matrix)
    return result


def turn_into(target: Tensor, matrix: Tensor) -> None:
    """Write the transpose of ``matrix`` (rows, columns), some hundred KB, to ``target`` (columns, rows); both may be slices.

    torch copies the transpose of a slice of a large matrix at 1 GB/s. Rows of a power of two of bytes meet in the same few lines
    of a cache: moved apart first, they turn at 4 to 5. The loop in C takes words at 20 to 30 (2026-11-21).
    """
    name = _TURNS.get(matrix.dtype)
    if name and matrix.dtype == target.dtype and matrix.device.type == "cpu" == target.device.type:
        loop = _LOOPS.find(name) if matrix.stride(1) == 1 == target.stride(1) else None
        if loop is not None:
            loop(matrix, matrix.stride(0), target, target.stride(0), *matrix.shape)
            return
    rows, columns = matrix.shape
    apart = matrix.new_empty(rows, columns + CACHE_LINE)[:, :columns].copy_(matrix)
    target.copy_(apart.T.contiguous())


def constant_words(code: int, bits: int, columns: int) -> Tensor:
    """Return the words of a stream of ``columns`` times the same code: int32 (1, words)."""
    if columns * bits % 32 == 0 == 32 % bits:
        word = sum(code << place for place in range(0, 32, bits))
        return torch.full((1, columns * bits // 32), word - (word >> 31 << 32), dtype=torch.int32)
    return pack_words(torch.full((1, columns), code, dtype=torch.uint8), bits)


def only_code(words: Tensor, bits: int, columns: int) -> int | None:
    """Return the code that every place of every stream (rows, words) holds, or None when they differ."""
    if not words.numel():
        return None
    first = int(words[0, 0]) & (1 << bits) - 1
    same = words == constant_words(first, bits, columns).to(words.device)
    return first if bool(same.all()) else None


def _dense(matrix: Tensor) -> Tensor:
    """Return a matrix whose strides are those of its shape: torch calls it contiguous whatever the stride of a side of 1 is."""
    return matrix.contiguous().as_strided(matrix.shape, (matrix.shape[1], 1))


def check_codes(codes: Tensor, bits: int) -> None:
    """Raise WeightError for a code that would bleed into its neighbours."""
    highest = int(codes.max()) if bits < 8 and codes.numel() else 0
    if highest >> bits:
        raise WeightError(f"a code is {highest}, which does not fit {bits} bits; the quantizer that made it is broken")
