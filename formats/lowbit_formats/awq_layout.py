"""Layout ``awq-gemm``: the three tensors of an AWQ module, as AutoAWQ's GEMM version stores them. 4 bits only.

    buffer    dtype, shape                holds
    qweight   int32 (in, out / 8)         codes of eight output columns in a word, interleaved
    qzeros    int32 (groups, out / 8)     zero points as they are, interleaved the same way; symmetric: 0x88888888
    scales    float16 or bfloat16 (groups, out)

    bit 31                                                      bit 0
    [ 8c+7 | 8c+5 ][ 8c+3 | 8c+1 ][ 8c+6 | 8c+4 ][ 8c+2 |   8c ]            columns in word c, two to a byte

The activation scales of the AWQ method are folded into other weights: to a file it is one more 4-bit weight.
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
from lowbit_formats import awq_streams
from lowbit_formats.affine_rules import AffineRules, zero_codes
from lowbit_formats.int_words import (
    CACHE_LINE,
    check_codes,
    constant_words,
    pack_words,
    turn_into,
    turned,
    unpack_words,
)

BITS = 4
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Nibble n of a word, counted from bit 0, holds column ``8c + ORDER[n]``."""
PLACES = tuple(ORDER.index(column) for column in range(8))
LOW, HIGH = list(ORDER[0::2]), list(ORDER[1::2])
"""Columns in the low and in the high nibbles of bytes 0 to 3."""


class AwqPacker(StreamPacker):
    """AWQ, version gemm."""

    layout = "awq-gemm"
    stream_rows = 8 * CACHE_LINE
    rules: ClassVar[AffineRules] = AffineRules("layout 'awq-gemm'", (BITS,))

    def why_not(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """Refuse other schemes, a partial last group, and output columns that are not whole words."""
        if reason := self.rules.why_not(scheme):
            return reason
        if min(shape) < 1:
            return f"a weight needs rows and columns, got {shape[0]}x{shape[1]}; leave it unquantized"
        if shape[0] % 8:
            return (
                f"layout 'awq-gemm' needs out_features that are a multiple of 8, got {shape[0]}; leave it unquantized"
            )
        if shape[1] % (scheme.group_size or shape[1]):
            return (
                f"layout 'awq-gemm' has no partial group: {scheme.group_size} does not divide in_features {shape[1]}; "
                "choose another group size, or the format 'gptq'"
            )
        return None

    def specs(self, scheme: Scheme, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        """Return the three buffers; see the table above."""
        (rows, columns), groups = shape, scheme.groups(shape)
        return {
            "qweight": TensorSpec(torch.int32, (columns, rows // 8)),
            "qzeros": TensorSpec(torch.int32, (groups, rows // 8)),
            "scales": TensorSpec(torch_dtype(scheme.scales.dtype), (groups, rows)),
        }

    def pack(self, quantized: QuantizedTensor) -> PackedTensor:
        """Arrange the parts. Raises WeightError for a code or a zero above 15."""
        spec, device = self.spec(quantized.scheme, quantized.shape), quantized.parts["codes"].device
        empty = {name: torch.empty(it.shape, dtype=it.dtype, device=device) for name, it in spec.buffers.items()}
        packed = PackedTensor(spec, {**empty, "qweight": _pack_codes(quantized.parts["codes"])})
        self.write_parts(packed, 0, quantized.shape[0], quantized.parts)
        return packed

    def unpack(self, packed: PackedTensor) -> QuantizedTensor:
        """Undo ``pack``."""
        codes = _unpack_codes(packed.buffers["qweight"])
        parts = {"codes": codes, **self.read_parts(packed, 0, packed.shape[0])}
        return QuantizedTensor(packed.scheme, packed.shape, parts)

    def read_parts(self, packed: PackedTensor, start: int, stop: int) -> dict[str, Tensor]:
        """Return scales and zeros of some rows."""
        parts = {"scales": turned(packed.buffers["scales"][:, start:stop])}
        if packed.scheme.zero is Zero.INTEGER:
            words = packed.buffers["qzeros"][:, start // 8 : stop // 8]
            zeros = unpack_words(words, BITS, stop - start)  # (groups, out), interleaved
            in_order = zeros.view(-1, 8)[:, PLACES].view(zeros.shape)
            parts["zeros"] = in_order.T.to(torch.int16).contiguous()
        return parts

    def write_parts(self, packed: PackedTensor, start: int, stop: int, parts: Mapping[str, Tensor]) -> None:
        """Write scales and zeros of some rows."""
        scheme = packed.scheme
        turn_into(packed.buffers["scales"][:, start:stop], parts["scales"])
        if scheme.zero is Zero.INTEGER:
            zeros = pack_zeros(zero_codes(parts["zeros"], BITS).T)
        else:
            zeros = symmetric_zeros(scheme, (stop - start, packed.shape[1]))
        packed.buffers["qzeros"][:, start // 8 : stop // 8] = zeros

    def streams(self, packed: PackedTensor, start: int, stop: int) -> Tensor:
        """Turn words of eight rows into words of eight columns."""
        return awq_streams.streams(packed.buffers["qweight"][:, start // 8 : stop // 8])

    def put_streams(self, packed: PackedTensor, start: int, stop: int, streams: Tensor) -> None:
        """Turn words of eight columns into words of eight rows."""
        awq_streams.put(packed.buffers["qweight"][:, start // 8 : stop // 8], streams)

    def holds_streams(self, packed: PackedTensor, start: int, stop: int, streams: Tensor) -> bool:
        """Compare words of eight columns in registers."""
        found = awq_streams.same(packed.buffers["qweight"][:, start // 8 : stop // 8], streams)
        return super().holds_streams(packed, start, stop, streams) if found is None else found


def pack_zeros(zeros: Tensor) -> Tensor:
    """Pack uint8 zeros (groups, out) into int32 (groups, out / 8)."""
    groups = zeros.shape[0]
    interleaved = zeros.reshape(-1, 8)[:, ORDER]
    return pack_words(interleaved.reshape(groups, -1), BITS)


def symmetric_zeros(scheme: Scheme, shape: tuple[int, int]) -> Tensor:
    """Return the qzeros of a symmetric weight: 0x88888888 everywhere."""
    return constant_words(scheme.midpoint, BITS, shape[0]).repeat(scheme.groups(shape), 1)


def _pack_codes(codes: Tensor) -> Tensor:
    """Pack uint8 (out, in) into int32 (in, out / 8), eight rows to a word column, a block of columns at a time."""
    rows, columns = codes.shape
    words = torch.empty(columns, rows // 8, dtype=torch.int32, device=codes.device)

    def work(start: int, stop: int) -> None:
        check_codes(codes[8 * start : 8 * stop], BITS)
        octets = codes[8 * start : 8 * stop].reshape(stop - start, 8, columns)
        found = torch.zeros(stop - start, columns, dtype=torch.int32, device=codes.device)
        for byte, (low, high) in enumerate(zip(LOW, HIGH, strict=True)):
            found |= (octets[:, low] | octets[:, high] << 4).to(torch.int32) << 8 * byte
        words[:, start:stop] = found.T

    map_ranges(work, rows // 8, 8 * columns, CACHE_LINE)
    return words


def _unpack_codes(words: Tensor) -> Tensor:
    """Undo ``_pack_codes``."""
    columns, octets = words.shape
    codes = torch.empty(octets, 8, columns, dtype=torch.uint8, device=words.device)

    def work(start: int, stop: int) -> None:
        block = words[:, start:stop].T.contiguous()  # (octets, in)
        lower, upper = block & 0x0F0F0F0F, (block >> 4).bitwise_and_(0x0F0F0F0F)
        for byte, (low, high) in enumerate(zip(LOW, HIGH, strict=True)):
            codes[start:stop, low] = lower >> 8 * byte  # an int32 becomes a uint8 by its lowest byte
            codes[start:stop, high] = upper >> 8 * byte

    map_ranges(work, octets, 8 * columns, CACHE_LINE)
    return codes.view(8 * octets, columns)


PACKERS = (AwqPacker(),)
