"""Layout ``mlx-affine``: codes of a row as one bit stream in 32-bit words, a float scale and a float minimum for each group.

    buffer    dtype, shape                  holds (k = bits, g = group_size)
    weight    uint32 (out, in * k / 32)     code i in bits [k*i, k*i + k) of the row's stream (lowbit.bits), low word first
    scales    float (out, in / g)           w = scales * code + biases; float16, bfloat16 or float32
    biases    float (out, in / g)           the minimum of each group, not the bias of the layer

    k = 3, word 0, bit 31 on the left:   [ kk jjj iii ... ccc bbb aaa ]      code k, the eleventh, goes on in word 1

Source: ``mlx.core.quantize`` of mlx 0.32, whose packing the oracle tests compare bit by bit.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lowbit.parts import TensorSpec, part_specs
from lowbit.scheme import Grid, ScaleFormat, Scheme, Zero
from lowbit.streams import StreamPacker
from lowbit.tensors import PackedTensor, QuantizedTensor
from lowbit_formats.affine_rules import AffineRules
from lowbit_formats.int_words import pack_across, unpack_across, word_count

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
RULES = AffineRules(
    "MLX",
    BITS,
    (Zero.MINIMUM,),
    ("float16", "bfloat16", "float32"),
    elsewhere="symmetric weights have an exact minimum, which a conversion finds by itself; others need other codes",
)


def mlx_scheme(bits: int, group_size: int, dtype: str = "float16") -> Scheme:
    """Return the scheme of an MLX weight."""
    return Scheme(Grid.AFFINE, bits, group_size, Zero.MINIMUM, ScaleFormat(dtype))


class MlxPacker(StreamPacker):
    """Packs affine codes with minimums, as ``mlx.core.quantize`` in its mode ``affine``."""

    layout = "mlx-affine"

    def why_not(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """Refuse other grids and zeros, bits, groups and dtypes that MLX has not, and rows that are not whole groups."""
        if reason := RULES.why_not(scheme):
            return reason
        if scheme.group_size not in GROUP_SIZES:
            sizes = ", ".join(map(str, GROUP_SIZES))
            return f"MLX has groups of {sizes} weights, not of {scheme.group_size or 'the whole row'}"
        if min(shape) < 1 or shape[1] % scheme.group_size:
            return (
                f"MLX needs whole groups: {scheme.group_size} does not divide in_features {shape[1]}; choose a smaller group, "
                "or leave the weight unquantized"
            )
        return None

    def specs(self, scheme: Scheme, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        """Return the buffers in the table above."""
        parts = part_specs(scheme, shape)
        weight = TensorSpec(torch.uint32, (shape[0], word_count(shape[1], scheme.bits)))
        return {"weight": weight, "scales": parts["scales"], "biases": parts["minimums"]}

    def row_buffers(self, scheme: Scheme, shape: tuple[int, int]) -> frozenset[str]:
        """All of them."""
        return frozenset(self.specs(scheme, shape))

    def pack(self, quantized: QuantizedTensor) -> PackedTensor:
        """Pack the codes; raises WeightError for a code of more bits than the scheme has."""
        parts = quantized.parts
        buffers = {
            "weight": pack_across(parts["codes"], quantized.scheme.bits).view(torch.uint32),
            "scales": parts["scales"].contiguous(),
            "biases": parts["minimums"].contiguous(),
        }
        return PackedTensor(self.spec(quantized.scheme, quantized.shape), buffers)

    def unpack(self, packed: PackedTensor) -> QuantizedTensor:
        """Undo ``pack``."""
        words = packed.buffers["weight"].view(torch.int32)
        codes = unpack_across(words, packed.scheme.bits, packed.shape[1])
        parts = {"codes": codes, **self.read_parts(packed, 0, packed.shape[0])}
        return QuantizedTensor(packed.scheme, packed.shape, parts)

    def read_parts(self, packed: PackedTensor, start: int, stop: int) -> dict[str, Tensor]:
        """Return scales and minimums of some rows."""
        return {"scales": packed.buffers["scales"][start:stop], "minimums": packed.buffers["biases"][start:stop]}

    def write_parts(self, packed: PackedTensor, start: int, stop: int, parts: Mapping[str, Tensor]) -> None:
        """Write scales and minimums of some rows."""
        packed.buffers["scales"][start:stop] = parts["scales"]
        packed.buffers["biases"][start:stop] = parts["minimums"]

    def streams(self, packed: PackedTensor, start: int, stop: int) -> Tensor:
        """Return rows of the codes: they are streams."""
        return packed.buffers["weight"].view(torch.int32)[start:stop]

    def put_streams(self, packed: PackedTensor, start: int, stop: int, streams: Tensor) -> None:
        """Copy rows of the codes."""
        packed.buffers["weight"].view(torch.int32)[start:stop] = streams
