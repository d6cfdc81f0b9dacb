"""The bridge to lowbit: the kernel ``cuda-units``, which serves every layout of affine codes and of codebooks on NVIDIA GPUs.

The only module here that imports core. A weight of any layout is unpacked once, at load, on the GPU, and put into units; then

    rows of x      what runs
    1 to 16        ``Gemv``: limited by reading the codes
    17 to 64       ``Gemm``: tensor cores, the work cut evenly
    more           ``Dequantizer``, then cuBLAS
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
from lowbit.parts import TensorSpec, part_specs
from lowbit.scheme import Across, Grid, Scheme, Zero
from lowbit.tensors import PackedSpec, PackedTensor, QuantizedTensor
from lowbit_cuda.available import capability_reason, why_not_cuda
from lowbit_cuda.decoder import CODEBOOK, affine_decoder
from lowbit_cuda.gemm import Dequantizer, Gemm, GemmShape, row_blocks
from lowbit_cuda.gemv import TYPES, Gemv, GemvShape
from lowbit_cuda.units import COLUMNS, GROUP_SIZES, UnitFormat, pack_units, row_tiles, units_across

LAYOUT = "cuda-units"
_GEMV_ROWS, _GEMM_ROWS = 16, 64


@hookimpl
def lowbit_register_kernels(register: Callable[[Kernel], None]) -> None:
    """Register ``cuda-units``."""
    register(UnitsKernel())


class UnitsKernel(Kernel):
    """Affine codes of 1 to 8 bits and codebooks of 2 to 8, whatever the layout; sums in float32, one rounding of the result.

    Prepared weights are units (``include/lowbit/unit.cuh``) and, for codebooks, the entries. float32 activations are multiplied by
    the dequantized weight.

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
        """Refuse other devices, unknown layouts, other grids, add-ons, and groups that no unit holds."""
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
        quantized = self.packers[packed.layout].unpack(packed)
        scheme, shape = packed.scheme, packed.shape
        format = unit_format(scheme, shape)
        buffers = {"units": pack_units(format, quantized.parts["codes"], *_scales_and_offsets(quantized, format))}
        buffers["arrived"] = torch.zeros(row_blocks(shape[0]), dtype=torch.int32, device=buffers["units"].device)
        if scheme.grid is Grid.CODEBOOK:
            buffers["codebook"] = quantized.parts["codebook"].reshape(-1).clone()
        return PackedTensor(PackedSpec(LAYOUT, scheme, shape, _specs(scheme, shape, format)), buffers)

    def dequantize(self, packed: PackedTensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Compute in float32, as the reference does, then round once."""
        prepared = self.prepare(packed)
        if dtype not in (*TYPES, torch.float32):
            return self.dequantize(prepared).to(dtype)
        units = prepared.buffers["units"]
        out = torch.empty(prepared.shape, dtype=dtype, device=units.device)
        with torch.cuda.device(units.device):
            format = unit_format(prepared.scheme, prepared.shape)
            _dequantizer(units.device.index, format, dtype)(
                units, out, _zero(prepared.scheme), prepared.buffers.get("codebook")
            )
        return out

    def matmul(self, x: Tensor, packed: PackedTensor, bias: Tensor | None = None) -> Tensor:
        """Choose by the number of rows of x."""
        prepared = self.prepare(packed)
        (rows, columns), tokens = prepared.shape, x.numel() // prepared.shape[1]
        if x.dtype not in TYPES or not 0 < tokens <= _GEMM_ROWS or columns % 8:
            return functional.linear(x, self.dequantize(prepared, x.dtype), bias)
        flat = _aligned(x.reshape(-1, columns))
        out = torch.empty(tokens, rows, dtype=x.dtype, device=x.device)
        bias = bias.to(x.dtype).contiguous() if bias is not None else None
        with torch.cuda.device(x.device):
            self._launch(flat, prepared, out, bias)
        return out.reshape(*x.shape[:-1], rows)

    def _launch(self, x: Tensor, prepared: PackedTensor, out: Tensor, bias: Tensor | None) -> None:
        format, buffers = unit_format(prepared.scheme, prepared.shape), prepared.buffers
        (rows, columns), zero, codebook = prepared.shape, _zero(prepared.scheme), buffers.get("codebook")
        index, tokens = x.device.index, x.shape[0]
        if tokens <= _GEMV_ROWS:
            width = 1 if tokens == 1 else 8 if tokens <= 8 else _GEMV_ROWS
            if gemv := _gemv(index, GemvShape(format, columns, rows, width, x.dtype, _dependent(index))):
                gemv(buffers["units"], x, out, bias, zero, codebook)
                return
        width = 32 if tokens <= 32 else _GEMM_ROWS
        if gemm := _gemm(index, GemmShape(format, columns, rows, width, x.dtype)):
            gemm(buffers["units"], x, out, buffers["arrived"], bias, zero, codebook)
        else:
            torch.mm(x, self.dequantize(prepared, x.dtype).T, out=out)
            if bias is not None:
                out += bias


def unit_format(scheme: Scheme, shape: tuple[int, int]) -> UnitFormat:
    """Return the units of a weight; call only when the kernel does not refuse its scheme."""
    group = _unit_group(scheme, shape)
    assert group is not None
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
    if scheme.permutation or scheme.rotation or scheme.outliers or scheme.flat:
        return f"takes groups of neighbours and no add-ons, not {scheme.summary()}"
    if scheme.scales.two_level and scheme.scales.across is Across.ROWS:
        return f"takes scales of single rows, not {scheme.summary()}"
    if _unit_group(scheme, shape) is None:
        return f"takes groups in multiples of {min(GROUP_SIZES)}, not of {scheme.group_size}"
    return None


def _unit_group(scheme: Scheme, shape: tuple[int, int]) -> int | None:
    """Return the largest group of units that lies inside the scheme's groups."""
    if scheme.group_size is None or scheme.group_size >= shape[1]:
        return COLUMNS
    return next((size for size in sorted(GROUP_SIZES, reverse=True) if scheme.group_size % size == 0), None)


def _scales_and_offsets(quantized: QuantizedTensor, format: UnitFormat) -> tuple[Tensor, Tensor | None]:
    """Return scales and offsets (out, groups of the units), as the format stores them."""
    scheme, columns = quantized.scheme, quantized.shape[1]
    scales, offsets = decode_scales(quantized), None
    if scheme.zero is Zero.INTEGER:
        offsets = quantized.parts["zeros"].float()
    elif scheme.zero is Zero.MINIMUM:
        offsets = decode_scales(quantized, "minimums")
    elif scheme.zero is Zero.FLOAT:
        offsets = -scales * decode_scales(quantized, "zeros")
    length = scheme.group_size or columns
    first = (
        torch.arange(0, columns, format.group_size, device=scales.device) // length
    )  # the scheme's group of each of ours
    scales = scales[:, first].to(format.scale_dtype)
    return scales, None if offsets is None else offsets[:, first].to(format.scale_dtype)


def _specs(scheme: Scheme, shape: tuple[int, int], format: UnitFormat) -> dict[str, TensorSpec]:
    units = TensorSpec(torch.uint8, (row_tiles(shape[0]), units_across(shape[1]), format.nbytes))
    specs = {"units": units, "arrived": TensorSpec(torch.int32, (row_blocks(shape[0]),))}
    if scheme.grid is Grid.CODEBOOK:
        (entries, _) = part_specs(scheme, shape)["codebook"].shape
        specs["codebook"] = TensorSpec(torch.float32, (entries,))
    return specs


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
