"""``binary-cuda``: one-bit linear layers on NVIDIA GPUs, on tensor cores that AND and count bits (``lowbit_cuda.popcount``).

Serves planes with one scale for each row, and products: two layers in a row with float32 between them. Activations are rounded to
16 bits for each slice of a row that a warp has (256 columns up to 4096, 512 up to 8192, ...), scaled by the slice's absmax A, which
adds at most ``sum_p |s_p| * L * A / 65000`` for L columns to what float32 sums leave.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from lowbit import Kernel, MatmulProblem, PackedSpec, PackedTensor, QuantizedTensor, Scheme, TensorSpec
from lowbit.grids import dequantize
from lowbit.parts import part_specs
from lowbit.scheme import BinaryForm
from lowbit_binary.packer import WordsPacker
from lowbit_cuda.available import capability_reason, why_not_cuda
from lowbit_cuda.popcount import MAX_PLANES, Popcount, PopcountShape, pack_signs, unpack_signs

PREPARED = "binary-signs"
DTYPES = (torch.float16, torch.bfloat16)
MOST_ROWS = 32
"""Rows of x up to which launches for 8 at a time are made; for more the weight is written out."""
_SIGNS = ("planes", "left", "right")


class CudaPopcountKernel(Kernel):
    """Serves ``binary-words`` without groups for bfloat16 and float16 activations."""

    name = "binary-cuda"
    priority = 30

    def why_not(self, problem: MatmulProblem) -> str | None:
        """Refuse other layouts, devices and dtypes, add-ons, scales of groups or columns, and GPUs that cannot count bits."""
        if problem.layout != WordsPacker.layout:
            return f"{self.name} runs layout {WordsPacker.layout!r}, not {problem.layout!r}"
        if problem.device != "cuda":
            return f"{self.name} runs on NVIDIA GPUs, not on {problem.device}"
        if problem.dtype not in DTYPES:
            return f"{self.name} rounds activations to 16 bits, which is too coarse for {problem.dtype}"
        if reason := WordsPacker().why_not(problem.scheme, problem.shape) or _why_not_scheme(problem):
            return reason
        if problem.capability is not None:
            if reason := capability_reason(problem.capability):
                return reason
            for shape in _shapes(problem.scheme, problem.shape, problem.dtype):
                if reason := shape.why_not(problem.capability):
                    return f"{self.name} cannot run here: {reason}"
        return why_not_cuda()

    def prepare(self, packed: PackedTensor) -> PackedTensor:
        """Arrange signs as units of tensor cores and scales as float32; what is prepared stays as it is."""
        if packed.layout == PREPARED:
            return packed
        buffers = {}
        for name, part in WordsPacker().unpack(packed).parts.items():
            if name in _SIGNS:
                buffers[name] = pack_signs(part if part.dim() == 3 else part[None])
            elif name == "column_scales":
                buffers[name] = _eights(part.float()).contiguous()
            else:
                buffers[name] = part.float().reshape(-1, part.shape[1] if name == "scales" else len(part)).contiguous()
        specs = {name: TensorSpec.of(buffer) for name, buffer in buffers.items()}
        return PackedTensor(PackedSpec(PREPARED, packed.scheme, packed.shape, specs), buffers)

    def dequantize(self, packed: PackedTensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Put the signs back in rows and decode as the layout's plain-torch kernel does."""
        prepared = self.prepare(packed)
        parts = {}
        for name, spec in part_specs(prepared.scheme, prepared.shape).items():
            buffer = prepared.buffers[name]
            if name in _SIGNS:
                parts[name] = unpack_signs(buffer, (spec.shape[-2], spec.shape[-1])).view(spec.shape)
            else:
                parts[name] = buffer[..., : spec.shape[0] if name == "column_scales" else None].to(spec.dtype)
                parts[name] = parts[name].reshape(spec.shape)
        return dequantize(QuantizedTensor(prepared.scheme, prepared.shape, parts)).to(dtype)

    def matmul(self, x: Tensor, packed: PackedTensor, bias: Tensor | None = None) -> Tensor:
        """Count bits for a few rows of x, write W out for many; one rounding to x's dtype."""
        prepared = self.prepare(packed)
        rows, columns = prepared.shape
        flat = x.reshape(-1, columns)
        if len(flat) > MOST_ROWS or x.dtype not in DTYPES or not len(flat):
            return functional.linear(x, self.dequantize(prepared, x.dtype), bias)
        out = torch.empty(len(flat), rows, dtype=x.dtype, device=x.device)
        with torch.cuda.device(x.device):
            _multiply(_aligned(_eights(flat)), prepared, out, None if bias is None else bias.to(x.dtype).contiguous())
        return out.reshape(*x.shape[:-1], rows)


def _why_not_scheme(problem: MatmulProblem) -> str | None:
    """Refuse add-ons, and scales of groups or of columns of a plane; products have neither."""
    scheme, binary = problem.scheme, problem.scheme.binary
    assert binary is not None
    if scheme.outliers:
        return f"binary-cuda multiplies by sign planes alone, not by {scheme.summary()}"
    if binary.form is BinaryForm.PRODUCT:
        return None
    if scheme.group_size is not None and scheme.group_size < problem.shape[1]:
        return f"binary-cuda takes one scale for a row of a plane, not groups of {scheme.group_size}; set group_size to none"
    if binary.column_scales:
        return (
            "binary-cuda multiplies all planes by the same x, and column_scales give each plane its own; leave them out"
        )
    if binary.planes > MAX_PLANES:
        return f"binary-cuda adds at most {MAX_PLANES} planes, not {binary.planes}"
    return None


def _shapes(scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype, dependent: bool = False) -> list[PopcountShape]:
    """Return the products that a row of x takes: one for a sum of planes, two for a product of matrices, the right one first."""
    rows, columns = shape[0], _up(shape[1])
    assert scheme.binary is not None
    if scheme.binary.form is BinaryForm.SUM:
        return [PopcountShape(columns, rows, planes=scheme.binary.planes, dtype=dtype, dependent=dependent)]
    inner, wide = scheme.binary.inner(shape), torch.float32
    return [
        PopcountShape(columns, inner, dtype=dtype, out_dtype=wide, scaled=True, dependent=dependent),
        PopcountShape(_up(inner), rows, dtype=wide, out_dtype=dtype, dependent=dependent),
    ]


def _multiply(x: Tensor, prepared: PackedTensor, out: Tensor, bias: Tensor | None) -> None:
    """Write the product for aligned rows of x into ``out``, on the current device, which is theirs."""
    buffers, index, tokens = prepared.buffers, x.device.index, len(x)
    shapes = _shapes(prepared.scheme, prepared.shape, x.dtype, _dependent(index))
    if len(shapes) == 1:
        _launch(index, shapes[0], buffers["planes"], buffers["scales"], x, out, bias)
        return
    hidden = torch.zeros(tokens, shapes[1].in_features, dtype=torch.float32, device=x.device)
    inner = hidden[:, : shapes[0].out_features]
    _launch(index, shapes[0], buffers["right"], buffers["middle_scales"], x, inner, None, buffers["column_scales"])
    _launch(index, shapes[1], buffers["left"], buffers["row_scales"], hidden, out, bias)


def _launch(
    index: int,
    shape: PopcountShape,
    signs: Tensor,
    scales: Tensor,
    x: Tensor,
    out: Tensor,
    bias: Tensor | None,
    columns: Tensor | None = None,
) -> None:
    """Multiply as many rows of x at a time as the shape has room for."""
    step = shape.most_tokens(torch.cuda.get_device_capability(index))
    for start in range(0, len(x), step):
        part, result = x[start : start + step], out[start : start + step]
        _product(index, shape.with_tokens(len(part)))(signs, scales, part, result, bias, columns)


@cache
def _product(index: int, shape: PopcountShape) -> Popcount:
    """Return the kernel for the current device, which is ``index``."""
    return Popcount(shape)


@cache
def _dependent(index: int) -> bool:
    """Whether kernels may start while the one before ends (programmatic dependent launch): Hopper and later."""
    return torch.cuda.get_device_capability(index) >= (9, 0)


def _up(columns: int) -> int:
    """Return the next multiple of 8: rows of x are read 16 bytes at a time."""
    return -(-columns // 8) * 8


def _eights(values: Tensor) -> Tensor:
    """Fill the last dimension up with zeros to a multiple of 8."""
    columns = values.shape[-1]
    return values if columns % 8 == 0 else functional.pad(values, (0, _up(columns) - columns))


def _aligned(x: Tensor) -> Tensor:
    """Return ``x`` (rows, in) with contiguous rows that begin at multiples of 16 bytes."""
    if x.stride(-1) != 1 or (x.shape[0] > 1 and x.stride(0) % 8) or x.data_ptr() % 16:
        return x.clone(memory_format=torch.contiguous_format)
    return x
