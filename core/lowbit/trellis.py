"""Reference decode of a bitshift trellis: bit windows to states, states to values.

    stream of a tile, first bit first, circular:   b0 b1 b2 ... b(n-1) | b0 b1 ...
    step t of step_bits k(t) ends at bit e(t) = k(0) + ... + k(t); its state is the state_bits bits b(e-L) .. b(e-1)

The functions from state to value are facts of the QTIP paper (arXiv 2406.11235, section 3) and of exllamav3's codebooks
(mcg, mul1); all integer arithmetic is modulo 2**32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowbit.scheme import Trellis

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
    values = decode_states(unpack_states(codes, trellis), trellis, codebook)
    return values.reshape(*codes.shape[:2], *trellis.tile)


def unpack_states(codes: Tensor, trellis: Trellis) -> Tensor:
    """Return the state of every step, int64 (tiles out, tiles in, steps), from int16 words with the first bit on top."""
    shifts = torch.arange(15, -1, -1, device=codes.device)
    bits = (codes.long().unsqueeze(-1) >> shifts & 1).flatten(-2)[..., : trellis.tile_bits]
    period = len(trellis.step_bits)
    widths = torch.tensor([trellis.step_bits[step % period] for step in range(trellis.steps)])
    ends = widths.cumsum(0).to(codes.device)
    offsets = torch.arange(-trellis.state_bits, 0, device=codes.device)
    window = (ends[:, None] + offsets) % trellis.tile_bits  # (steps, state_bits)
    weights = 1 << torch.arange(trellis.state_bits - 1, -1, -1, device=codes.device)
    return (bits[..., window] * weights).sum(-1)


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
