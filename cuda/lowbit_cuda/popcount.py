"""``Popcount``: y = sum of s_p * (B_p x) + bias for sign matrices B_p with a scale for each row, by counting bits on tensor cores.

``include/lowbit/popcount.cuh`` draws sign units and says how: x is rounded to 16 bits for each warp's slice of a row, everything
after that is exact in integers. Everything is decided, compiled and loaded when the object is made, so that a call may be captured
in a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lowbit_cuda.errors import CudaError
from lowbit_cuda.gemm import OUTPUTS
from lowbit_cuda.launch import Launcher, shared_bytes
from lowbit_cuda.program import KernelProgram
from lowbit_cuda.units import COLUMNS, ROWS, row_tiles, units_across

SOURCE = Path(__file__).parent / "kernels" / "popcount.cu"
UNIT_BYTES = ROWS * COLUMNS // 8
MAX_TOKENS, MAX_PLANES, MAX_WARPS = 8, 4, 16
OLDEST = (8, 0)
"""mma with AND and a count of bits (PTX ISA, mma.m16n8k256)."""
_HELD = 16
"""Units times rows of x of a warp at most: four registers each, for the whole kernel."""
_RING_BYTES, _STAGES = 128 * 1024, 5
"""Of the weight stream: shared memory for all blocks of a processor, and row tiles.

One plane and one row of x took 4.63, 4.33, 4.33, 4.43, 4.43 us with 3, 4, 5, 6, 8 row tiles at 4096x14336, and 9.21, 9.11, 9.15,
9.22, 9.27 us at 8192x28672 (H200, 2026-11-21; ``bench/gpu_popcount.py --tune``).
"""


@dataclass(frozen=True, slots=True)
class PopcountShape:
    """The compile-time side of a product.

    Attributes:
        in_features: Columns of the weight, a multiple of 8.
        out_features: Rows of the weight.
        tokens: Rows of x, 1 to 8.
        planes: Sign matrices that are added, 1 to 4.
        dtype: Of x: float16, bfloat16 or float32.
        out_dtype: Of the result and the bias; None: that of x.
        scaled: Every column of x is multiplied by a factor first.
        dependent: The launch may begin before the previous kernel of the stream ends; weights and scales must be older than that.
        most_stages: Row tiles that are on their way to shared memory at once, at most.
    """

    in_features: int
    out_features: int
    tokens: int = 1
    planes: int = 1
    dtype: torch.dtype = torch.float16
    out_dtype: torch.dtype | None = None
    scaled: bool = False
    dependent: bool = False
    most_stages: int = _STAGES

    @property
    def units(self) -> int:
        """Sign units across a row."""
        return units_across(self.in_features)

    @property
    def width(self) -> int:
        """Rows of x that the kernel computes."""
        return 1 << (self.tokens - 1).bit_length()

    @property
    def each(self) -> int:
        """Units of a warp."""
        return -(-self.units // MAX_WARPS)

    @property
    def warps(self) -> int:
        """Warps of a block: each has its slice of every row."""
        return -(-self.units // self.each)

    @property
    def together(self) -> int:
        """Blocks that are meant to share a processor: narrow weights have few warps in one."""
        return max(1, MAX_WARPS // self.warps)

    def stages(self, capability: tuple[int, int]) -> int:
        """Return how many row tiles are on their way to shared memory at once on a device."""
        stage = self.warps * self.each * self.planes * UNIT_BYTES
        room = (shared_bytes(capability) - 1024) // self.together - self.tile_bytes
        wanted = min(self.most_stages, _RING_BYTES // self.together // stage)
        return min(max(wanted, 2), room // stage)

    @property
    def tile_bytes(self) -> int:
        """Shared memory of the sums of one row tile."""
        return 4 * ROWS * self.width * self.planes * self.warps

    def ring_bytes(self, capability: tuple[int, int]) -> int:
        """Return the shared memory of the weight stream."""
        return self.stages(capability) * self.warps * self.each * self.planes * UNIT_BYTES

    def batch(self, capability: tuple[int, int]) -> int:
        """Return how many row tiles are summed at once: as many as fit, at most 64."""
        room = (shared_bytes(capability) - 1024) // self.together
        return min(64, (room - self.ring_bytes(capability)) // self.tile_bytes)

    def why_not(self, capability: tuple[int, int]) -> str | None:
        """Return None when a kernel of this shape runs on a device, else the reason."""
        if capability < OLDEST:
            return f"tensor cores count bits from compute capability 8.0 on, and the GPU has {capability[0]}.{capability[1]}"
        if not shared_bytes(capability):
            return f"compute capability {capability[0]}.{capability[1]} is not known"
        if not 1 <= self.tokens <= MAX_TOKENS or not 1 <= self.planes <= MAX_PLANES:
            return (
                f"a product of signs has 1 to {MAX_TOKENS} rows of x and 1 to {MAX_PLANES} planes, "
                f"got {self.tokens} and {self.planes}"
            )
        if self.dtype not in OUTPUTS or (self.out_dtype or self.dtype) not in OUTPUTS:
            return f"x and the result are float16, bfloat16 or float32, not {self.dtype} and {self.out_dtype or self.dtype}"
        if self.in_features % 8:
            return f"in_features must be a multiple of 8, got {self.in_features}"
        if self.each * self.width > _HELD:
            most = _HELD // self.width * MAX_WARPS * COLUMNS
            return f"in_features is at most {most} with {self.tokens} rows of x, got {self.in_features}"
        if self.stages(capability) < 2:
            return f"needs more shared memory than the {shared_bytes(capability) // 1024} KiB of a block"
        return None

    def with_tokens(self, tokens: int) -> PopcountShape:
        """Return the shape for that many rows of x: the kernel is the same for all that it has room for."""
        return replace(self, tokens=replace(self, tokens=tokens).width)

    def most_tokens(self, capability: tuple[int, int]) -> int:
        """Return how many rows of x fit a kernel on a device, 1 to 8; 0 when not even one does."""
        fitting = (width for width in (8, 4, 2, 1) if replace(self, tokens=width).why_not(capability) is None)
        return next(fitting, 0)

    def program(self, capability: tuple[int, int]) -> KernelProgram:
        """Return the kernel to compile."""
        defines: dict[str, str | int] = {
            "LOWBIT_X": OUTPUTS[self.dtype],
            "LOWBIT_Y": OUTPUTS[self.out_dtype or self.dtype],
            "LOWBIT_TOKENS": self.width,
            "LOWBIT_PLANES": self.planes,
            "LOWBIT_WARPS": self.warps,
            "LOWBIT_UNITS": self.each,
            "LOWBIT_EXACT": str(self.warps * self.each == self.units).lower(),
            "LOWBIT_STAGES": self.stages(capability),
            "LOWBIT_SCALED": str(self.scaled).lower(),
            "LOWBIT_DEPENDENT": str(self.dependent).lower(),
        }
        return KernelProgram(SOURCE, "lowbit_popcount", defines)


class Popcount:
    """A compiled product on the current device. Raises CudaError, with the reason, when the shape does not fit."""

    def __init__(self, shape: PopcountShape) -> None:
        capability = torch.cuda.get_device_capability()
        if reason := shape.why_not(capability):
            raise CudaError(reason)
        self.shape, tiles = shape, row_tiles(shape.out_features)
        processors = torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
        blocks = min(processors * shape.together, tiles)
        self.shares, self.batch = divmod(tiles, blocks), min(-(-tiles // blocks), shape.batch(capability))
        shared = shape.ring_bytes(capability) + self.batch * shape.tile_bytes
        self._launcher = Launcher(shape.program(capability), shared)
        self._config = self._launcher.config(blocks, 32 * shape.warps, shape.dependent)

    def __call__(
        self,
        signs: Tensor,
        scales: Tensor,
        x: Tensor,
        out: Tensor,
        bias: Tensor | None = None,
        columns: Tensor | None = None,
    ) -> None:
        """Write the product into ``out`` on torch's current stream.

        ``signs`` are from ``pack_signs``; ``scales`` float32 (planes, out_features), contiguous; ``x`` (tokens, in_features) and
        ``out`` (tokens, out_features) have contiguous rows, those of x 16-byte aligned; ``bias`` (out_features,) has the dtype of
        ``out``; ``columns`` float32 (in_features,), 16-byte aligned, goes with a shape that is ``scaled``.
        """
        shape = self.shape
        integers = (x.shape[0], shape.in_features, shape.out_features, x.stride(0), out.stride(0))
        self._launcher.launch(
            self._config,
            [
                signs.data_ptr(),
                scales.data_ptr(),
                columns.data_ptr() if columns is not None else 0,
                x.data_ptr(),
                bias.data_ptr() if bias is not None else 0,
                out.data_ptr(),
                *(np.int32(value) for value in (*integers, *self.shares, shape.units, self.batch)),
            ],
        )


def pack_signs(planes: Tensor) -> Tensor:
    """Arrange planes uint8 0/1 (planes, out, in), 1 for +, as sign units: uint8 (row tiles, units across, planes, 512).

    Rows and columns are padded with 0; x has nothing there.
    """
    count, rows, columns = planes.shape
    tiles, units = row_tiles(rows), units_across(columns)
    padded = torch.nn.functional.pad(planes, (0, units * COLUMNS - columns, 0, tiles * ROWS - rows))
    # rows: (tile, row half, r); columns: (unit, g2 g1, g0, t, i2, i1 i0)
    split = padded.view(count, tiles, 2, 8, units, 4, 2, 4, 2, 4)
    words = torch.zeros(
        tiles, units, count, 8, 4, 2, 2, dtype=torch.int32, device=planes.device
    )  # (.., r, t, g0, half)
    for group in range(4):
        for upper in range(2):
            for low in range(4):
                bit = 8 * low + 4 * upper + group
                chosen = split[:, :, :, :, :, group, :, :, upper, low]  # (plane, tile, half, r, unit, g0, t)
                words |= chosen.permute(1, 4, 0, 3, 6, 5, 2).int() << bit
    return words.view(tiles, units, count, -1).view(torch.uint8)


def unpack_signs(signs: Tensor, shape: tuple[int, int]) -> Tensor:
    """Undo ``pack_signs`` for a weight of ``shape`` (out, in): uint8 0/1 (planes, out, in)."""
    tiles, units, count = signs.shape[:3]
    words = signs.view(torch.int32).view(tiles, units, count, 8, 4, 2, 2)
    planes = torch.empty(count, tiles, 2, 8, units, 4, 2, 4, 2, 4, dtype=torch.uint8, device=signs.device)
    for group in range(4):
        for upper in range(2):
            for low in range(4):
                bits = words >> (8 * low + 4 * upper + group) & 1
                planes[:, :, :, :, :, group, :, :, upper, low] = bits.permute(2, 0, 6, 3, 1, 5, 4).to(torch.uint8)
    return planes.view(count, tiles * ROWS, units * COLUMNS)[:, : shape[0], : shape[1]].contiguous()
