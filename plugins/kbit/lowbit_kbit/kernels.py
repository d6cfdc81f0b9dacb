"""The CUDA kernel of the layouts ``kbit-words`` and ``kbit-dense``: dequantizes at the speed of memory, then torch multiplies."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit import PackedTensor, Scheme
from lowbit.grids import decode_scales
from lowbit.interfaces import Kernel, MatmulProblem
from lowbit.scheme import Across, Grid, ScaleCoding
from lowbit_cuda.available import capability_reason, why_not_cuda
from lowbit_kbit.packers import StreamPacker
from lowbit_kbit.streams import MOST_CODES

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class StreamKernel(Kernel):
    """Serves codebook schemes of one stream layout on NVIDIA GPUs. Its weights equal the reference's bit for bit."""

    name = "kbit-cuda"
    priority = 10

    def __init__(self, packer: StreamPacker) -> None:
        self.packer = packer
        self.name = f"{packer.layout}-cuda"  # type: ignore[misc]  # one instance a layout, each with its own name

    def why_not(self, problem: MatmulProblem) -> str | None:
        """Refuse other layouts, devices and grids."""
        if problem.layout != self.packer.layout:
            return f"runs layout {self.packer.layout!r}, not {problem.layout!r}"
        if problem.device != "cuda":
            return f"runs {self.packer.layout} on NVIDIA GPUs, not on {problem.device}"
        if problem.scheme.grid is not Grid.CODEBOOK:
            return f"decodes {self.packer.layout} through a codebook, and the scheme is {problem.scheme.summary()}"
        if problem.dtype not in DTYPES:
            return f"writes {self.packer.layout} as float16, bfloat16 or float32, not {problem.dtype}"
        if problem.capability is not None and (reason := capability_reason(problem.capability)):
            return reason
        if problem.shape[0] * problem.shape[1] >= MOST_CODES:
            return f"counts fewer than {MOST_CODES} weights, got {problem.shape[0]}x{problem.shape[1]}"
        return why_not_cuda() or self.packer.why_not(problem.scheme, problem.shape)

    def dequantize(self, packed: PackedTensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Write codebook[code] * scale, computed in float32 and rounded once; other dtypes pass through float32."""
        from lowbit_kbit.launches import dequantize

        if dtype not in DTYPES:
            return self.dequantize(packed).to(dtype)
        scheme, buffers = packed.scheme, packed.buffers
        out = torch.empty(packed.shape, dtype=dtype, device=buffers["qweight"].device)
        scales, second = _scales(packed)
        codebook = buffers["codebook"].view(-1)
        stream = self.packer.stream.capitalize()
        dequantize(stream, scheme.bits, buffers["qweight"], codebook, scales, out, _grid(scheme, packed.shape), second)
        return out


def _grid(scheme: Scheme, shape: tuple[int, int]) -> tuple[int, int, int]:
    """Return columns of a row, weights of a group and groups of a row; flat groups are those of one long row."""
    columns = shape[0] * shape[1] if scheme.flat else shape[1]
    return columns, min(scheme.group_size or columns, columns), scheme.groups(shape)


def _scales(packed: PackedTensor) -> tuple[Tensor, tuple[Tensor, int, int] | None]:
    """Return the stored scales and their second level as the kernel takes it; other second levels are decoded before."""
    scales, buffers = packed.scheme.scales, packed.buffers
    if not scales.two_level and buffers["scales"].dtype in DTYPES:
        return buffers["scales"], None
    groups = packed.scheme.groups(packed.shape)
    if (
        scales.coding is ScaleCoding.LINEAR
        and scales.across is Across.GROUPS
        and buffers["super_scales"].dtype in DTYPES
    ):
        supers = buffers["super_scales"]
        return buffers["scales"], (supers, scales.super_group or groups, supers.shape[1])
    return _decoded(packed), None


def _decoded(packed: PackedTensor) -> Tensor:
    from lowbit.tensors import QuantizedTensor

    rows, columns = packed.shape
    codes = torch.zeros((), dtype=torch.uint8, device=packed.buffers["qweight"].device).expand(rows, columns)
    rest = {name: buffer for name, buffer in packed.buffers.items() if name != "qweight"}
    return decode_scales(QuantizedTensor(packed.scheme, packed.shape, {"codes": codes, **rest})).contiguous()
