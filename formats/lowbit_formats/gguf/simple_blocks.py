"""Blocks with one fp16 scale and perhaps one fp16 minimum: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, IQ4_NL, MXFP4, Q2_0, Q1_0.

Nibbles of 32 weights take 16 bytes; element e < 16 is the low nibble of byte e, element e + 16 the high one::

    byte e:  [ q(e+16) | q(e) ]
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.bits import pack_bits, unpack_bits
from lowbit.scheme import Binary, Grid, ScaleFormat, Scheme, Zero
from lowbit_formats.gguf.block_types import TYPES
from lowbit_formats.gguf.nibble_blocks import ByteBlockPacker, NibbleBlockPacker
from lowbit_formats.gguf.packing import (
    BYTES,
    BlockPacker,
    Parts,
    aligned,
    check_below,
    codes_of,
    flip_sign,
    half,
    join,
    split,
    words,
)

# ggml-common.h: kvalues_iq4nl, kvalues_mxfp4. ggml keeps the E2M1 values doubled and halves the scale; here the values are
# E2M1's own and the scale is 2**(e - 127). Code 8 is +0 in ggml's table, where E2M1 has -0.
IQ4_NL_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
MXFP4_VALUES = (0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6)


def _nibbles(codes: Tensor) -> Tensor:
    """Pack codes (rows, 32 blocks) below 16 into int64 (rows, blocks, 2): 16 bytes a block."""
    return _join_nibbles(words(codes, 16, 2, 2))


def _join_nibbles(pair: Tensor) -> Tensor:
    """Pack int64 words (rows, blocks, 2, 2): the first half of each block goes low, the second high."""
    return pair[:, :, 0] | pair[:, :, 1] << 4


def _split_nibbles(qs: Tensor) -> Tensor:
    """Undo ``_join_nibbles``: uint8 (rows, blocks, 16) to int64 words (rows, blocks, 2, 2)."""
    packed = qs.view(torch.int64)
    return torch.stack((packed & 0x0F * BYTES, packed >> 4 & 0x0F * BYTES), dim=2)


def _one(scales: Tensor) -> Tensor:
    return scales.unsqueeze(2)


def _encode_q4_0(parts: Parts) -> Tensor:
    return join(_one(parts["scales"]), _nibbles(parts["codes"]))  # [ d | qs 16 ]


def _decode_q4_0(blocks: Tensor) -> dict[str, Tensor]:
    scales, qs = split(blocks, 2, 16)
    return {"codes": codes_of(_split_nibbles(qs)), "scales": half(scales)}


def _encode_q4_1(parts: Parts) -> Tensor:
    return join(_one(parts["scales"]), _one(parts["minimums"]), _nibbles(parts["codes"]))  # [ d | m | qs 16 ]


def _decode_q4_1(blocks: Tensor) -> dict[str, Tensor]:
    scales, minimums, qs = split(blocks, 2, 2, 16)
    return {"codes": codes_of(_split_nibbles(qs)), "scales": half(scales), "minimums": half(minimums)}


def _fives(codes: Tensor) -> tuple[Tensor, Tensor]:
    """Cut 5-bit codes into qh (bit e: the fifth bit of element e) and the nibbles qs."""
    wide = words(codes, 32, 2, 2)
    top = codes_of(wide >> 4 & BYTES)
    qh = pack_bits(top, 1).view(len(codes), -1, 4)
    return qh, _join_nibbles(wide & 0x0F * BYTES)


def _unfives(qh: Tensor, qs: Tensor) -> Tensor:
    """Undo ``_fives``: 5-bit codes (rows, columns)."""
    rows, blocks = qh.shape[:2]
    top = unpack_bits(qh.view(rows, -1), 1, blocks * 32).view(torch.int64)
    return codes_of(_split_nibbles(qs).view(rows, -1) | top << 4)


def _encode_q5_0(parts: Parts) -> Tensor:
    return join(_one(parts["scales"]), *_fives(parts["codes"]))  # [ d | qh 4 | qs 16 ]


def _decode_q5_0(blocks: Tensor) -> dict[str, Tensor]:
    scales, qh, qs = split(blocks, 2, 4, 16)
    return {"codes": _unfives(qh, qs), "scales": half(scales)}


def _encode_q5_1(parts: Parts) -> Tensor:
    return join(_one(parts["scales"]), _one(parts["minimums"]), *_fives(parts["codes"]))  # [ d | m | qh 4 | qs 16 ]


def _decode_q5_1(blocks: Tensor) -> dict[str, Tensor]:
    scales, minimums, qh, qs = split(blocks, 2, 2, 4, 16)
    return {"codes": _unfives(qh, qs), "scales": half(scales), "minimums": half(minimums)}


def _encode_q8_0(parts: Parts) -> Tensor:
    values = words(parts["codes"], 256, 4) ^ _SIGNS  # code - 128 as int8: flip the top bit
    return join(_one(parts["scales"]), values)  # [ d | int8 32 ]


def _decode_q8_0(blocks: Tensor) -> dict[str, Tensor]:
    scales, values = split(blocks, 2, 32)
    return {"codes": codes_of(values.view(torch.int64) ^ _SIGNS), "scales": half(scales)}


def _encode_mxfp4(parts: Parts) -> Tensor:
    return join(_one(parts["scales"]), _nibbles(parts["codes"]))  # [ E8M0 | qs 16 ]


def _decode_mxfp4(blocks: Tensor) -> dict[str, Tensor]:
    scales, qs = split(blocks, 1, 16)
    return {"codes": codes_of(_split_nibbles(qs)), "scales": scales.view(torch.float8_e8m0fnu).squeeze(2)}


def _encode_q2_0(parts: Parts) -> Tensor:
    """[ d | qs 16 ]: Q2_0 means d * (c - 1), the symmetric grid s * (q - 2); c = 3 - q and d = -s are the same values."""
    codes = parts["codes"]
    check_below(codes, 4, "a code")
    mirrored = pack_bits(3 - codes, 2).view(len(codes), -1, 16)
    return join(_one(flip_sign(parts["scales"])), mirrored)


def _decode_q2_0(blocks: Tensor) -> dict[str, Tensor]:
    scales, qs = split(blocks, 2, 16)
    mirrored = unpack_bits(qs.view(len(qs), -1), 2, 64 * qs.shape[1])
    return {"codes": 3 - mirrored, "scales": flip_sign(half(scales))}


def _encode_q1_0(parts: Parts) -> Tensor:
    planes = parts["planes"]
    check_below(planes, 2, "a sign")
    signs = pack_bits(aligned(planes), 1).view(len(planes), -1, 16)
    return join(_one(parts["scales"]), signs)  # [ d | bits 16 ]: bit e set means +d, clear means -d


def _decode_q1_0(blocks: Tensor) -> dict[str, Tensor]:
    scales, signs = split(blocks, 2, 16)
    return {"planes": unpack_bits(signs.view(len(signs), -1), 1, 128 * signs.shape[1]), "scales": half(scales)}


_SIGNS = 0x80 * BYTES - (1 << 64)  # as a signed int64


def _affine(bits: int, zero: Zero = Zero.SYMMETRIC, group_size: int = 32) -> Scheme:
    return Scheme(Grid.AFFINE, bits, group_size, zero)


PACKERS = (
    NibbleBlockPacker(TYPES["Q4_0"], _affine(4), _encode_q4_0, _decode_q4_0, (0,)),
    NibbleBlockPacker(TYPES["Q4_1"], _affine(4, Zero.MINIMUM), _encode_q4_1, _decode_q4_1, (0, 2)),
    BlockPacker(TYPES["Q5_0"], _affine(5), _encode_q5_0, _decode_q5_0, (0,)),
    BlockPacker(TYPES["Q5_1"], _affine(5, Zero.MINIMUM), _encode_q5_1, _decode_q5_1, (0, 2)),
    ByteBlockPacker(TYPES["Q8_0"], _affine(8), _encode_q8_0, _decode_q8_0, (0,)),
    BlockPacker(TYPES["Q2_0"], _affine(2, group_size=64), _encode_q2_0, _decode_q2_0, (0,)),
    BlockPacker(TYPES["Q1_0"], Scheme(Grid.BINARY, 1, 128, binary=Binary(1)), _encode_q1_0, _decode_q1_0, (0,)),
    BlockPacker(
        TYPES["IQ4_NL"], Scheme(Grid.CODEBOOK, 4, 32), _encode_q4_0, _decode_q4_0, (0,), codebook=IQ4_NL_VALUES
    ),
    BlockPacker(
        TYPES["MXFP4"],
        Scheme(Grid.CODEBOOK, 4, 32, scales=ScaleFormat("float8_e8m0fnu")),
        _encode_mxfp4,
        _decode_mxfp4,
        (),
        codebook=MXFP4_VALUES,
    ),
)
"""One packer for each type of this module."""
