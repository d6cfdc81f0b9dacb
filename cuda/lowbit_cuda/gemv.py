"""``Gemv``: y = x W^T + bias for 1 to 8 rows of x and one weight in units, ready to be launched again and again.

Everything is decided, compiled and loaded when the object is made, so that a call may be captured in a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowbit_cuda.arch import architecture
from lowbit_cuda.errors import CudaError
from lowbit_cuda.program import KernelProgram
from lowbit_cuda.units import COLUMNS, ROWS, unit_bytes

SOURCE = Path(__file__).parent / "kernels" / "gemv.cu"
STAGES = 3
"""Units on their way to shared memory at once. Measured on an H200 (2026-11-21): 3 is best or tied at 2 and 4 bits."""
MAX_TOKENS = 8
MAX_WARPS = 16
SHARED_BYTES = {(7, 5): 64, (8, 0): 163, (8, 6): 99, (8, 9): 99, (9, 0): 227, (10, 0): 227, (12, 0): 99}
"""Shared memory that a block may have, in KiB, by compute capability (CUDA programming guide, technical specifications)."""
_TYPES = {torch.float16: "__half", torch.bfloat16: "__nv_bfloat16"}


@dataclass(frozen=True, slots=True)
class GemvShape:
    """The compile-time side of a GEMV: what the weight is and how many rows of x there may be (1, or up to 8)."""

    bits: int
    group_size: int
    zeros: bool
    in_features: int
    out_features: int
    tokens: int = 1
    dtype: torch.dtype = torch.float16
    dependent: bool = False

    @property
    def units(self) -> int:
        """Units across a row."""
        return -(-self.in_features // COLUMNS)

    @property
    def units_per_warp(self) -> int:
        """Units that one warp owns: its activations stay in registers, 32 of them for each unit."""
        return next((count for count in (1, 2, 4) if self.units <= count * MAX_WARPS and self.units % count == 0), 0)

    @property
    def warps(self) -> int:
        """Warps in a block."""
        return self.units // self.units_per_warp

    def why_not(self, capability: tuple[int, int]) -> str | None:
        """Return None when a kernel of this shape runs on a device, else the reason."""
        if self.tokens > MAX_TOKENS:
            return f"a GEMV has at most {MAX_TOKENS} rows of x, got {self.tokens}"
        if self.in_features % 8:
            return f"in_features must be a multiple of 8, got {self.in_features}"
        if not self.units_per_warp:
            return f"{self.units} units across do not divide over {MAX_WARPS} warps of 1, 2 or 4 units"
        if capability not in SHARED_BYTES:
            return f"compute capability {capability[0]}.{capability[1]} is not known"
        if self.batch(capability) < 1:
            return f"needs more shared memory than the {SHARED_BYTES[capability]} KiB of a block"
        return None

    def defines(self) -> dict[str, str | int]:
        """Return the macros of the kernel."""
        return {
            "LOWBIT_BITS": self.bits,
            "LOWBIT_GROUP": self.group_size,
            "LOWBIT_ZEROS": str(self.zeros).lower(),
            "LOWBIT_TOKENS": 1 if self.tokens == 1 else MAX_TOKENS,
            "LOWBIT_WARPS": self.warps,
            "LOWBIT_UNITS": self.units_per_warp,
            "LOWBIT_STAGES": STAGES,
            "LOWBIT_DEPENDENT": str(self.dependent).lower(),
            "LOWBIT_TYPE": _TYPES[self.dtype],
        }

    def program(self) -> KernelProgram:
        """Return the kernel to compile."""
        return KernelProgram(SOURCE, "lowbit_gemv", self.defines())

    def ring_bytes(self) -> int:
        """Return the shared memory of the weight stream."""
        return self.warps * STAGES * self.units_per_warp * unit_bytes(self.bits, self.group_size, self.zeros)

    def tile_bytes(self) -> int:
        """Return the shared memory of one row tile's sums."""
        return 4 * self.warps * ROWS * (1 if self.tokens == 1 else MAX_TOKENS)

    def batch(self, capability: tuple[int, int]) -> int:
        """Return how many row tiles are summed at once: as many as fit, at most 64."""
        return min(64, (SHARED_BYTES[capability] * 1024 - 1024 - self.ring_bytes()) // self.tile_bytes())


class Gemv:
    """A compiled GEMV on the current device. Raises CudaError, with the reason, when the shape does not fit."""

    def __init__(self, shape: GemvShape) -> None:
        from cuda.bindings import driver
        from cuda.core import Device, LaunchConfig

        self.shape, self._device = shape, Device(torch.cuda.current_device())
        self._device.set_current()
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        capability = (properties.major, properties.minor)
        if reason := shape.why_not(capability):
            raise CudaError(reason)
        self._kernel = shape.program().compile(architecture(capability)).get_kernel("lowbit_gemv")
        self.tiles = -(-shape.out_features // ROWS)
        grid = min(properties.multi_processor_count, self.tiles)
        self.batch = min(-(-self.tiles // grid), shape.batch(capability))
        shared = shape.ring_bytes() + self.batch * shape.tile_bytes()
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        (status,) = driver.cuKernelSetAttribute(attribute, shared, self._kernel.handle, self._device.device_id)
        if status != driver.CUresult.CUDA_SUCCESS:
            raise CudaError(f"the driver refused {shared} bytes of shared memory: {status.name}")
        self._config = LaunchConfig(
            grid=grid, block=32 * shape.warps, shmem_size=shared, programmatic_stream_serialization=shape.dependent
        )

    def __call__(self, weights: Tensor, x: Tensor, out: Tensor, bias: Tensor | None = None, zero: float = 0.0) -> None:
        """Write x W^T + bias into ``out`` on torch's current stream.

        ``weights`` are units from ``pack_units``; ``x`` (tokens, in_features) and ``out`` (tokens, out_features) have the shape's
        dtype and contiguous rows; ``zero`` is the zero of every group when groups have none of their own.
        """
        from cuda.core import launch

        integers = (x.shape[0], self.shape.in_features, self.shape.out_features, x.stride(0), out.stride(0))
        launch(
            self._device.create_stream(_TorchStream(torch.cuda.current_stream())),
            self._config,
            self._kernel,
            weights.data_ptr(),
            x.data_ptr(),
            bias.data_ptr() if bias is not None else 0,
            out.data_ptr(),
            *(np.int32(value) for value in (*integers, self.tiles, self.shape.units, self.batch)),
            np.float32(zero),
        )


class _TorchStream:
    """A torch stream as cuda.core takes it."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, int(self._stream.cuda_stream)
