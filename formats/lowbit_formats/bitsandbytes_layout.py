"""Layouts ``bnb-nf4`` and ``bnb-fp4``: two codes in a byte, blocks over the flattened weight, a fixed table of 16 values.

    buffer             dtype, shape              holds (n = out * in weights, B = group_size, G = ceil(n / B) blocks)
    weight             uint8 (ceil(n / 2), 1)    codes in row-major order, the first of each pair in the high nibble
    absmax             float32 (G,)              the scale of each block; uint8 with double quantization
    quant_map          float32 (16,)             the table: w = quant_map[code] * absmax
    nested_absmax      float32 (ceil(G / 256),)  double quantization: absmax =
    nested_quant_map   float32 (256,)                nested_quant_map[absmax] * nested_absmax + nested_offset
    nested_offset      float32 (1,)              (in files it is a number in the JSON of quant_state)

    byte:  [ c0 | c1 ] [ c2 | c3 ] ...           an odd n leaves the last low nibble, which holds the code of zero

The tables are those of ``get_4bit_type`` in bitsandbytes 0.50 (functional.py): NF4 from quantiles of a Gaussian (QLoRA, arXiv
2305.14314), FP4 with a sign, two bits of exponent and one of mantissa, in the order of the bit patterns and divided by 12.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from lowbit.errors import SchemeError
from lowbit.interfaces import Packer
from lowbit.parts import TensorSpec, part_specs
from lowbit.scheme import Across, Grid, ScaleCoding, ScaleFormat, Scheme
from lowbit.tensors import PackedTensor, QuantizedTensor
from lowbit.workers import map_ranges
from lowbit_formats.int_words import check_codes

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK = 256
SINGLE = ScaleFormat("float32")
DOUBLE = ScaleFormat("float32", bits=8, super_group=NESTED_BLOCK, coding=ScaleCoding.CODEBOOK)

_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0, 0.0, -0.0625, -8.0, -12.0, -4.0, -6.0, -2.0, -3.0)

TABLES: Mapping[str, Tensor] = MappingProxyType(
    {"nf4": torch.tensor(_NF4, dtype=torch.float32), "fp4": torch.tensor(_FP4, dtype=torch.float32) / 12}
)
"""The values of the codes, float32 (16,), by quant_type."""

_BUFFER_OF_PART = {
    "codebook": "quant_map",
    "scales": "absmax",
    "super_scales": "nested_absmax",
    "scales_codebook": "nested_quant_map",
    "scales_offset": "nested_offset",
}


class Bnb4bitPacker(Packer):
    """Packs codes of one of the two tables, with or without double quantization."""

    def __init__(self, quant_type: str) -> None:
        self.quant_type = quant_type
        self.table = TABLES[quant_type]
        self.codebook = self.table[:, None]
        self.layout = f"bnb-{quant_type}"  # type: ignore[misc]  # one instance a layout, each with its own name

    def why_not(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """Refuse all but flat 4-bit codebooks with float32 scales, or with scales quantized as bitsandbytes does."""
        if min(shape) < 1:
            return f"a weight needs rows and columns, got {shape[0]}x{shape[1]}; leave it unquantized"
        if scheme.grid is not Grid.CODEBOOK or scheme.bits != 4:
            return f"bitsandbytes holds 4-bit codebooks, not {scheme.summary()} weights; choose another format"
        if not scheme.flat or scheme.group_size not in BLOCK_SIZES:
            return (
                f"bitsandbytes has blocks of {', '.join(map(str, BLOCK_SIZES))} weights of the flattened weight, not "
                f"{'flat' if scheme.flat else 'row'} groups of {scheme.group_size or 'all'}"
            )
        if scheme.scales not in (SINGLE, DOUBLE):
            return (
                f"bitsandbytes stores scales as float32, or as bytes that a table decodes for every {NESTED_BLOCK} of them, "
                f"not as {_scales_in_words(scheme.scales)}"
            )
        if scheme != Scheme(Grid.CODEBOOK, 4, scheme.group_size, scales=scheme.scales, flat=True):
            return f"bitsandbytes has no add-ons and no vectors, which {scheme.summary()} weights have"
        return None

    def specs(self, scheme: Scheme, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        """Return the buffers in the table above."""
        parts = part_specs(scheme, shape)
        buffers = {"weight": TensorSpec(torch.uint8, ((shape[0] * shape[1] + 1) // 2, 1))}
        for part, buffer in _BUFFER_OF_PART.items():
            if part in parts:
                buffers[buffer] = TensorSpec(parts[part].dtype, (max(parts[part].shape),))
        return buffers

    def pack(self, quantized: QuantizedTensor) -> PackedTensor:
        """Pack the codes.

        Raises WeightError for a code above 15, SchemeError for another codebook than the layout's: a scheme names no
        codebook, so ``why_not`` cannot tell.
        """
        parts, spec = quantized.parts, self.spec(quantized.scheme, quantized.shape)
        if not torch.equal(parts["codebook"].flatten().cpu(), self.table):
            raise SchemeError(
                f"layout {self.layout} has a fixed codebook, {self.quant_type.upper()}, and this weight has another one; "
                "choose a format that stores codebooks, such as native"
            )
        buffers = {"weight": _pack_nibbles(parts["codes"].flatten(), int(self.table.eq(0).nonzero()[0]))[:, None]}
        for part, buffer in _BUFFER_OF_PART.items():
            if buffer in spec.buffers:
                buffers[buffer] = parts[part].flatten().contiguous()
        return PackedTensor(spec, buffers)

    def unpack(self, packed: PackedTensor) -> QuantizedTensor:
        """Undo ``pack``."""
        parts = {}
        for part, spec in part_specs(packed.scheme, packed.shape).items():
            if part == "codes":
                parts[part] = _unpack_nibbles(packed.buffers["weight"].flatten(), packed.shape)
            else:
                parts[part] = packed.buffers[_BUFFER_OF_PART[part]].reshape(spec.shape)
        return QuantizedTensor(packed.scheme, packed.shape, parts)


def _pack_nibbles(codes: Tensor, padding: int) -> Tensor:
    """Pack uint8 codes (n,) into bytes (ceil(n / 2),), the first of each pair in the high nibble."""
    if len(codes) % 2:
        codes = torch.nn.functional.pad(codes, (0, 1), value=padding)
    pairs = codes.reshape(-1, 2)
    packed = torch.empty(len(pairs), dtype=torch.uint8, device=codes.device)

    def pack(start: int, stop: int) -> None:
        check_codes(pairs[start:stop], 4)
        packed[start:stop] = pairs[start:stop, 0] << 4 | pairs[start:stop, 1]

    map_ranges(pack, len(pairs), 2)
    return packed


def _unpack_nibbles(packed: Tensor, shape: tuple[int, int]) -> Tensor:
    """Undo ``_pack_nibbles``: uint8 codes of ``shape``."""
    codes = torch.empty(len(packed), 2, dtype=torch.uint8, device=packed.device)

    def unpack(start: int, stop: int) -> None:
        codes[start:stop, 0] = packed[start:stop] >> 4
        codes[start:stop, 1] = packed[start:stop] & 15

    map_ranges(unpack, len(packed), 2)
    return codes.flatten()[: shape[0] * shape[1]].reshape(shape)


def _scales_in_words(scales: ScaleFormat) -> str:
    if not scales.two_level:
        return scales.dtype
    where = "rows" if scales.across is Across.ROWS else "groups"
    return f"{scales.bits}-bit {scales.coding.value} codes of {scales.super_group or 'all'} {where} by {scales.dtype}"
