"""Layout ``hqq``: codes of HQQ with axis 1, packed across groups, with a float scale and a float zero for each group.

The weight, flattened row by row, is cut into N = out * in / g groups: a matrix of codes (N, g). ``f`` fields share an element
of W_q, and field i of row r, counted from the top, is the code of group i * R + r, where R = N / f is the number of rows:

    bits    f     W_q                    element of column c in row r, highest bits on the left
    8 6 5   1     uint8 (N, g)           [ r ]
    4       2     uint8 (N / 2, g)       [ r | R + r ]
    2       4     uint8 (N / 4, g)       [ r | R + r | 2R + r | 3R + r ]        (ternary, "1.58 bits", is stored so too)
    1       8     uint8 (N / 8, g)       [ r | R + r | ... | 7R + r ]
    3      10     int32 (ceil(N/10), g)  [ 00 | r | R + r | ... | 9R + r ]      groups past the last are zeros

    buffers scale and zero: float (N, 1);   w = (code - zero) * scale

Source: ``BitPack`` and ``Quantizer`` of hqq 0.2.8 (hqq/core). Where g divides in_features a group lies in one row of the
weight; else groups run over the flattened weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.interfaces import Packer
from lowbit.parts import TensorSpec, part_specs
from lowbit.scheme import Grid, ScaleFormat, Scheme, Zero
from lowbit.tensors import PackedTensor, QuantizedTensor
from lowbit_formats.int_words import check_codes

FIELDS = {1: 8, 2: 4, 3: 10, 4: 2, 5: 1, 6: 1, 8: 1}
"""How many codes share an element, by bits."""
SCALE_DTYPES = ("float16", "bfloat16", "float32")


def hqq_scheme(bits: int, group_size: int, shape: tuple[int, int], dtype: str, levels: int | None = None) -> Scheme:
    """Return the scheme of an HQQ weight of ``shape`` with axis 1."""
    flat = shape[1] % group_size != 0
    return Scheme(Grid.AFFINE, bits, group_size, Zero.FLOAT, ScaleFormat(dtype), levels, flat)


def codes_spec(bits: int, group_size: int, groups: int) -> TensorSpec:
    """Return dtype and shape of W_q for ``groups`` groups."""
    dtype = torch.int32 if bits == 3 else torch.uint8
    return TensorSpec(dtype, (-(-groups // FIELDS[bits]), group_size))


class HqqPacker(Packer):
    """Packs affine codes with float zeros."""

    layout = "hqq"

    def why_not(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """Refuse other grids and zeros, and weights whose groups do not fill the elements of W_q."""
        if min(shape) < 1:
            return f"a weight needs rows and columns, got {shape[0]}x{shape[1]}; leave it unquantized"
        if scheme.grid is not Grid.AFFINE or scheme.zero is not Zero.FLOAT:
            return f"HQQ holds affine weights with a float zero for each group, not {scheme.summary()} weights"
        if scheme.bits not in FIELDS or scheme.group_size is None:
            return f"HQQ has {', '.join(map(str, FIELDS))} bits and groups of a stated size, not {scheme.summary()} weights"
        if scheme.scales.two_level or scheme.scales.dtype not in SCALE_DTYPES:
            return f"HQQ stores scales as one of {', '.join(SCALE_DTYPES)}, which {scheme.summary()} weights do not"
        if scheme.permutation or scheme.outliers or scheme.rotation:
            return f"HQQ has no add-ons, which {scheme.summary()} weights have"
        if (shape[0] * shape[1] if scheme.flat else shape[1]) % scheme.group_size:
            return f"HQQ needs whole groups: {scheme.group_size} does not divide a weight of {shape[0]}x{shape[1]}"
        groups, fields = shape[0] * shape[1] // scheme.group_size, FIELDS[scheme.bits]
        if scheme.bits != 3 and groups % fields:
            return f"HQQ packs {fields} groups of {scheme.bits}-bit codes together, and this weight has {groups} groups"
        return None

    def specs(self, scheme: Scheme, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        """Return the buffers in the table above."""
        assert scheme.group_size is not None
        groups = shape[0] * shape[1] // scheme.group_size
        column = TensorSpec(part_specs(scheme, shape)["scales"].dtype, (groups, 1))
        return {"W_q": codes_spec(scheme.bits, scheme.group_size, groups), "scale": column, "zero": column}

    def pack(self, quantized: QuantizedTensor) -> PackedTensor:
        """Pack the codes; raises WeightError for a code of more bits than the scheme has."""
        scheme, parts = quantized.scheme, quantized.parts
        spec = self.spec(scheme, quantized.shape)
        check_codes(parts["codes"], scheme.bits)
        buffers = {
            "W_q": _pack(parts["codes"], scheme.bits, spec.buffers["W_q"]),
            "scale": parts["scales"].reshape(-1, 1).contiguous(),
            "zero": parts["zeros"].reshape(-1, 1).contiguous(),
        }
        return PackedTensor(spec, buffers)

    def unpack(self, packed: PackedTensor) -> QuantizedTensor:
        """Undo ``pack``."""
        specs = part_specs(packed.scheme, packed.shape)
        parts = {
            "codes": _unpack(packed.buffers["W_q"], packed.scheme.bits, packed.shape),
            "scales": packed.buffers["scale"].reshape(specs["scales"].shape),
            "zeros": packed.buffers["zero"].reshape(specs["zeros"].shape),
        }
        return QuantizedTensor(packed.scheme, packed.shape, parts)


def _pack(codes: Tensor, bits: int, spec: TensorSpec) -> Tensor:
    (rows, columns), fields = spec.shape, FIELDS[bits]
    groups = codes.reshape(-1, columns)
    padded = torch.nn.functional.pad(groups, (0, 0, 0, rows * fields - len(groups)))
    packed = torch.zeros(rows, columns, dtype=spec.dtype, device=codes.device)
    for field in padded.view(fields, rows, columns):
        packed = packed << bits | field.to(spec.dtype)
    return packed


def _unpack(packed: Tensor, bits: int, shape: tuple[int, int]) -> Tensor:
    fields, mask = FIELDS[bits], (1 << bits) - 1
    codes = torch.empty(fields, *packed.shape, dtype=torch.uint8, device=packed.device)
    for number, field in enumerate(codes):
        field.copy_(packed >> bits * (fields - 1 - number) & mask)
    return codes.flatten()[: shape[0] * shape[1]].reshape(shape)
