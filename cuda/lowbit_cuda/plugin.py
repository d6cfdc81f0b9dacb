"""The bridge to lowbit: the kernel ``cuda-units``, which serves every layout of affine codes and of codebooks on NVIDIA GPUs.

The only module here that imports core. A weight of any layout is unpacked once, at load, on the GPU, and put into units; then

    rows of x      what runs
    1 to 16        ``Gemv``: limited by reading the codes
    17 to 64       ``Gemm``: tensor cores, the work cut evenly
    more           ``Dequantizer``, then cuBLAS

Units may hold the columns in another order (``columns.py``): then rows of x are gathered first. Outliers are added last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from lowbit import Kernel, hookimpl
from lowbit.grids import decode_scales
from lowbit.interfaces import MatmulProblem, Packer
from lowbit.parts import TensorSpec
from lowbit.scheme import Across, Grid, Scheme, Zero
from lowbit.tensors import PackedSpec, PackedTensor, QuantizedTensor
from lowbit.workers import whole_tensors
from lowbit_cuda.available import capability_reason, why_not_cuda
from lowbit_cuda.columns import column_order, gather, unit_group, why_not_groups
from lowbit_cuda.decoder import CODEBOOK, affine_decoder
from lowbit_cuda.errors import CudaError
from lowbit_cuda.gemm import Dequantizer, Gemm, GemmShape, row_blocks
from lowbit_cuda.gemv import TYPES, Gemv, GemvShape
from lowbit_cuda.outliers import OutlierMatrix
from lowbit_cuda.scatter import write_scattered
from lowbit_cuda.units import UnitFormat, pack_units

LAYOUT = "cuda-units"
_GEMV_ROWS, _GEMM_ROWS = 16, 64
_WIDTHS = (1, 8, 16, 32, 64)
_OUTLIERS = ("outlier_rows", "outlier_columns", "outlier_values")


@hookimpl
def lowbit_register_kernels(register: Callable[[Kernel], None]) -> None:
    """Register ``cuda-units``."""
    register(UnitsKernel())


class UnitsKernel(Kernel):
    """Affine codes of 1 to 8 bits and codebooks of 2 to 8, whatever the layout; sums in float32, one rounding of the result.

    Prepared weights are units (``include/lowbit/unit.cuh``) and what goes with them: the entries of a codebook, the columns of the
    units where these are not the weight's own, outliers. float32 activations are multiplied by the dequantized weight.

    Args:
        packers: Where ``prepare`` finds the packer of a layout; by default those of the installed plugins.
    """

    name = LAYOUT
    priority = 30

    def __init__(self, packers: Mapping[str, Packer] | None = None) -> None:
        self._packers = packers

    @property
    def packers(self) -> Mapping[str, Packer]:
        """The packers by layout."""
        if self._packers is None:
            from lowbit.plugins import installed

            self._packers = installed().packers
        return self._packers

    def why_not(self, problem: MatmulProblem) -> str | None:
        """Refuse other devices, unknown layouts, other grids, rotations, and groups that no unit holds."""
        if problem.device != "cuda":
            return f"runs on NVIDIA GPUs, not on {problem.device}"
        if problem.layout not in self.packers:
            return f"no packer of layout {problem.layout!r} is installed"
        if problem.dtype not in (*TYPES, torch.float32):
            return f"multiplies float16, bfloat16 or float32, not {str(problem.dtype).removeprefix('torch.')}"
        if reason := _why_not_scheme(problem.scheme, problem.shape):
            return reason
        if problem.capability is not None and (reason := capability_reason(problem.capability)):
            return reason
        return why_not_cuda() or self.packers[problem.layout].why_not(problem.scheme, problem.shape)

    def prepare(self, packed: PackedTensor) -> PackedTensor:
        """Unpack and arrange on the device of the buffers; what is prepared stays as it is."""
        if packed.layout == LAYOUT:
            return packed
        with whole_tensors():
            quantized = self.packers[packed.layout].unpack(packed)
        scheme, shape, parts = packed.scheme, packed.shape, quantized.parts
        format, codes = unit_format(scheme, shape), parts["codes"]
        order = column_order(scheme.group_size, shape[1], parts.get("group_index"), codes.device)
        scales, offsets = _scales_and_offsets(quantized, format, order.groups)
        buffers = {"units": pack_units(format, gather(codes, order.source), scales, offsets)}
        buffers["arrived"] = torch.zeros(row_blocks(shape[0]), dtype=torch.int32, device=codes.device)
        if order.source is not None:
            buffers["source"] = order.source.int()
        if scheme.grid is Grid.CODEBOOK:
            buffers["codebook"] = parts["codebook"].reshape(-1).clone()
        if scheme.outliers:
            buffers |= {name: parts[name].clone() for name in _OUTLIERS}
        specs = {name: TensorSpec.of(buffer) for name, buffer in buffers.items()}
        return PackedTensor(PackedSpec(LAYOUT, scheme, shape, specs), buffers)

    def dequantize(self, packed: PackedTensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Compute in float32, as the reference does, then round once."""
        prepared = self.prepare(packed)
        if dtype not in (*TYPES, torch.float32):
            return self.dequantize(prepared).to(dtype)
        if prepared.scheme.outliers:  # the sum is rounded, not its parts
            return _add_outliers(_dense(prepared, torch.float32), prepared).to(dtype)
        return _dense(prepared, dtype)

    def matmul(self, x: Tensor, packed: PackedTensor, bias: Tensor | None = None) -> Tensor:
        """Choose by the number of rows of x. Raises CudaError for an x or a bias elsewhere than the weight."""
        prepared = self.prepare(packed)
        _check_devices(prepared, x=x, bias=bias)
        (rows, columns), tokens = prepared.shape, x.numel() // prepared.shape[1]
        if x.dtype not in TYPES or not tokens:
            return functional.linear(x, self.dequantize(prepared, x.dtype), bias)
        if tokens <= _GEMM_ROWS:
            flat = x.reshape(-1, columns)
            out = torch.empty(tokens, rows, dtype=x.dtype, device=x.device)
            with torch.cuda.device(x.device):
                if _multiply(flat, prepared, out, bias.to(x.dtype).contiguous() if bias is not None else None):
                    return out.reshape(*x.shape[:-1], rows)
        return functional.linear(x, _add_outliers(_dense(prepared, x.dtype), prepared), bias)


def _check_devices(prepared: PackedTensor, **operands: Tensor | None) -> None:
    there = prepared.buffers["units"].device
    for name, operand in operands.items():
        if operand is not None and operand.device != there:
            raise CudaError(f"{name} is on {operand.device}, and the weight on {there}; move one to the other")


def _multiply(x: Tensor, prepared: PackedTensor, out: Tensor, bias: Tensor | None) -> bool:
    """Write the product with the dense part, and add that with the outliers; False when no kernel has room for this shape."""
    buffers, source = prepared.buffers, prepared.buffers.get("source")
    gathered = _aligned(gather(x, source))
    (index, rows, tokens), columns = (x.device.index, *out.shape[::-1]), gathered.shape[1]
    format, given = unit_format(prepared.scheme, prepared.shape), (_zero(prepared.scheme), buffers.get("codebook"))
    width = next(width for width in _WIDTHS if tokens <= width)
    gemv = gemm = None
    if tokens <= _GEMV_ROWS:
        gemv = _gemv(index, GemvShape(format, columns, rows, width, x.dtype, _dependent(index)))
    if gemv is None:
        gemm = _gemm(index, GemmShape(format, columns, rows, max(width, 32), x.dtype))
    if gemv is not None:
        gemv(buffers["units"], gathered, out, bias, *given)
    elif gemm is not None:
        gemm(buffers["units"], gathered, out, buffers["arrived"], bias, *given)
    else:
        return False
    if outliers := _outliers(prepared):
        outliers.add_product(x if x.stride(1) == 1 else x.contiguous(), out)
    return True


def _dense(prepared: PackedTensor, dtype: torch.dtype) -> Tensor:
    """Return the weight without its outliers."""
    format, buffers, zero = unit_format(prepared.scheme, prepared.shape), prepared.buffers, _zero(prepared.scheme)
    units, source, codebook = buffers["units"], buffers.get("source"), buffers.get("codebook")
    out = torch.empty(prepared.shape, dtype=dtype, device=units.device)
    with torch.cuda.device(units.device):
        if source is not None:
            write_scattered(format, units, source, out, zero, codebook)
        else:
            _dequantizer(units.device.index, format, dtype)(units, out, zero, codebook)
    return out


def _outliers(prepared: PackedTensor) -> OutlierMatrix | None:
    return OutlierMatrix(*(prepared.buffers[name] for name in _OUTLIERS)) if prepared.scheme.outliers else None


def _add_outliers(weight: Tensor, prepared: PackedTensor) -> Tensor:
    if outliers := _outliers(prepared):
        outliers.add_to(weight)
    return weight


def unit_format(scheme: Scheme, shape: tuple[int, int]) -> UnitFormat:
    """Return the units of a weight; call only when the kernel does not refuse its scheme."""
    group = unit_group(scheme.group_size, shape[1])
    single = not scheme.scales.two_level and scheme.scales.dtype == "float16"
    if scheme.grid is Grid.CODEBOOK:
        return UnitFormat(CODEBOOK[scheme.bits], group, torch.float16 if single else torch.float32)
    offset = {Zero.SYMMETRIC: "CONSTANT", Zero.INTEGER: "ZEROS"}.get(scheme.zero, "MINIMUMS")
    half = single and scheme.zero is not Zero.FLOAT
    return UnitFormat(affine_decoder(scheme.bits), group, torch.float16 if half else torch.float32, offset)


def _why_not_scheme(scheme: Scheme, shape: tuple[int, int]) -> str | None:
    if scheme.grid not in (Grid.AFFINE, Grid.CODEBOOK) or scheme.vector > 1:
        return f"decodes affine codes and codebooks of single weights, not {scheme.summary()}"
    if scheme.grid is Grid.CODEBOOK and scheme.bits not in CODEBOOK:
        return f"decodes codebooks of {min(CODEBOOK)} to {max(CODEBOOK)} bits, not of {scheme.bits}"
    if scheme.rotation:
        return f"does not rotate, and the scheme is {scheme.summary()}"
    if scheme.flat and shape[1] % (scheme.group_size or shape[1]):
        return f"takes groups inside rows: those of {scheme.group_size} cross rows of {shape[1]}"
    if scheme.scales.two_level and scheme.scales.across is Across.ROWS:
        return f"takes scales of single rows, not {scheme.summary()}"
    return why_not_groups(scheme.group_size)


def _scales_and_offsets(quantized: QuantizedTensor, format: UnitFormat, groups: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return scales and offsets (out, groups of the units), as the format stores them; ``groups``: the scheme's group of each."""
    scheme = quantized.scheme
    scales, offsets = decode_scales(quantized), None
    if scheme.zero is Zero.INTEGER:
        offsets = quantized.parts["zeros"].float()
    elif scheme.zero is Zero.MINIMUM:
        offsets = decode_scales(quantized, "minimums")
    elif scheme.zero is Zero.FLOAT:
        offsets = -scales * decode_scales(quantized, "zeros")

    def stored(values: Tensor) -> Tensor:
        if scheme.flat:  # one row of groups for the whole weight; without a group_size one for all
            values = values.reshape(-1, 1) if scheme.group_size is None else values.reshape(quantized.shape[0], -1)
            values = values.expand(quantized.shape[0], -1)
        return values[:, groups].to(format.scale_dtype)

    return stored(scales), None if offsets is None else stored(offsets)


def _zero(scheme: Scheme) -> float:
    return float(scheme.midpoint) if scheme.grid is Grid.AFFINE else 0.0


def _aligned(x: Tensor) -> Tensor:
    """Return ``x`` (rows, in) with contiguous rows that begin at multiples of 16 bytes."""
    if x.stride(-1) != 1 or (x.shape[0] > 1 and x.stride(0) % 8) or x.data_ptr() % 16:
        return x.clone(memory_format=torch.contiguous_format)
    return x


@cache
def _dependent(device: int) -> bool:
    """Whether kernels may start while the one before ends (programmatic dependent launch): Hopper and later."""
    return torch.cuda.get_device_capability(device) >= (9, 0)


@cache
def _gemv(device: int, shape: GemvShape) -> Gemv | None:
    """Return the kernel for the current device, which is ``device``; None when the shape does not fit it."""
    return Gemv(shape) if shape.why_not(torch.cuda.get_device_capability(device)) is None else None


@cache
def _gemm(device: int, shape: GemmShape) -> Gemm | None:
    return Gemm(shape) if shape.why_not(torch.cuda.get_device_capability(device)) is None else None


@cache
def _dequantizer(device: int, format: UnitFormat, dtype: torch.dtype) -> Dequantizer:
    return Dequantizer(format, dtype)
