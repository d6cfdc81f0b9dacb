"""The reference meaning of every scheme: plain torch, any device, float32. Slow code is the specification.

The order of operations is part of the meaning, because each float32 step may round: scales are decoded first (``d * u``), then
the grid (``s * (q - z)``, or ``s * q`` then ``+ m``), then rotation, then outliers. ggml's C dequantizers use the same order.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lowbit.parts import part_specs
from lowbit.scheme import Across, BinaryForm, Grid, ScaleCoding, Scheme, Zero
from lowbit.tensors import QuantizedTensor
from lowbit.trellis import decode_tiles
from lowbit.workers import map_ranges


def dequantize(quantized: QuantizedTensor) -> Tensor:
    """Return the weight (out, in) in float32; on a CPU row by row in parallel where no part but outliers mixes rows."""
    if not quantized.dense.row_separable or next(iter(quantized.parts.values())).device.type != "cpu":
        return _dequantize(quantized)
    weight = torch.empty(quantized.shape)

    def fill(start: int, stop: int) -> None:
        weight[start:stop] = decode_rows(quantized, start, stop)

    map_ranges(fill, *quantized.shape)
    return weight


def decode_rows(quantized: QuantizedTensor, start: int, stop: int) -> Tensor:
    """Return rows start to stop of the weight in float32; only where ``quantized.dense`` is row separable."""
    weight = _dequantize(quantized.dense.rows(start, stop))
    if quantized.scheme.outliers:
        weight += outlier_matrix(quantized, start, stop)
    return weight


def _dequantize(quantized: QuantizedTensor) -> Tensor:
    weight = {
        Grid.AFFINE: _affine,
        Grid.CODEBOOK: _codebook,
        Grid.TRELLIS: _trellis,
        Grid.BINARY: _binary,
    }[quantized.scheme.grid](quantized)
    if quantized.scheme.rotation:
        weight = _rotate(weight, quantized)
    if quantized.scheme.outliers:
        weight = weight + outlier_matrix(quantized)
    return weight


def decode_scales(quantized: QuantizedTensor, name: str = "scales") -> Tensor:
    """Return ``name`` (scales, zeros or minimums) as float32 (rows, groups), its second level applied."""
    parts, scales = quantized.parts, quantized.scheme.scales
    if not scales.two_level:
        return parts[name].float()
    units, supers = parts[name].float(), parts[f"super_{name}"].float()
    if scales.coding is ScaleCoding.CODEBOOK:
        units = parts[f"{name}_codebook"][parts[name].long()]
        return units * _spread(supers, units, scales.super_group, scales.across) + parts[f"{name}_offset"]
    if scales.coding is ScaleCoding.AFFINE:
        units = units - _spread(parts[f"super_{name}_zeros"].float(), units, scales.super_group, scales.across)
    return units * _spread(supers, units, scales.super_group, scales.across)


def expand_groups(values: Tensor, quantized: QuantizedTensor) -> Tensor:
    """Repeat a value for each group (rows, groups) to one for each weight (out, in)."""
    scheme, (rows, columns) = quantized.scheme, quantized.shape
    if scheme.permutation:
        return values[:, quantized.parts["group_index"].long()]
    length = rows * columns if scheme.flat else columns
    spread = values.repeat_interleave(min(scheme.group_size or length, length), dim=1)
    return spread[:, :length].reshape(rows, columns)


def hadamard(values: Tensor, block: int) -> Tensor:
    """Multiply the last dimension by the orthonormal Sylvester Hadamard matrix of ``block``, block by block.

    The last dimension must be a multiple of ``block``, a power of two. log2(block) butterfly passes, as in fast Walsh-Hadamard.
    """
    out = values.reshape(-1, block)
    half = 1
    while half < block:
        pairs = out.view(-1, block // (2 * half), 2, half)
        out = torch.stack((pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]), dim=2)
        half *= 2
    return (out.reshape(-1, block) * (1 / math.sqrt(block))).reshape(values.shape)


def outlier_matrix(quantized: QuantizedTensor, start: int = 0, stop: int | None = None) -> Tensor:
    """Return the outliers of rows start to stop as a dense float32 matrix (stop - start, in), zero elsewhere."""
    parts, columns = quantized.parts, quantized.shape[1]
    ends = parts["outlier_rows"][start : quantized.shape[0] + 1 if stop is None else stop + 1]
    inside = slice(int(ends[0]), int(ends[-1]))
    row = torch.repeat_interleave(torch.arange(len(ends) - 1, device=ends.device), ends.diff())
    place = (row, parts["outlier_columns"][inside].long())
    matrix = torch.zeros(len(ends) - 1, columns, device=ends.device)
    return matrix.index_put_(place, parts["outlier_values"][inside].float(), accumulate=True)


def _affine(quantized: QuantizedTensor) -> Tensor:
    scheme = quantized.scheme
    codes, scales = quantized.parts["codes"].float(), decode_scales(quantized)
    if scheme.zero is Zero.MINIMUM:
        weight = _per_group(torch.Tensor.mul_, codes, scales, quantized)
        return _per_group(torch.Tensor.add_, weight, decode_scales(quantized, "minimums"), quantized)
    if scheme.zero is Zero.SYMMETRIC:
        values = codes.sub_(scheme.midpoint)
    elif scheme.zero is Zero.INTEGER:
        values = _per_group(torch.Tensor.sub_, codes, quantized.parts["zeros"].float(), quantized)
    else:
        values = _per_group(torch.Tensor.sub_, codes, decode_scales(quantized, "zeros"), quantized)
    return _per_group(torch.Tensor.mul_, values, scales, quantized)


def _codebook(quantized: QuantizedTensor) -> Tensor:
    rows, columns = quantized.shape
    entries, codes = quantized.parts["codebook"], quantized.parts["codes"]
    if entries.shape[1] == 1:  # seven times faster than rows of one: 1330 against 185 M weights/s, one core, 2026-11-21
        values = entries[:, 0].contiguous().index_select(0, codes.flatten().int())
    else:
        values = entries.index_select(0, codes.flatten().int())  # (out * in / vector, vector)
    values = values.reshape(rows, -1)[:, :columns]
    return _per_group(torch.Tensor.mul_, values, decode_scales(quantized), quantized)


def _per_group(
    operation: Callable[[Tensor, Tensor], Tensor], weight: Tensor, values: Tensor, quantized: QuantizedTensor
) -> Tensor:
    """Apply an in-place operation of ``values`` (rows, groups) to ``weight`` (out, in), which the caller owns."""
    scheme, columns = quantized.scheme, quantized.shape[1]
    size = scheme.group_size or columns
    if scheme.permutation or scheme.flat or columns % size or not weight.is_contiguous():
        return operation(weight, expand_groups(values, quantized))
    operation(weight.view(-1, columns // size, size), values.unsqueeze(-1))  # (out, groups, size) by (out, groups, 1)
    return weight


def _trellis(quantized: QuantizedTensor) -> Tensor:
    assert quantized.scheme.trellis is not None
    rows, columns = quantized.shape
    tiles = decode_tiles(quantized.parts["codes"], quantized.scheme.trellis, quantized.parts.get("codebook"))
    down, across, height, width = tiles.shape
    weight = tiles.permute(0, 2, 1, 3).reshape(down * height, across * width)[:rows, :columns]
    return weight * expand_groups(decode_scales(quantized), quantized)


def _binary(quantized: QuantizedTensor) -> Tensor:
    parts, binary = quantized.parts, quantized.scheme.binary
    assert binary is not None
    if binary.form is BinaryForm.PRODUCT:
        left = parts["row_scales"].float()[:, None] * _signs(parts["left"]) * parts["middle_scales"].float()
        return left @ (_signs(parts["right"]) * parts["column_scales"].float())
    weight = torch.zeros(quantized.shape, device=parts["planes"].device)
    for plane in range(binary.planes):
        term = _signs(parts["planes"][plane]) * expand_groups(parts["scales"][plane].float(), quantized)
        if binary.column_scales:
            term = term * parts["column_scales"][plane].float()
        weight = weight + term
    return weight


def _signs(bits: Tensor) -> Tensor:
    return bits.float() * 2 - 1


def _spread(supers: Tensor, units: Tensor, super_group: int | None, across: Across) -> Tensor:
    """Repeat second-level values to the shape of the first level (rows, groups)."""
    dim = 1 if across is Across.GROUPS else 0
    return supers.repeat_interleave(super_group or units.shape[dim], dim=dim).narrow(dim, 0, units.shape[dim])


def _rotate(weight: Tensor, quantized: QuantizedTensor) -> Tensor:
    rotation = quantized.scheme.rotation
    assert rotation is not None
    if rotation.in_block:
        weight = hadamard(weight, rotation.in_block) * quantized.parts["input_signs"].float()
    if rotation.out_block:
        weight = hadamard(weight.T, rotation.out_block).T * quantized.parts["output_signs"].float()[:, None]
    return weight


def empty_parts(scheme: Scheme, shape: tuple[int, int], device: str = "cpu") -> dict[str, Tensor]:
    """Return zero-filled parts of a weight: a start for unpackers, and meta tensors with ``device="meta"``."""
    return {
        name: torch.zeros(spec.shape, dtype=spec.dtype, device=device)
        for name, spec in part_specs(scheme, shape).items()
    }
