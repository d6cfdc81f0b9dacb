"""Layout ``plain``: every scheme of the vocabulary, stored without tricks. Codes are dense bit streams, one for each row.

    part of the quantized tensor      buffer                      bytes
    codes, AFFINE and CODEBOOK        qweight                     little-endian k-bit stream (lowbit.bits) in each row
    codes of 9 to 16 bits             qweight, qweight_high       the low 8 bits, and a (k - 8)-bit stream of the rest
    planes, left, right (BINARY)      the same name               1-bit streams along the last dimension
    everything else                   the same name               as it is

    k = 4:   byte 0          byte 1          ...      k = 3:   byte 0      byte 1      byte 2
             [ c1 | c0 ]     [ c3 | c2 ]                       [cc bbb aaa][f eee ddd c][hhh ggg ff]   (bit 7 on the left)

Integer zeros stay int16: a zero may lie outside the codes (GPTQ allows ``2**bits``), and this layout is exact for every value
that the part can hold. With groups of 128 they cost 0.125 bits a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from lowbit.bits import pack_bits, packed_width, unpack_bits
from lowbit.errors import WeightError
from lowbit.hookspecs import hookimpl
from lowbit.interfaces import Kernel, Packer
from lowbit.kernels import ReferenceKernel
from lowbit.parts import TensorSpec, part_specs
from lowbit.scheme import BinaryForm, Grid, Scheme
from lowbit.tensors import PackedTensor, QuantizedTensor, row_parts
from lowbit.workers import map_ranges


class PlainPacker(Packer):
    """Stores every scheme exactly; the layout to fall back on, and the one whose bytes are easiest to read."""

    layout = "plain"
    priority = 10

    def why_not(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """Refuse what has no meaning: an empty weight, or a rotation whose blocks do not tile it."""
        if min(shape) < 1:
            return f"a weight needs rows and columns, got {shape[0]}x{shape[1]}; leave it unquantized"
        if rotation := scheme.rotation:
            for block, length, side in (
                (rotation.in_block, shape[1], "in_features"),
                (rotation.out_block, shape[0], "out_features"),
            ):
                if block and length % block:
                    return f"rotation blocks of {block} do not divide {side} {length}; choose a smaller power of two"
        return None

    def specs(self, scheme: Scheme, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        """Return ``qweight`` uint8 (out, packed_width) in place of the codes, and the other parts."""
        streams, buffers = _streams(scheme), {}
        for part, spec in part_specs(scheme, shape).items():
            if part not in streams:
                buffers[part] = spec
                continue
            for name, bits in _halves(part, streams[part]):
                width = packed_width(spec.shape[-1], bits)
                buffers[name] = TensorSpec(torch.uint8, (*spec.shape[:-1], width))
        return buffers

    def row_buffers(self, scheme: Scheme, shape: tuple[int, int]) -> frozenset[str]:
        """Every part that is cut by rows; the codes of a row are a stream of their own."""
        parts = row_parts(scheme, part_specs(scheme, shape))
        streams = {name for name, _ in _halves("codes", scheme.bits)} if parts else ()
        return parts - {"codes"} | frozenset(streams)

    def pack(self, quantized: QuantizedTensor) -> PackedTensor:
        """Pack the codes; raises WeightError for a code of more bits than the scheme has."""
        scheme, shape = quantized.scheme, quantized.shape
        streams, spec = _streams(scheme), self.spec(scheme, shape)
        buffers: dict[str, Tensor] = {}
        for part, values in quantized.parts.items():
            if part in streams:
                buffers |= _pack_stream(part, streams[part], values)
            else:
                buffers[part] = values
        return PackedTensor(
            spec, {name: buffers[name].reshape(wanted.shape).contiguous() for name, wanted in spec.buffers.items()}
        )

    def unpack(self, packed: PackedTensor) -> QuantizedTensor:
        """Undo ``pack``."""
        streams, parts = _streams(packed.scheme), {}
        for part, spec in part_specs(packed.scheme, packed.shape).items():
            if part in streams:
                parts[part] = _unpack_stream(part, streams[part], packed.buffers, spec)
            else:
                parts[part] = packed.buffers[part]
        return QuantizedTensor(packed.scheme, packed.shape, parts)


def _streams(scheme: Scheme) -> dict[str, int]:
    """Return the parts that are stored as bit streams, with the bits of one element."""
    if scheme.grid in (Grid.AFFINE, Grid.CODEBOOK):
        return {"codes": scheme.bits}
    if scheme.binary is None:
        return {}
    return {"planes": 1} if scheme.binary.form is BinaryForm.SUM else {"left": 1, "right": 1}


def _halves(part: str, bits: int) -> Iterator[tuple[str, int]]:
    """Yield the buffers of a bit stream, low bits first: one, or two above 8 bits."""
    name = "qweight" if part == "codes" else part
    yield name, min(bits, 8)
    if bits > 8:
        yield f"{name}_high", bits - 8


def _pack_stream(part: str, bits: int, values: Tensor) -> dict[str, Tensor]:
    rows = values.reshape(-1, values.shape[-1])
    if bits <= 8:
        codes = [rows]
    else:
        _check_codes(rows, bits)
        codes = [(rows & 0xFF).byte(), (rows >> 8).byte()]
    return {name: _pack_rows(each, width) for (name, width), each in zip(_halves(part, bits), codes, strict=True)}


def _pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 (rows, columns) into uint8 (rows, packed_width)."""
    rows, columns = codes.shape
    if bits == 8 and columns % 8 == 0:
        return codes  # a byte each already
    out = torch.empty(rows, packed_width(columns, bits), dtype=torch.uint8, device=codes.device)

    def pack(start: int, stop: int) -> None:
        _check_codes(codes[start:stop], bits)
        out[start:stop] = pack_bits(codes[start:stop], bits)

    map_ranges(pack, rows, columns)
    return out


def _check_codes(codes: Tensor, bits: int) -> None:
    """Raise WeightError for a code that would bleed into its neighbours."""
    lowest, highest = (int(extreme) for extreme in codes.aminmax())
    if lowest < 0 or highest >> bits:
        wrong = lowest if lowest < 0 else highest
        raise WeightError(f"a code is {wrong}, which does not fit {bits} bits; the quantizer that made it is broken")


def _unpack_stream(part: str, bits: int, buffers: Mapping[str, Tensor], spec: TensorSpec) -> Tensor:
    columns = spec.shape[-1]
    low, *high = (
        _unpack_rows(buffers[name].reshape(-1, buffers[name].shape[-1]), width, columns)
        for name, width in _halves(part, bits)
    )
    values = low.to(spec.dtype)
    return (values | high[0].to(spec.dtype) << 8 if high else values).reshape(spec.shape)


def _unpack_rows(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Unpack uint8 (rows, packed_width) into uint8 (rows, columns)."""
    if bits == 8 and packed.shape[1] == columns:
        return packed
    out = torch.empty(packed.shape[0], columns, dtype=torch.uint8, device=packed.device)

    def unpack(start: int, stop: int) -> None:
        out[start:stop] = unpack_bits(packed[start:stop], bits, columns)

    map_ranges(unpack, *out.shape)
    return out


@hookimpl
def lowbit_register_packers(register: Callable[[Packer], None]) -> None:
    """Register the layout ``plain``."""
    register(PlainPacker())


@hookimpl
def lowbit_register_kernels(register: Callable[[Kernel], None]) -> None:
    """Register the plain-torch kernel of ``plain``."""
    register(ReferenceKernel(PlainPacker()))
