"""Quantized tensors of any scheme, filled from a seed: what a packer must carry, whether or not an algorithm would make it.

``quantized(scheme, shape, seed)`` has ordinary values, for kernels. The other fills go to the edges: every bit pattern of a
finite float, negative scales, subnormals, the largest floats, zeros of both signs, the lowest and the highest codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.parts import TensorSpec, part_specs
from lowbit.scheme import (
    Across,
    Binary,
    BinaryForm,
    Grid,
    Outliers,
    Rotation,
    ScaleCoding,
    ScaleFormat,
    Scheme,
    Trellis,
    Zero,
)
from lowbit.tensors import QuantizedTensor
from lowbit.testing.weights import generator

FLOAT_FILLS = ("ordinary", "negative", "bits", "subnormal", "extreme", "zeros")
INTEGER_FILLS = ("random", "lowest", "highest")

_INTEGER_VIEWS = {1: torch.int8, 2: torch.int16, 4: torch.int32}
_MANTISSA_BITS = {
    torch.float16: 10,
    torch.bfloat16: 7,
    torch.float32: 23,
    torch.float8_e4m3fn: 3,
}

REPRESENTATIVES: tuple[tuple[Scheme, tuple[int, int]], ...] = (
    (Scheme(Grid.AFFINE, 4, 128), (16, 256)),
    (Scheme(Grid.AFFINE, 4, 32), (16, 256)),
    (Scheme(Grid.AFFINE, 8, 32), (16, 256)),
    (Scheme(Grid.AFFINE, 8, None), (5, 96)),
    (Scheme(Grid.AFFINE, 3, 64, Zero.INTEGER), (16, 192)),
    (Scheme(Grid.AFFINE, 4, 128, Zero.INTEGER), (16, 256)),
    (Scheme(Grid.AFFINE, 4, 128, Zero.INTEGER, permutation=True), (16, 256)),
    (Scheme(Grid.AFFINE, 2, 16, Zero.FLOAT), (7, 50)),
    (Scheme(Grid.AFFINE, 4, 32, Zero.MINIMUM), (16, 256)),
    (Scheme(Grid.AFFINE, 5, 32, Zero.MINIMUM), (16, 256)),
    (Scheme(Grid.AFFINE, 5, 32), (16, 256)),
    (Scheme(Grid.AFFINE, 2, 64, levels=3), (16, 256)),
    (Scheme(Grid.AFFINE, 4, 32, Zero.MINIMUM, ScaleFormat(bits=6, super_group=8)), (4, 512)),
    (Scheme(Grid.AFFINE, 6, 16, scales=ScaleFormat(bits=8, super_group=16, signed=True)), (4, 512)),
    (
        Scheme(
            Grid.AFFINE,
            3,
            16,
            Zero.FLOAT,
            ScaleFormat(bits=3, super_group=16, across=Across.ROWS, coding=ScaleCoding.AFFINE),
            outliers=Outliers(0.01),
        ),
        (48, 64),
    ),
    (Scheme(Grid.CODEBOOK, 4, 64, flat=True, scales=ScaleFormat("float32")), (6, 96)),
    (Scheme(Grid.CODEBOOK, 4, 64, flat=True, scales=ScaleFormat(bits=8, coding=ScaleCoding.CODEBOOK)), (6, 96)),
    (Scheme(Grid.CODEBOOK, 3, 64), (16, 256)),
    (Scheme(Grid.CODEBOOK, 4, 64), (16, 256)),
    (Scheme(Grid.CODEBOOK, 12, 8, vector=8), (8, 64)),
    (Scheme(Grid.TRELLIS, 0, flat=True, trellis=Trellis("mul1", (2, 3)), rotation=Rotation(32, 32)), (32, 64)),
    (Scheme(Grid.BINARY, 2, 64, binary=Binary(2)), (16, 256)),
    (Scheme(Grid.BINARY, 1, binary=Binary(1, BinaryForm.PRODUCT, rank=24)), (16, 40)),
)
"""Schemes from the whole vocabulary, with a shape for each: what a contract tries when a test class gives no examples."""


def quantized(
    scheme: Scheme, shape: tuple[int, int], seed: int = 0, floats: str = "ordinary", integers: str = "random"
) -> QuantizedTensor:
    """Return a valid tensor of ``scheme``: codes in range, finite floats, outliers in CSR order, groups of equal size.

    ``floats`` is one of ``FLOAT_FILLS``, ``integers`` one of ``INTEGER_FILLS``; signs, group indices and outlier positions
    are always random.
    """
    source = generator(seed)
    parts = {}
    for name, spec in part_specs(scheme, shape).items():
        if name == "group_index":
            parts[name] = _group_index(scheme, shape, source)
        elif name in ("outlier_rows", "outlier_columns"):
            continue
        elif name in ("input_signs", "output_signs") and spec.dtype is torch.int8:
            parts[name] = (torch.randint(2, spec.shape, generator=source) * 2 - 1).to(torch.int8)
        elif spec.dtype.is_floating_point:
            parts[name] = fill(spec, floats, source)
        else:
            parts[name] = _integers(name, scheme, spec, integers, source)
    if scheme.outliers:
        parts |= _outlier_positions(scheme, shape, source)
    return QuantizedTensor(scheme, shape, parts)


def fill(spec: TensorSpec, how: str, source: torch.Generator) -> Tensor:
    """Return finite floats of ``spec`` for one of ``FLOAT_FILLS``; float8_e8m0fnu has neither zero, sign nor mantissa."""
    dtype, shape = spec.dtype, spec.shape
    if dtype is torch.float8_e8m0fnu:
        lowest, highest = {"ordinary": (117, 128), "negative": (117, 128), "extreme": (254, 255)}.get(how, (0, 255))
        return torch.randint(lowest, highest, shape, generator=source).to(torch.uint8).view(dtype)
    if how in ("bits", "subnormal"):
        return _bit_patterns(spec, how == "bits", source)
    signs = torch.randint(2, shape, generator=source) * 2.0 - 1
    if how in ("extreme", "zeros"):
        return (signs * (torch.finfo(dtype).max if how == "extreme" else 0)).to(dtype)
    magnitude = torch.rand(shape, generator=source) * 0.09 + 0.01
    return (-magnitude if how == "negative" else magnitude * signs).to(dtype)


def _bit_patterns(spec: TensorSpec, every: bool, source: torch.Generator) -> Tensor:
    """Return floats of random bits: every pattern (those that are not finite become zero), or subnormals only."""
    bits = 8 * spec.dtype.itemsize
    values = torch.randint(-(1 << bits - 1), 1 << bits - 1, spec.shape, generator=source)
    if not every:  # sign, no exponent, some mantissa
        mantissa = (1 << _MANTISSA_BITS[spec.dtype]) - 1
        values = (values & mantissa | 1) | torch.where(values < 0, -(1 << bits - 1), 0)
    floats = values.to(_INTEGER_VIEWS[spec.dtype.itemsize]).view(spec.dtype)
    return torch.where(torch.isfinite(floats.float()), floats.float(), 0).to(spec.dtype)


def _integers(name: str, scheme: Scheme, spec: TensorSpec, how: str, source: torch.Generator) -> Tensor:
    low, high = _bounds(name, scheme)
    if how == "random":
        values = torch.randint(low, high + 1, spec.shape, generator=source).to(spec.dtype)
    else:
        values = torch.full(spec.shape, low if how == "lowest" else high, dtype=spec.dtype)
    if scheme.trellis and name == "codes" and (unused := -scheme.trellis.tile_bits % 16):
        values[..., -1] &= -1 << unused  # the first bit is on top; bits past the end of a tile mean nothing
    return values


def _bounds(name: str, scheme: Scheme) -> tuple[int, int]:
    """Return the lowest and the highest value of an integer part."""
    if name == "codes":
        return (-(1 << 15), (1 << 15) - 1) if scheme.grid is Grid.TRELLIS else (0, scheme.code_count - 1)
    if name in ("planes", "left", "right"):
        return 0, 1
    if name == "zeros" and scheme.zero is Zero.INTEGER:
        return 0, 2**scheme.bits - 1
    bits = scheme.scales.bits
    assert bits is not None
    return (-(1 << bits - 1), (1 << bits - 1) - 1) if scheme.scales.signed else (0, (1 << bits) - 1)


def _group_index(scheme: Scheme, shape: tuple[int, int], source: torch.Generator) -> Tensor:
    """Return an act-order permutation's index: every group has group_size columns, in a random order."""
    groups = torch.arange(shape[1]) // (scheme.group_size or shape[1])
    return groups[torch.randperm(shape[1], generator=source)].int()


def _outlier_positions(scheme: Scheme, shape: tuple[int, int], source: torch.Generator) -> dict[str, Tensor]:
    specs = part_specs(scheme, shape)
    count = specs["outlier_columns"].shape[0]
    flat = torch.randperm(shape[0] * shape[1], generator=source)[:count].sort().values
    rows = torch.bincount(flat // shape[1], minlength=shape[0]).cumsum(0)
    return {
        "outlier_rows": torch.nn.functional.pad(rows, (1, 0)).int(),
        "outlier_columns": (flat % shape[1]).to(specs["outlier_columns"].dtype),
    }
