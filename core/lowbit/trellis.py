"""Reference decode of a bitshift trellis: bit windows to states, states to values.

    stream of a tile, first bit first, circular:   b0 b1 b2 ... b(n-1) | b0 b1 ...
    step t of step_bits k(t) ends at bit e(t) = k(0) + ... + k(t); its state is the state_bits bits b(e-L) .. b(e-1)

Step t decodes weight t of a 16x16 tile row by row, or in order ``mma_b`` the one that lane t // 8 of a warp holds in register
t % 8 of two B fragments (k16 x n8) of the instruction mma.m16n8k16; EXL3 stores its tiles so:

    register   0 1 2 3 4 5 6 7
    out        l l l l h h h h      l = t // 8 // 4, h = l + 8
    in         a b c d a b c d      a = 2 * (t // 8 % 4), b = a + 1, c = a + 8, d = a + 9

The functions from state to value are facts of the QTIP paper (arXiv 2406.11235, section 3) and of exllamav3's codebooks
(mcg, mul1); all integer arithmetic is modulo 2**32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowbit.scheme import Trellis
from lowbit.workers import map_ranges

# (multiplier, addend) of the linear congruential step of each code.
_STEPS = {
    "1mad": (34038481, 76625530),
    "2mad": (264435761, 1013904223),
    "3inst": (89226354, 64248484),
    "mcg": (0xCBAC1FED, 0),
    "mul1": (0x83DCD12D, 0),
}
_BYTE_SUM_DEVIATION = math.sqrt(4 * (256**2 - 1) / 12)  # of the sum of four uniform bytes, whose mean is 510
_WORD = 0xFFFFFFFF


def decode_tiles(codes: Tensor, trellis: Trellis, codebook: Tensor | None = None) -> Tensor:
    """Return float32 values (tiles out, tiles in, tile height, tile width) of int16 streams (tiles out, tiles in, words)."""
    tiles = torch.empty(*codes.shape[:2], math.prod(trellis.tile), device=codes.device)
    order = weight_order(trellis).to(codes.device)

    def work(start: int, stop: int) -> None:
        values = decode_states(unpack_states(codes[start:stop], trellis), trellis, codebook)
        tiles[start:stop, :, order] = values

    if codes.device.type == "cpu":  # in pieces, because the states of all tiles at once take 30 times their memory
        map_ranges(work, len(codes), codes.shape[1] * math.prod(trellis.tile))
    else:
        work(0, len(codes))
    return tiles.reshape(*codes.shape[:2], *trellis.tile)


def weight_order(trellis: Trellis) -> Tensor:
    """Return the position in the tile, counted row by row, of each decoded weight: int64 (tile height * tile width,)."""
    weight = torch.arange(math.prod(trellis.tile))
    if trellis.order == "rows":
        return weight
    lane, register = weight // 8, weight % 8
    out = lane // 4 + 8 * (register // 4)
    column = 2 * (lane % 4) + register % 2 + 8 * (register // 2 % 2)
    return 16 * out + column


def unpack_states(codes: Tensor, trellis: Trellis) -> Tensor:
    """Return the state of every step, int64 (tiles out, tiles in, steps), from int16 words with the first bit on top."""
    period = len(trellis.step_bits)
    widths = torch.tensor([trellis.step_bits[step % period] for step in range(trellis.steps)], device=codes.device)
    starts = (widths.cumsum(0) - trellis.state_bits) % trellis.tile_bits
    if trellis.tile_bits % 16 == 0:
        return _windows_of_words(codes, starts, trellis.state_bits)
    return _windows_of_bits(codes, starts, trellis)


def _windows_of_words(codes: Tensor, starts: Tensor, length: int) -> Tensor:
    """Return ``length`` <= 24 bits from each start on, for streams that fill their words: three words hold any window."""
    words, first = codes.long() & 0xFFFF, starts // 16
    three = sum(words[..., (first + i) % words.shape[-1]] << (32 - 16 * i) for i in range(3))
    return three >> (48 - length - starts % 16) & ((1 << length) - 1)


def _windows_of_bits(codes: Tensor, starts: Tensor, trellis: Trellis) -> Tensor:
    """Return the same for any stream, bit by bit."""
    shifts = torch.arange(15, -1, -1, device=codes.device)
    bits = (codes.long().unsqueeze(-1) >> shifts & 1).flatten(-2)[..., : trellis.tile_bits]
    places = torch.arange(trellis.state_bits, device=codes.device)
    window = (starts[:, None] + places) % trellis.tile_bits  # (steps, state_bits)
    return (bits[..., window] * (1 << places.flip(0))).sum(-1)


def decode_states(states: Tensor, trellis: Trellis, codebook: Tensor | None = None) -> Tensor:
    """Return the values of int64 states (..., steps): float32 (..., steps * step_weights)."""
    if trellis.code == "lut":
        assert codebook is not None
        return codebook[states].flatten(-2)
    if trellis.code == "hyb":
        assert codebook is not None
        return _hybrid(states, trellis.table_bits, codebook).flatten(-2)
    multiplier, addend = _STEPS[trellis.code]
    x = (states * multiplier + addend) & _WORD
    if trellis.code in ("3inst", "mcg"):
        return _half_pair(x & 0x8FFF8FFF ^ 0x3B603B60)
    if trellis.code == "2mad":
        x = ((x * 1664525 >> 32) + x) & _WORD
    byte_sum = sum(((x >> shift & 0xFF) for shift in (0, 8, 16, 24)), torch.zeros_like(x))
    if (
        trellis.code == "mul1"
    ):  # fp16 constants 0x1eee and 0xc931 of a fused multiply-add on 1024 + byte sum, rounded to fp16
        return ((1024 + byte_sum).double() * 0.00676727294921875 - 10.3828125).half().float()
    return (byte_sum - 510).float() / _BYTE_SUM_DEVIATION


def _half_pair(x: Tensor) -> Tensor:
    """Add the two fp16 halves of 32-bit words, as one fp16 addition."""
    low, high = ((x >> shift & 0xFFFF).to(torch.int32).to(torch.int16).view(torch.float16) for shift in (0, 16))
    return (low + high).float()


def _hybrid(states: Tensor, table_bits: int, codebook: Tensor) -> Tensor:
    """QTIP's quantlut_sym: a hash picks one of 2**table_bits pairs and the sign of its first value."""
    hashed = (states + 1) * states & _WORD
    index = hashed >> (16 - table_bits - 1) & (2**table_bits - 1)
    sign = 1 - 2 * (hashed >> 15 & 1)
    values = codebook[index]
    return torch.stack((values[..., 0] * sign, values[..., 1]), dim=-1)
