"""Dense little-endian bit streams: k-bit codes without a wasted bit, packed and unpacked eight at a time.

Eight codes of k bits become k bytes; code i occupies bits [k*i, k*i + k) of the stream, least significant bit first. GPTQ
(2, 3, 4, 8 bits), compressed-tensors (dense) and MLX store this stream in 32-bit words, along one axis or the other.

    k = 3, eight bytes of codes in one int64, lowest first:
        0000 0aaa  0000 0bbb  0000 0ccc  0000 0ddd  ...             one code in every 8 bits
        0000 0000 00bb baaa   0000 0000 00dd dccc   ...             in every 16: low half | high half >> (8 - k)
        0000 0000 0000 0000 0000 dddc ccbb baaa     ...             in every 32: low half | high half >> 2 * (8 - k)
        hhhg ggff feee dddc ccbb baaa                               in the 64:   low half | high half >> 4 * (8 - k)
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from lowbit.workers import map_ranges

_CHUNK = 1 << 18  # codes at a time: 2 MB of temporaries stay in a core's L2 cache


def packed_width(columns: int, bits: int) -> int:
    """Return the bytes that ``columns`` codes of ``bits`` bits take; a last partial group of eight is padded with zeros."""
    return (columns + 7) // 8 * bits


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes (rows, columns) below 2**bits into uint8 (rows, packed_width(columns, bits)).

    Raises ValueError for bits outside 1-8. Codes that do not fit would bleed into their neighbours: check them before.
    """
    _check(bits)
    rows, columns = codes.shape
    if not codes.numel():
        return codes.new_zeros(rows, packed_width(columns, bits))
    if columns % 8:
        codes = torch.nn.functional.pad(codes, (0, -columns % 8))
    words = codes.contiguous().view(torch.int64)  # (rows, columns / 8)
    if bits == 8:
        return words.view(torch.uint8)
    if bits == 4:
        return _pack_nibbles(codes.contiguous())
    out = torch.empty(rows, packed_width(columns, bits), dtype=torch.uint8, device=codes.device)

    def squeeze(part: Tensor, target: Tensor) -> None:
        target.copy_(_squeeze(part, bits).view(torch.uint8).view(*part.shape, 8)[..., :bits])

    _in_pieces(squeeze, words, out.view(rows, -1, bits))
    return out


def unpack_bits(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Undo ``pack_bits``: uint8 (rows, packed_width(columns, bits)) to uint8 codes (rows, columns)."""
    _check(bits)
    rows = packed.shape[0]
    if bits == 8:
        return packed[:, :columns].contiguous()
    if not packed.numel():
        return packed.new_zeros(rows, columns)
    if bits == 4:
        return _unpack_nibbles(packed.contiguous())[:, :columns].contiguous()
    bytes_in = packed.reshape(rows, -1, bits)  # k bytes hold eight codes
    words = torch.empty(rows, bytes_in.shape[1], dtype=torch.int64, device=packed.device)

    def spread(part: Tensor, target: Tensor) -> None:
        wide = torch.zeros(*target.shape, 8, dtype=torch.uint8, device=packed.device)
        wide[..., :bits] = part
        target.copy_(_spread(wide.view(torch.int64).squeeze(-1), bits))

    _in_pieces(spread, bytes_in, words)
    return words.view(torch.uint8)[:, :columns].contiguous()


def _pack_nibbles(codes: Tensor) -> Tensor:
    """Pack 4-bit codes, two to a byte: twice as fast as the general way, because a pair is one int16."""
    pairs = codes.view(torch.int16)  # low code | high code << 8
    packed = torch.empty(pairs.shape, dtype=torch.uint8, device=codes.device)
    _in_pieces(lambda part, target: target.copy_((part >> 4).bitwise_or_(part)), pairs, packed)
    return packed


def _unpack_nibbles(packed: Tensor) -> Tensor:
    """Undo ``_pack_nibbles``: uint8 (rows, n) to uint8 (rows, 2 * n)."""
    pairs = torch.empty(packed.shape, dtype=torch.int16, device=packed.device)

    def spread(part: Tensor, target: Tensor) -> None:
        target.copy_(part)
        target.bitwise_or_(target << 4).bitwise_and_(0x0F0F)

    _in_pieces(spread, packed, pairs)
    return pairs.view(torch.uint8)


def _squeeze(words: Tensor, bits: int) -> Tensor:
    """Close the gaps between eight codes in an int64: three shift-and-mask steps, drawn above."""
    for lane in (16, 32, 64):
        width = bits * lane // 16  # bits in use of one half of the lane
        high = words & _lane_mask(width, lane, lane // 2)
        words = words & _lane_mask(width, lane) | high >> (lane // 2 - width)
    return words


def _spread(words: Tensor, bits: int) -> Tensor:
    """Undo ``_squeeze``; the bits above 8 * bits must be zero."""
    for lane in (64, 32, 16):
        width = bits * lane // 16  # bits in use of one half of the lane
        low = words & _lane_mask(width, lane)
        words = low | (words & _lane_mask(width, lane, width)) << (lane // 2 - width)
    return words


def _lane_mask(width: int, lane: int, start: int = 0) -> int:
    """Return an int64 with bits start .. start + width set in every ``lane`` bits."""
    mask = sum(((1 << width) - 1) << (start + position) for position in range(0, 64, lane))
    return mask - (1 << 64) if mask >> 63 else mask


def _in_pieces(function: Callable[[Tensor, Tensor], object], source: Tensor, target: Tensor) -> None:
    """Call ``function`` on the same rows of both, several pieces at once on a CPU; the whole on other devices."""
    if source.device.type != "cpu":
        function(source, target)
        return
    each = 8 * source[0].numel() if len(source) else 1
    map_ranges(lambda start, stop: function(source[start:stop], target[start:stop]), len(source), each, piece=_CHUNK)


def _check(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be 1 to 8, got {bits}")
    if sys.byteorder != "little":
        raise ValueError("bit packing needs a little-endian machine; this one is big-endian")
