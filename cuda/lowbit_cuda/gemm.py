"""``Gemm``: y = x W^T + bias for 17 to 64 rows of x, and ``Dequantizer``: the weight as floats; both for one weight in units.

Everything is decided, compiled and loaded when an object is made; a call only launches (and takes its workspace from torch's
allocator), so that it may be captured in a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lowbit_cuda.errors import CudaError
from lowbit_cuda.gemv import TYPES
from lowbit_cuda.launch import Launcher, shared_bytes
from lowbit_cuda.program import KernelProgram
from lowbit_cuda.units import ROWS, UnitFormat, row_tiles, units_across

KERNELS = Path(__file__).parent / "kernels"
WIDTHS = (16, 32, 64)
WARPS, ROW_TILES = 8, 16
"""Warps and row tiles of a block: as in ``gemm.cuh``."""
_DEQUANTIZE_WARPS = 8
OUTPUTS = {**TYPES, torch.float32: "float"}
BFLOAT16_POWER = 6
"""bf16 activations are multiplied by 2**-6 before they become fp16: |x| up to 4 million stays finite."""


def row_blocks(out_features: int) -> int:
    """Return the blocks of rows of W: what a GEMM counts arrivals for."""
    return -(-row_tiles(out_features) // ROW_TILES)


@dataclass(frozen=True, slots=True)
class GemmShape:
    """The compile-time side of a GEMM: what the weight is, and how many rows of x there may be."""

    format: UnitFormat
    in_features: int
    out_features: int
    tokens: int = 64
    dtype: torch.dtype = torch.float16

    @property
    def width(self) -> int:
        """Rows of x that the kernel computes."""
        return next((width for width in WIDTHS if self.tokens <= width), 0)

    @property
    def steps(self) -> int:
        """Steps along in_features."""
        return units_across(self.in_features)

    @property
    def row_blocks(self) -> int:
        """Blocks of rows of W."""
        return row_blocks(self.out_features)

    def stages(self, capability: tuple[int, int]) -> int:
        """Return how many steps are on their way to shared memory at once: as many as fit, at most 4."""
        free = shared_bytes(capability) - 1024 - self.format.decoder.table_bytes
        return min(4, free // self._stage())

    def shared(self, capability: tuple[int, int]) -> int:
        """Return the shared memory of a block."""
        return self.stages(capability) * self._stage() + self.format.decoder.table_bytes

    def _stage(self) -> int:
        return self.width * 512 + ROW_TILES * self.format.nbytes

    def why_not(self, capability: tuple[int, int]) -> str | None:
        """Return None when a kernel of this shape runs on a device, else the reason."""
        if not self.width:
            return f"a GEMM has at most {WIDTHS[-1]} rows of x, got {self.tokens}"
        if self.dtype not in TYPES:
            return f"x is float16 or bfloat16, not {self.dtype}"
        if self.in_features % 8:
            return f"in_features must be a multiple of 8, got {self.in_features}"
        if capability < (8, 0):
            return f"needs compute capability 8.0, the device has {capability[0]}.{capability[1]}"
        if self.stages(capability) < 2:
            return f"needs more shared memory than the {shared_bytes(capability) // 1024} KiB of a block"
        return None

    def program(self, capability: tuple[int, int]) -> KernelProgram:
        """Return the kernel to compile."""
        defines: dict[str, str | int] = {
            "LOWBIT_TOKENS": self.width,
            "LOWBIT_STAGES": self.stages(capability),
            "LOWBIT_TYPE": TYPES[self.dtype],
        }
        return self.format.program(KERNELS / "gemm.cu", "lowbit_gemm", defines)


class Gemm:
    """A compiled GEMM on the current device. Raises CudaError, with the reason, when the shape does not fit."""

    def __init__(self, shape: GemmShape) -> None:
        capability = torch.cuda.get_device_capability()
        if reason := shape.why_not(capability):
            raise CudaError(reason)
        self.shape = shape
        self._launcher = Launcher(shape.program(capability), shape.shared(capability))
        processors = torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
        self.items = shape.row_blocks * shape.steps
        self.grid = min(processors, self.items)
        self._config = self._launcher.config(self.grid, 32 * WARPS)

    def __call__(
        self,
        weights: Tensor,
        x: Tensor,
        out: Tensor,
        arrived: Tensor,
        bias: Tensor | None = None,
        zero: float = 0.0,
        codebook: Tensor | None = None,
    ) -> None:
        """Write x W^T + bias into ``out`` on torch's current stream.

        Arguments are those of ``Gemv``; ``arrived`` int32 (row blocks,) is zero before and after, and belongs to the weight: two
        streams must not multiply by one weight at once.
        """
        shape, power = self.shape, 0
        if x.dtype == torch.bfloat16:
            x, power = torch.mul(x, 2.0**-BFLOAT16_POWER, out=torch.empty_like(x, dtype=torch.float16)), BFLOAT16_POWER
        partial = torch.empty(2 * self.grid * ROW_TILES * ROWS * shape.width, dtype=torch.float32, device=x.device)
        integers = (x.shape[0], shape.in_features, shape.out_features, x.stride(0), out.stride(0))
        sizes = (row_tiles(shape.out_features), shape.steps, self.items)
        self._launcher.launch(
            self._config,
            [
                weights.data_ptr(),
                codebook.data_ptr() if codebook is not None else 0,
                x.data_ptr(),
                bias.data_ptr() if bias is not None else 0,
                out.data_ptr(),
                partial.data_ptr(),
                arrived.data_ptr(),
                *(np.int32(value) for value in (*integers, *sizes)),
                np.float32(zero),
                np.float32(2.0**power),
            ],
        )


class Dequantizer:
    """A compiled dequantize kernel on the current device, for weights of one unit format."""

    def __init__(self, format: UnitFormat, dtype: torch.dtype) -> None:
        self.format, self.dtype = format, dtype
        self._launcher = Launcher(self.program(format, dtype))
        self._processors = torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count

    @staticmethod
    def program(format: UnitFormat, dtype: torch.dtype) -> KernelProgram:
        """Return the kernel to compile."""
        return format.program(KERNELS / "dequantize.cu", "lowbit_dequantize", {"LOWBIT_TYPE": OUTPUTS[dtype]})

    def __call__(self, weights: Tensor, out: Tensor, zero: float = 0.0, codebook: Tensor | None = None) -> None:
        """Write the weight into contiguous ``out`` (out_features, in_features) on torch's current stream."""
        rows, columns = out.shape
        across = units_across(columns)
        units = row_tiles(rows) * across
        grid = min(-(-units // _DEQUANTIZE_WARPS), 8 * self._processors)
        self._launcher.launch(
            self._launcher.config(grid, 32 * _DEQUANTIZE_WARPS),
            [
                weights.data_ptr(),
                codebook.data_ptr() if codebook is not None else 0,
                out.data_ptr(),
                np.int32(rows),
                np.int32(columns),
                np.int64(units),
                np.int32(across),
                np.float32(zero),
            ],
        )
