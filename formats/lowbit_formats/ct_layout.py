"""Layout ``ct-pack``: the tensors of a compressed-tensors module in its format ``pack-quantized``.

    buffer              dtype, shape                       holds
    weight_packed       int32 (out, ceil(in * b / 32))     codes: one dense stream along each row
    weight_scale        float (out, groups)
    weight_zero_point   int32 (ceil(out * b / 32), groups) INTEGER only: one dense stream down each column
    weight_shape        int64 (2,)                         out, in
    weight_g_idx        int32 (in,)                        with a permutation only (removed from the format in August 2026)

compressed-tensors stores the signed value ``code - 2**(b-1)`` plus 2**(b-1), which is the code. Before its version 0.20 the
codes of 3, 5, 6 and 7 bits were padded, floor(32 / b) to a word; the importer reads that and makes this of it.
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
from lowbit.workers import map_ranges
from lowbit_formats.affine_rules import HALVES, AffineRules, zero_codes
from lowbit_formats.int_words import pack_across, pack_words, unpack_across, unpack_words, word_count


class CtPacker(StreamPacker):
    """compressed-tensors, format pack-quantized, dense."""

    layout = "ct-pack"
    stream_rows = 32
    rules: ClassVar[AffineRules] = AffineRules(
        "layout 'ct-pack'", (2, 3, 4, 5, 6, 7, 8), scales=(*HALVES, "float32"), permutation=True
    )

    def why_not(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """Refuse other schemes and empty weights."""
        if reason := self.rules.why_not(scheme):
            return reason
        if min(shape) < 1:
            return f"a weight needs rows and columns, got {shape[0]}x{shape[1]}; leave it unquantized"
        return None

    def specs(self, scheme: Scheme, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        """Return the buffers; see the table above."""
        (rows, columns), groups = shape, scheme.groups(shape)
        buffers = {
            "weight_packed": TensorSpec(torch.int32, (rows, word_count(columns, scheme.bits))),
            "weight_scale": TensorSpec(torch_dtype(scheme.scales.dtype), (rows, groups)),
        }
        if scheme.zero is Zero.INTEGER:
            buffers["weight_zero_point"] = TensorSpec(torch.int32, (word_count(rows, scheme.bits), groups))
        buffers["weight_shape"] = TensorSpec(torch.int64, (2,))
        if scheme.permutation:
            buffers["weight_g_idx"] = TensorSpec(torch.int32, (columns,))
        return buffers

    def pack(self, quantized: QuantizedTensor) -> PackedTensor:
        """Arrange the parts. Raises WeightError for a code or a zero that its field cannot hold."""
        spec, device = self.spec(quantized.scheme, quantized.shape), quantized.parts["codes"].device
        empty = {name: torch.empty(it.shape, dtype=it.dtype, device=device) for name, it in spec.buffers.items()}
        codes = pack_across(quantized.parts["codes"], quantized.scheme.bits)
        packed = PackedTensor(spec, {**empty, "weight_packed": codes})
        self.write_parts(packed, 0, quantized.shape[0], quantized.parts)
        return packed

    def unpack(self, packed: PackedTensor) -> QuantizedTensor:
        """Undo ``pack``."""
        scheme, (rows, columns) = packed.scheme, packed.shape
        codes = unpack_across(packed.buffers["weight_packed"], scheme.bits, columns)
        return QuantizedTensor(scheme, packed.shape, {"codes": codes, **self.read_parts(packed, 0, rows)})

    def read_parts(self, packed: PackedTensor, start: int, stop: int) -> dict[str, Tensor]:
        """Return scales and zeros of some rows, and the index of groups."""
        scheme, buffers = packed.scheme, packed.buffers
        parts = {"scales": buffers["weight_scale"][start:stop]}
        if scheme.zero is Zero.INTEGER:
            words = buffers["weight_zero_point"][start * scheme.bits // 32 : word_count(stop, scheme.bits)]
            zeros = unpack_words(words.T, scheme.bits, stop - start)  # (groups, out)
            parts["zeros"] = zeros.T.to(torch.int16).contiguous()
        if scheme.permutation:
            parts["group_index"] = buffers["weight_g_idx"]
        return parts

    def write_parts(self, packed: PackedTensor, start: int, stop: int, parts: Mapping[str, Tensor]) -> None:
        """Write scales and zeros of some rows; shape and index of groups with the first."""
        scheme, buffers = packed.scheme, packed.buffers
        buffers["weight_scale"][start:stop] = parts["scales"]
        if scheme.zero is Zero.INTEGER:
            columns = zero_codes(parts["zeros"], scheme.bits).T  # (groups, out)
            words = buffers["weight_zero_point"][start * scheme.bits // 32 : word_count(stop, scheme.bits)]
            words.copy_(pack_words(columns, scheme.bits).T)
        if start == 0:
            buffers["weight_shape"].copy_(torch.tensor(packed.shape))
            if scheme.permutation:
                buffers["weight_g_idx"].copy_(parts["group_index"])

    def streams(self, packed: PackedTensor, start: int, stop: int) -> Tensor:
        """Return rows of the codes: they are streams."""
        return packed.buffers["weight_packed"][start:stop]

    def put_streams(self, packed: PackedTensor, start: int, stop: int, streams: Tensor) -> None:
        """Copy rows of the codes."""
        packed.buffers["weight_packed"][start:stop] = streams


def padded_width(codes: int, bits: int) -> int:
    """Return the words of a padded stream, floor(32 / bits) codes in each."""
    return -(-codes // (32 // bits))


def unpad_words(words: Tensor, bits: int, columns: int) -> Tensor:
    """Turn padded streams (rows, padded_width(columns, bits)) into dense ones (rows, word_count(columns, bits))."""
    rows = words.shape[0]
    dense = torch.empty(rows, word_count(columns, bits), dtype=torch.int32)
    shifts = torch.arange(0, 32 - bits + 1, bits, dtype=torch.int32)

    def work(start: int, stop: int) -> None:
        codes = words[start:stop].unsqueeze(-1) >> shifts & (1 << bits) - 1  # (rows, words, codes of a word)
        dense[start:stop] = pack_words(codes.flatten(1)[:, :columns].to(torch.uint8), bits)

    map_ranges(work, rows, columns)
    return dense


PACKERS = (CtPacker(),)
