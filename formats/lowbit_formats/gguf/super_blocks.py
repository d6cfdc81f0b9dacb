"""Blocks of 256 weights: the K-quants (integer sub-scales under one fp16) and the ternary types TQ1_0 and TQ2_0.

Elements of a block are numbered e = 0..255. Three arrangements return; t, h and l count from 0::

    quarters   byte 32h + l, bits 2t..2t+1:    element 128h + 32t + l        Q2_K Q3_K (low bits) Q6_K (high bits) TQ2_0
    nibbles    byte 32p + l, nibble h:         element 64p + 32h + l         Q4_K Q5_K
    planes     byte l, bit k:                  element 32k + l               Q3_K (hmask) Q5_K (qh)
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.errors import WeightError
from lowbit.scheme import Grid, ScaleFormat, Scheme, Zero
from lowbit_formats.gguf.block_types import TYPES
from lowbit_formats.gguf.packing import (
    BYTES,
    BlockPacker,
    Parts,
    check_below,
    codes_of,
    flip_sign,
    half,
    join,
    split,
    words,
)


def _quarters(wide: Tensor) -> Tensor:
    """Pack 2-bit words (rows, blocks, 2 h, 4 t, 4) into int64 (rows, blocks, 8): 64 bytes a block."""
    packed = wide[:, :, :, 0] | wide[:, :, :, 1] << 2 | wide[:, :, :, 2] << 4 | wide[:, :, :, 3] << 6
    return packed.flatten(2)


def _unquarters(qs: Tensor) -> Tensor:
    """Undo ``_quarters``: uint8 (rows, blocks, 64) to words (rows, blocks, 2, 4, 4)."""
    packed = torch.unflatten(qs.view(torch.int64), 2, (2, 4))
    return torch.stack([packed >> 2 * t & 0x03 * BYTES for t in range(4)], dim=3)


def _nibbles(wide: Tensor) -> Tensor:
    """Pack 4-bit words (rows, blocks, 4 p, 2 h, 4) into int64 (rows, blocks, 16): 128 bytes a block."""
    return (wide[:, :, :, 0] | wide[:, :, :, 1] << 4).flatten(2)


def _unnibbles(qs: Tensor) -> Tensor:
    """Undo ``_nibbles``: uint8 (rows, blocks, 128) to words (rows, blocks, 4, 2, 4)."""
    packed = torch.unflatten(qs.view(torch.int64), 2, (4, 4))
    return torch.stack((packed & 0x0F * BYTES, packed >> 4 & 0x0F * BYTES), dim=3)


def _planes(wide: Tensor) -> Tensor:
    """Pack 1-bit words (rows, blocks, 8 k, 4) into int64 (rows, blocks, 4): 32 bytes a block."""
    packed = wide[:, :, 0]
    for k in range(1, 8):
        packed = packed | wide[:, :, k] << k
    return packed


def _unplanes(bits: Tensor) -> Tensor:
    """Undo ``_planes``: uint8 (rows, blocks, 32) to words (rows, blocks, 8, 4)."""
    packed = bits.view(torch.int64)
    return torch.stack([packed >> k & BYTES for k in range(8)], dim=2)


def _units(parts: Parts, name: str, count: int, groups: int) -> Tensor:
    """Return unsigned sub-scales (rows, blocks, groups of a block), checked to be below ``count``."""
    check_below(parts[name], count, f"one of the {name}")
    return parts[name].reshape(len(parts[name]), -1, groups)


def _minimum(parts: Parts) -> Tensor:
    """Return dmin (rows, blocks, 1): the file subtracts ``dmin * mn``, a scheme adds the minimum, so the sign flips."""
    return flip_sign(parts["super_minimums"]).unsqueeze(2)


def _encode_q2_k(parts: Parts) -> Tensor:
    """[ scales 16 | qs 64 | d | dmin ]; byte j of scales: [ mn(j) | sc(j) ]."""
    units = _units(parts, "scales", 16, 16) | _units(parts, "minimums", 16, 16) << 4
    codes = _quarters(words(parts["codes"], 4, 2, 4, 4))
    return join(units, codes, parts["super_scales"].unsqueeze(2), _minimum(parts))


def _decode_q2_k(blocks: Tensor) -> dict[str, Tensor]:
    units, qs, scale, minimum = split(blocks, 16, 64, 2, 2)
    return {
        "codes": codes_of(_unquarters(qs)),
        "scales": units & 15,
        "super_scales": half(scale),
        "minimums": units >> 4,
        "super_minimums": flip_sign(half(minimum)),
    }


def _encode_q3_k(parts: Parts) -> Tensor:
    """[ hmask 32 | qs 64 | scales 12 | d ]; bit 2 of a code goes to hmask, its low bits to qs."""
    wide = words(parts["codes"], 8, 8, 4)
    high = _planes(wide >> 2 & BYTES)
    low = _quarters(torch.unflatten(wide & 0x03 * BYTES, 2, (2, 4)))
    return join(high, low, _scales_q3_k(parts["scales"]), parts["super_scales"].unsqueeze(2))


def _scales_q3_k(scales: Tensor) -> Tensor:
    """Pack sixteen 6-bit u = sub-scale + 32 (int8, -32 to 31) into 12 bytes.

    byte j < 8:   [ u(j+8) bits 3..0 | u(j) bits 3..0 ]
    byte 8 + m:   [ u(12+m) bits 5..4 | u(8+m) 5..4 | u(4+m) 5..4 | u(m) 5..4 ]
    """
    if scales.numel() and not -32 <= int(scales.min()) <= int(scales.max()) < 32:
        raise WeightError("a sub-scale lies outside -32 to 31, which is all that Q3_K holds")
    units = (scales + 32).view(torch.uint8).reshape(len(scales), -1, 16)
    low, high = units & 15, torch.unflatten(units >> 4, 2, (4, 4))
    nibbles = low[:, :, :8] | low[:, :, 8:] << 4
    return torch.cat((nibbles, high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6), dim=2)


def _decode_q3_k(blocks: Tensor) -> dict[str, Tensor]:
    hmask, qs, packed, scale = split(blocks, 32, 64, 12, 2)
    low = torch.cat((packed[:, :, :8] & 15, packed[:, :, :8] >> 4), dim=2)
    high = torch.stack([packed[:, :, 8:] >> 2 * k & 3 for k in range(4)], dim=2).flatten(2)
    return {
        "codes": codes_of(_unquarters(qs).flatten(2, 3) | _unplanes(hmask) << 2),
        "scales": (low | high << 4).view(torch.int8) - 32,
        "super_scales": half(scale),
    }


def _scales_q4_k(scales: Tensor, minimums: Tensor) -> Tensor:
    """Pack eight 6-bit sc and eight 6-bit mn, uint8 (rows, blocks, 8) each, into 12 bytes; j = 0..3.

    byte j:       [ sc(j+4) bits 5..4 | sc(j) bits 5..0 ]
    byte 4 + j:   [ mn(j+4) bits 5..4 | mn(j) bits 5..0 ]
    byte 8 + j:   [ mn(j+4) bits 3..0 | sc(j+4) bits 3..0 ]
    """
    (sc, sc_high), (mn, mn_high) = torch.split(scales, 4, dim=2), torch.split(minimums, 4, dim=2)
    return torch.cat((sc | sc_high >> 4 << 6, mn | mn_high >> 4 << 6, sc_high & 15 | mn_high << 4), dim=2)


def _unscales_q4_k(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Undo ``_scales_q4_k``: uint8 (rows, blocks, 12) to sc and mn."""
    a, b, c = torch.split(packed, 4, dim=2)
    return torch.cat((a & 63, c & 15 | a >> 6 << 4), dim=2), torch.cat((b & 63, c >> 4 | b >> 6 << 4), dim=2)


def _head_q4_k(parts: Parts) -> tuple[Tensor, Tensor, Tensor]:
    """Return the first 16 bytes of Q4_K and Q5_K: [ d | dmin | scales 12 ]."""
    units = _scales_q4_k(_units(parts, "scales", 64, 8), _units(parts, "minimums", 64, 8))
    return parts["super_scales"].unsqueeze(2), _minimum(parts), units


def _unhead_q4_k(scale: Tensor, minimum: Tensor, packed: Tensor) -> dict[str, Tensor]:
    scales, minimums = _unscales_q4_k(packed)
    return {
        "scales": scales,
        "super_scales": half(scale),
        "minimums": minimums,
        "super_minimums": flip_sign(half(minimum)),
    }


def _encode_q4_k(parts: Parts) -> Tensor:
    return join(*_head_q4_k(parts), _nibbles(words(parts["codes"], 16, 4, 2, 4)))  # [ d | dmin | scales 12 | qs 128 ]


def _decode_q4_k(blocks: Tensor) -> dict[str, Tensor]:
    *head, qs = split(blocks, 2, 2, 12, 128)
    return {"codes": codes_of(_unnibbles(qs)), **_unhead_q4_k(*head)}


def _encode_q5_k(parts: Parts) -> Tensor:
    """[ d | dmin | scales 12 | qh 32 | qs 128 ]; bit 4 of a code goes to qh."""
    wide = words(parts["codes"], 32, 8, 4)
    high = _planes(wide >> 4 & BYTES)
    return join(*_head_q4_k(parts), high, _nibbles(torch.unflatten(wide & 0x0F * BYTES, 2, (4, 2))))


def _decode_q5_k(blocks: Tensor) -> dict[str, Tensor]:
    *head, qh, qs = split(blocks, 2, 2, 12, 32, 128)
    return {"codes": codes_of(_unnibbles(qs).flatten(2, 3) | _unplanes(qh) << 4), **_unhead_q4_k(*head)}


def _encode_q6_k(parts: Parts) -> Tensor:
    """[ ql 128 | qh 64 | scales int8 16 | d ]; t = 2a + b.

    byte 64h + 32b + l of ql, nibble a:   low bits of element 128h + 32t + l;   qh: their bits 5..4 as quarters
    """
    wide = words(parts["codes"], 64, 2, 2, 2, 4)  # (rows, blocks, h, a, b, 4)
    low = wide & 0x0F * BYTES
    ql = (low[:, :, :, 0] | low[:, :, :, 1] << 4).flatten(2)
    qh = _quarters((wide >> 4 & 0x03 * BYTES).flatten(3, 4))
    units = parts["scales"].reshape(len(ql), -1, 16)
    return join(ql, qh, units, parts["super_scales"].unsqueeze(2))


def _decode_q6_k(blocks: Tensor) -> dict[str, Tensor]:
    ql, qh, units, scale = split(blocks, 128, 64, 16, 2)
    packed = torch.unflatten(ql.view(torch.int64), 2, (2, 2, 4))  # (rows, blocks, h, b, 4)
    low = torch.stack((packed & 0x0F * BYTES, packed >> 4 & 0x0F * BYTES), dim=3)
    return {
        "codes": codes_of(low.flatten(3, 4) | _unquarters(qh) << 4),
        "scales": units.view(torch.int8),
        "super_scales": half(scale),
    }


def _encode_tq2_0(parts: Parts) -> Tensor:
    codes = _quarters(words(parts["codes"], 3, 2, 4, 4))
    return join(codes, parts["scales"].unsqueeze(2))  # [ qs 64 | d ]


def _decode_tq2_0(blocks: Tensor) -> dict[str, Tensor]:
    qs, scale = split(blocks, 64, 2)
    return {"codes": codes_of(_unquarters(qs)), "scales": half(scale)}


# TQ1_0 stores five (or four) base-3 digits in a byte as the fraction 0.d0 d1 d2 d3 d4, rounded up to 1/256: a digit is the
# integer part of three times the fraction (ggml-quants.c: quantize_row_tq1_0_ref). (first element, digits, elements apart)
_TRITS = ((0, 5, 32), (160, 5, 16), (240, 4, 4))


def _encode_tq1_0(parts: Parts) -> Tensor:
    """[ qs 48 | qh 4 | d ]; byte m of a run holds elements first + m, first + apart + m, ..."""
    check_below(parts["codes"], 3, "a code")
    codes = parts["codes"].reshape(len(parts["codes"]), -1, 256)
    fields = []
    for first, digits, apart in _TRITS:
        run = codes[:, :, first : first + digits * apart]
        trits = torch.unflatten(run, 2, (digits, apart)).to(torch.int32)
        value = sum((trits[:, :, n] * 3 ** (4 - n) for n in range(digits)), torch.zeros_like(trits[:, :, 0]))
        fields.append(((value * 256 + 242) // 243).to(torch.uint8))
    return join(*fields, parts["scales"].unsqueeze(2))


def _decode_tq1_0(blocks: Tensor) -> dict[str, Tensor]:
    *fields, scale = split(blocks, 32, 16, 4, 2)
    trits = [
        torch.stack([(field * 3**n).to(torch.int32) * 3 >> 8 for n in range(digits)], dim=2).flatten(2)
        for field, (_, digits, _) in zip(fields, _TRITS, strict=True)
    ]
    return {"codes": torch.cat(trits, dim=2).to(torch.uint8).flatten(1), "scales": half(scale)}


def _k_scales(bits: int, super_group: int, signed: bool = False) -> ScaleFormat:
    return ScaleFormat("float16", bits=bits, super_group=super_group, signed=signed)


_TERNARY = Scheme(Grid.AFFINE, 2, 256, levels=3)

PACKERS = (
    BlockPacker(
        TYPES["Q2_K"], Scheme(Grid.AFFINE, 2, 16, Zero.MINIMUM, _k_scales(4, 16)), _encode_q2_k, _decode_q2_k, (80, 82)
    ),
    BlockPacker(
        TYPES["Q3_K"], Scheme(Grid.AFFINE, 3, 16, scales=_k_scales(6, 16, True)), _encode_q3_k, _decode_q3_k, (108,)
    ),
    BlockPacker(
        TYPES["Q4_K"], Scheme(Grid.AFFINE, 4, 32, Zero.MINIMUM, _k_scales(6, 8)), _encode_q4_k, _decode_q4_k, (0, 2)
    ),
    BlockPacker(
        TYPES["Q5_K"], Scheme(Grid.AFFINE, 5, 32, Zero.MINIMUM, _k_scales(6, 8)), _encode_q5_k, _decode_q5_k, (0, 2)
    ),
    BlockPacker(
        TYPES["Q6_K"], Scheme(Grid.AFFINE, 6, 16, scales=_k_scales(8, 16, True)), _encode_q6_k, _decode_q6_k, (208,)
    ),
    BlockPacker(TYPES["TQ1_0"], _TERNARY, _encode_tq1_0, _decode_tq1_0, (52,)),
    BlockPacker(TYPES["TQ2_0"], _TERNARY, _encode_tq2_0, _decode_tq2_0, (64,)),
)
"""One packer for each type of this module."""
