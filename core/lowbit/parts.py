"""Which logical parts a quantized weight has: the table from a scheme and a shape to part names, dtypes and shapes.

With G = ``scheme.groups(shape)`` and ``(out, in)`` the weight's shape (flat schemes: rows become 1):

    part                     when                    dtype, shape
    codes                    AFFINE CODEBOOK         uint8 (int32 above 8 bits), (out, ceil(in / vector))
    codes                    TRELLIS                 int16, (tiles out, tiles in, words): big-endian bits, first bit on top
    planes                   BINARY sum              uint8 0/1, (planes, out, in); 1 means +
    left, right              BINARY product          uint8 0/1, (out, rank) and (rank, in); a rate gives the rank by shape
    codebook                 CODEBOOK, lut, hyb      float32, (2**bits, vector) or (2**table_bits, step_weights)
    scales                   all but product         float, (out, G); BINARY: (planes, out, G); two-level: uint8 or int8
    row/middle/column_scales BINARY product          float, (out,) (rank,) (in,)
    column_scales            BINARY with them        float, (planes, in)
    zeros                    INTEGER                 int16, (out, G)
    zeros, minimums          FLOAT, MINIMUM          stored like scales
    super_X, super_X_zeros   two-level X             float, (out, supers) or (supers, G); zeros when coding is AFFINE
    X_codebook, X_offset     two-level CODEBOOK      float32, (2**bits,) and (1,)
    group_index              permutation             int32, (in,): the group of each column
    input_signs, output_signs rotation               int8 or float, (in,) and (out,)
    outlier_rows/columns/values outliers             int32 (out + 1,), int16 or int32 (n,), float (n,): CSR
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lowbit.scheme import Across, BinaryForm, Grid, ScaleCoding, Scheme, Zero

Shape = tuple[int, ...]
INT16_COLUMNS = 2**15  # widest weight whose outlier columns fit int16


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Dtype and shape of a tensor that need not exist yet."""

    dtype: torch.dtype
    shape: Shape

    @property
    def nbytes(self) -> int:
        """Bytes of the contiguous tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorSpec:
        """Describe an existing tensor."""
        return cls(tensor.dtype, tuple(tensor.shape))


def torch_dtype(name: str) -> torch.dtype:
    """Return the torch dtype of a name that a scheme uses, such as ``float16``."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def part_specs(scheme: Scheme, shape: tuple[int, int]) -> dict[str, TensorSpec]:
    """Return every part that a weight of ``shape`` (out, in) in ``scheme`` has, in a fixed order."""
    return dict(_parts(scheme, shape))


def outlier_count(scheme: Scheme, shape: tuple[int, int]) -> int:
    """Return how many outliers a weight of ``shape`` stores; 0 without the add-on."""
    return round(scheme.outliers.density * shape[0] * shape[1]) if scheme.outliers else 0


def _parts(scheme: Scheme, shape: tuple[int, int]) -> Iterator[tuple[str, TensorSpec]]:
    yield from {
        Grid.AFFINE: _code_parts,
        Grid.CODEBOOK: _code_parts,
        Grid.TRELLIS: _trellis_parts,
        Grid.BINARY: _binary_parts,
    }[scheme.grid](scheme, shape)
    rows, groups = 1 if scheme.flat else shape[0], scheme.groups(shape)
    if scheme.binary is None:
        yield from _stored("scales", scheme, rows, groups)
    if scheme.zero is Zero.INTEGER:
        yield "zeros", TensorSpec(torch.int16, (rows, groups))
    elif scheme.zero is Zero.FLOAT:
        yield from _stored("zeros", scheme, rows, groups)
    elif scheme.zero is Zero.MINIMUM:
        yield from _stored("minimums", scheme, rows, groups)
    yield from _addon_parts(scheme, shape)


def _code_parts(scheme: Scheme, shape: tuple[int, int]) -> Iterator[tuple[str, TensorSpec]]:
    dtype = torch.uint8 if scheme.bits <= 8 else torch.int32
    yield "codes", TensorSpec(dtype, (shape[0], math.ceil(shape[1] / scheme.vector)))
    if scheme.grid is Grid.CODEBOOK:
        yield "codebook", TensorSpec(torch.float32, (2**scheme.bits, scheme.vector))


def _trellis_parts(scheme: Scheme, shape: tuple[int, int]) -> Iterator[tuple[str, TensorSpec]]:
    trellis = scheme.trellis
    assert trellis is not None
    tiles = math.ceil(shape[0] / trellis.tile[0]), math.ceil(shape[1] / trellis.tile[1])
    yield "codes", TensorSpec(torch.int16, (*tiles, math.ceil(trellis.tile_bits / 16)))
    if trellis.table_bits:
        yield "codebook", TensorSpec(torch.float32, (2**trellis.table_bits, trellis.step_weights))


def _binary_parts(scheme: Scheme, shape: tuple[int, int]) -> Iterator[tuple[str, TensorSpec]]:
    binary, dtype = scheme.binary, torch_dtype(scheme.scales.dtype)
    assert binary is not None
    if binary.form is BinaryForm.PRODUCT:
        inner = binary.inner(shape)
        yield "left", TensorSpec(torch.uint8, (shape[0], inner))
        yield "right", TensorSpec(torch.uint8, (inner, shape[1]))
        yield "row_scales", TensorSpec(dtype, (shape[0],))
        yield "middle_scales", TensorSpec(dtype, (inner,))
        yield "column_scales", TensorSpec(dtype, (shape[1],))
        return
    yield "planes", TensorSpec(torch.uint8, (binary.planes, *shape))
    yield "scales", TensorSpec(dtype, (binary.planes, shape[0], scheme.groups(shape)))
    if binary.column_scales:
        yield "column_scales", TensorSpec(dtype, (binary.planes, shape[1]))


def _stored(name: str, scheme: Scheme, rows: int, groups: int) -> Iterator[tuple[str, TensorSpec]]:
    """Yield the one or two levels that hold ``name`` (scales, zeros or minimums) for (rows, groups)."""
    scales, dtype = scheme.scales, torch_dtype(scheme.scales.dtype)
    if not scales.two_level:
        yield name, TensorSpec(dtype, (rows, groups))
        return
    yield name, TensorSpec(torch.int8 if scales.signed else torch.uint8, (rows, groups))
    if scales.across is Across.GROUPS:
        supers = (rows, math.ceil(groups / (scales.super_group or groups)))
    else:
        supers = (math.ceil(rows / (scales.super_group or rows)), groups)
    yield f"super_{name}", TensorSpec(dtype, supers)
    if scales.coding is ScaleCoding.AFFINE:
        yield f"super_{name}_zeros", TensorSpec(dtype, supers)
    elif scales.coding is ScaleCoding.CODEBOOK:
        assert scales.bits is not None
        yield f"{name}_codebook", TensorSpec(torch.float32, (2**scales.bits,))
        yield f"{name}_offset", TensorSpec(torch.float32, (1,))


def _addon_parts(scheme: Scheme, shape: tuple[int, int]) -> Iterator[tuple[str, TensorSpec]]:
    if scheme.permutation:
        yield "group_index", TensorSpec(torch.int32, (shape[1],))
    if scheme.rotation:
        dtype = torch_dtype(scheme.rotation.dtype)
        if scheme.rotation.in_block:
            yield "input_signs", TensorSpec(dtype, (shape[1],))
        if scheme.rotation.out_block:
            yield "output_signs", TensorSpec(dtype, (shape[0],))
    if scheme.outliers:
        count = outlier_count(scheme, shape)
        column_dtype = torch.int16 if shape[1] <= INT16_COLUMNS else torch.int32
        yield "outlier_rows", TensorSpec(torch.int32, (shape[0] + 1,))
        yield "outlier_columns", TensorSpec(column_dtype, (count,))
        yield "outlier_values", TensorSpec(torch_dtype(scheme.outliers.dtype), (count,))
