"""Layouts ``gptq`` and ``gptq_v2``: the four tensors of a GPTQ module, as AutoGPTQ and GPTQModel store them.

    buffer    dtype, shape                     holds
    qweight   int32 (in * b / 32, out)         codes: one stream down each column, along in_features
    qzeros    int32 (groups, out * b / 32)     zero points: one stream along each row; v1 stores z - 1, v2 stores z
    scales    float16 or bfloat16 (groups, out)
    g_idx     int32 (in,)                      the group of each input column; i // group_size without act-order

v1 (``gptq``, what every loader reads) has no portable word for z = 0: z - 1 borrows from its neighbours, and readers disagree
about the result. So this layout holds symmetric weights only, whose z is 2**(b-1) everywhere; v2 holds the others. The
version of a symmetric file is a label on a constant, and the importer drops it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from lowbit.parts import TensorSpec, torch_dtype
from lowbit.scheme import Scheme, Zero
from lowbit.streams import StreamPacker
from lowbit.tensors import PackedTensor, QuantizedTensor
from lowbit_formats.affine_rules import AffineRules, sequential_index, zero_codes
from lowbit_formats.int_words import (
    constant_words,
    pack_down,
    pack_words,
    turn_into,
    turned,
    unpack_down,
    unpack_words,
    word_count,
)

BITS = (2, 3, 4, 5, 6, 7, 8)
"""Widths of the layout; GPTQ files have 2, 3, 4 and 8, auto-round's also 5, 6 and 7."""


class GptqPacker(StreamPacker):
    """GPTQ with v1 zeros, for symmetric weights."""

    layout = "gptq"
    stream_rows = 64
    rules: ClassVar[AffineRules] = AffineRules(
        "layout 'gptq'",
        BITS,
        (Zero.SYMMETRIC,),
        permutation=True,
        elsewhere="a zero point of 0 has no portable code there, but has one in 'gptq_v2', 'awq-gemm' and 'ct-pack'",
    )

    def why_not(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """Refuse other schemes, and shapes that are not whole words along either axis."""
        return self.rules.why_not(scheme) or why_not_whole_words(self.rules.owner, scheme.bits, shape)

    def specs(self, scheme: Scheme, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        """Return the four buffers; see the table above."""
        (rows, columns), groups = shape, scheme.groups(shape)
        return {
            "qweight": TensorSpec(torch.int32, (word_count(columns, scheme.bits), rows)),
            "qzeros": TensorSpec(torch.int32, (groups, word_count(rows, scheme.bits))),
            "scales": TensorSpec(torch_dtype(scheme.scales.dtype), (groups, rows)),
            "g_idx": TensorSpec(torch.int32, (columns,)),
        }

    def pack(self, quantized: QuantizedTensor) -> PackedTensor:
        """Arrange the parts. Raises WeightError for a code or a zero that its field cannot hold."""
        spec, device = self.spec(quantized.scheme, quantized.shape), quantized.parts["codes"].device
        empty = {name: torch.empty(it.shape, dtype=it.dtype, device=device) for name, it in spec.buffers.items()}
        codes = pack_down(quantized.parts["codes"], quantized.scheme.bits)
        packed = PackedTensor(spec, {**empty, "qweight": codes})
        self.write_parts(packed, 0, quantized.shape[0], quantized.parts)
        return packed

    def unpack(self, packed: PackedTensor) -> QuantizedTensor:
        """Undo ``pack``."""
        scheme, (rows, columns) = packed.scheme, packed.shape
        codes = unpack_down(packed.buffers["qweight"], scheme.bits, columns)
        return QuantizedTensor(scheme, packed.shape, {"codes": codes, **self.read_parts(packed, 0, rows)})

    def read_parts(self, packed: PackedTensor, start: int, stop: int) -> dict[str, Tensor]:
        """Return scales and zeros of some rows, and the index of groups."""
        scheme, buffers = packed.scheme, packed.buffers
        parts = {"scales": turned(buffers["scales"][:, start:stop])}
        if scheme.zero is Zero.INTEGER:
            words = buffers["qzeros"][:, start * scheme.bits // 32 : word_count(stop, scheme.bits)]
            zeros = unpack_words(words, scheme.bits, stop - start)  # (groups, out)
            parts["zeros"] = zeros.T.to(torch.int16).contiguous()
        if scheme.permutation:
            parts["group_index"] = buffers["g_idx"]
        return parts

    def write_parts(self, packed: PackedTensor, start: int, stop: int, parts: Mapping[str, Tensor]) -> None:
        """Write scales and zeros of some rows, and the index of groups with the first."""
        scheme, buffers = packed.scheme, packed.buffers
        turn_into(buffers["scales"][:, start:stop], parts["scales"])
        words = buffers["qzeros"][:, start * scheme.bits // 32 : word_count(stop, scheme.bits)]
        words.copy_(self._pack_zeros(scheme, (stop - start, packed.shape[1]), parts))
        if start == 0:
            sequential = sequential_index(packed.shape[1], scheme.group_size)
            buffers["g_idx"].copy_(parts["group_index"] if scheme.permutation else sequential)

    def streams(self, packed: PackedTensor, start: int, stop: int) -> Tensor:
        """Return columns of words as rows."""
        return turned(packed.buffers["qweight"][:, start:stop])

    def put_streams(self, packed: PackedTensor, start: int, stop: int, streams: Tensor) -> None:
        """Write rows of words as columns."""
        turn_into(packed.buffers["qweight"][:, start:stop], streams)

    def _pack_zeros(self, scheme: Scheme, shape: tuple[int, int], parts: Mapping[str, Tensor]) -> Tensor:
        return symmetric_zeros(scheme, shape, version=1)


class GptqV2Packer(GptqPacker):
    """GPTQ with v2 zeros, for weights with a zero point of their own."""

    layout = "gptq_v2"
    rules: ClassVar[AffineRules] = AffineRules(
        "layout 'gptq_v2'",
        BITS,
        (Zero.INTEGER,),
        permutation=True,
        elsewhere="symmetric weights have the layout 'gptq', float zeros 'plain'",
    )

    def _pack_zeros(self, scheme: Scheme, shape: tuple[int, int], parts: Mapping[str, Tensor]) -> Tensor:
        return pack_words(zero_codes(parts["zeros"], scheme.bits).T, scheme.bits)


def symmetric_zeros(scheme: Scheme, shape: tuple[int, int], version: int) -> Tensor:
    """Return the qzeros of a symmetric weight: 2**(b-1) - 1 in every field for version 1, 2**(b-1) for version 2."""
    field = 2 ** (scheme.bits - 1) - (version == 1)
    row = constant_words(field, scheme.bits, shape[0])
    return row.repeat(scheme.groups(shape), 1)


def why_not_whole_words(owner: str, bits: int, shape: tuple[int, int]) -> str | None:
    """Return None when streams along both axes of a weight (out, in) end with a word, else the reason."""
    if min(shape) < 1:
        return f"a weight needs rows and columns, got {shape[0]}x{shape[1]}; leave it unquantized"
    for side, length in (("out_features", shape[0]), ("in_features", shape[1])):
        if length * bits % 32:
            step = 32 // bits if 32 % bits == 0 else 32
            return (
                f"{owner} needs {side} that are a multiple of {step} at {bits} bits, got {length}; leave the weight "
                "unquantized, or choose the format 'compressed-tensors'"
            )
    return None


PACKERS = (GptqPacker(), GptqV2Packer())
