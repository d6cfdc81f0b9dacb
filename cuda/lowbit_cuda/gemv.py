"""``Gemv``: y = x W^T + bias for 1 to 16 rows of x and one weight in units, ready to be launched again and again.

Everything is decided, compiled and loaded when the object is made, so that a call may be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lowbit_cuda.errors import CudaError
from lowbit_cuda.launch import Launcher, shared_bytes
from lowbit_cuda.program import KernelProgram
from lowbit_cuda.units import ROWS, UnitFormat, row_tiles, units_across

SOURCE = Path(__file__).parent / "kernels" / "gemv.cu"
MAX_TOKENS = 16
TYPES = {torch.float16: "__half", torch.bfloat16: "__nv_bfloat16"}


@dataclass(frozen=True, slots=True)
class Split:
    """How a row's units are shared out: ``cluster`` blocks of ``warps`` warps of ``units`` units each."""

    cluster: int
    warps: int
    units: int


def splits(units: int, tokens: int, clusters: bool) -> Iterator[Split]:
    """Yield how a row of ``units`` can be shared out, the best first; nothing when it is too long.

    The activations of a warp stay in its registers: 32 for each unit and 8 tokens. So 28 warps have room for one unit, 16 for two
    (one, beyond 8 tokens); longer rows need a cluster, which only Hopper and later have. In a cluster one unit a warp is the better
    for one token (11.4 against 11.9 us at 14336x4096), two for several (12.5 against 13.0; H200, 2026-11-21).
    """
    for cluster in (1, 2, 4, 8) if clusters else (1,):
        choices = [(16, 1), (16, 2), (28, 1)] if tokens <= 8 else [(16, 1)]
        if cluster > 1 and tokens == 1:
            choices.sort(key=lambda choice: choice[1])
        for most_warps, each in choices:
            warps = -(-units // (cluster * each))
            if warps <= most_warps:
                yield Split(cluster, warps, each)


def split_row(units: int, tokens: int, clusters: bool) -> Split | None:
    """Return the best way to share out a row of ``units``, or None when it is too long."""
    return next(splits(units, tokens, clusters), None)


@dataclass(frozen=True, slots=True)
class GemvShape:
    """The compile-time side of a GEMV: what the weight is and how many rows of x there may be (1, up to 8, up to 16)."""

    format: UnitFormat
    in_features: int
    out_features: int
    tokens: int = 1
    dtype: torch.dtype = torch.float16
    dependent: bool = False

    @property
    def units(self) -> int:
        """Units across a row."""
        return units_across(self.in_features)

    @property
    def width(self) -> int:
        """Rows of x that the kernel computes."""
        return 1 if self.tokens == 1 else 8 if self.tokens <= 8 else 16

    def stages(self, capability: tuple[int, int]) -> int:
        """Return how many row tiles are on their way to shared memory at once.

        Measured on an H200 (2026-11-21): 3 is best for one row of x and integer codes, 2 for several rows and for codebooks.
        """
        return self._stages(self.split(capability), capability)

    def _stages(self, split: Split, capability: tuple[int, int]) -> int:
        free = shared_bytes(capability) - 1024 - self.format.decoder.table_bytes - self._tile_bytes(split)
        most = free // (split.warps * split.units * self.format.nbytes)
        return min(most, 3 if self.tokens == 1 and self.format.decoder.integer else 2)

    def split(self, capability: tuple[int, int]) -> Split:
        """Return how rows are shared out on a device; only when ``why_not`` is None."""
        return next(self._splits(capability))

    def _splits(self, capability: tuple[int, int]) -> Iterator[Split]:
        """Yield the ways that have room: for two stages, and in groups of 16 for the sums of x over each in registers."""
        clusters = capability >= (9, 0)
        for split in (split_row(self.units, self.tokens, clusters), *splits(self.units, self.tokens, clusters)):
            if split is None or (self.format.group_size == 16 and split.units * split.warps > 16):
                continue
            if self._stages(split, capability) >= 2:
                yield split

    def why_not(self, capability: tuple[int, int]) -> str | None:
        """Return None when a kernel of this shape runs on a device, else the reason."""
        if self.tokens > MAX_TOKENS:
            return f"a GEMV has at most {MAX_TOKENS} rows of x, got {self.tokens}"
        if self.dtype not in TYPES:
            return f"x is float16 or bfloat16, not {self.dtype}"
        if self.in_features % 8:
            return f"in_features must be a multiple of 8, got {self.in_features}"
        if not shared_bytes(capability):
            return f"compute capability {capability[0]}.{capability[1]} is not known"
        if split_row(self.units, self.tokens, capability >= (9, 0)) is None:
            return f"in_features {self.in_features} needs more warps than a block has"
        if next(self._splits(capability), None) is None:
            return f"needs more shared memory than the {shared_bytes(capability) // 1024} KiB of a block"
        return None

    def program(self, capability: tuple[int, int]) -> KernelProgram:
        """Return the kernel to compile."""
        split = self.split(capability)
        defines: dict[str, str | int] = {
            "LOWBIT_TOKENS": self.width,
            "LOWBIT_WARPS": split.warps,
            "LOWBIT_UNITS": split.units,
            "LOWBIT_CLUSTER": split.cluster,
            "LOWBIT_EXACT": str(split.cluster * split.warps * split.units == self.units).lower(),
            "LOWBIT_STAGES": self.stages(capability),
            "LOWBIT_DEPENDENT": str(self.dependent).lower(),
            "LOWBIT_TYPE": TYPES[self.dtype],
        }
        return self.format.program(SOURCE, "lowbit_gemv", defines)

    def fixed_bytes(self, capability: tuple[int, int]) -> int:
        """Return the shared memory of the weight stream and the decoder's table."""
        split = self.split(capability)
        return (
            split.warps * self.stages(capability) * split.units * self.format.nbytes + self.format.decoder.table_bytes
        )

    def tile_bytes(self, capability: tuple[int, int]) -> int:
        """Return the shared memory of one row tile's sums."""
        return self._tile_bytes(self.split(capability))

    def _tile_bytes(self, split: Split) -> int:
        return 4 * ROWS * self.width * (split.warps + (split.cluster > 1))

    def batch(self, capability: tuple[int, int]) -> int:
        """Return how many row tiles are summed at once: as many as fit, at most 64."""
        free = shared_bytes(capability) - 1024 - self.fixed_bytes(capability)
        return min(64, free // self.tile_bytes(capability))


class Gemv:
    """A compiled GEMV on the current device. Raises CudaError, with the reason, when the shape does not fit."""

    def __init__(self, shape: GemvShape) -> None:
        capability = torch.cuda.get_device_capability()
        if reason := shape.why_not(capability):
            raise CudaError(reason)
        self.shape, split = shape, shape.split(capability)
        self.tiles = row_tiles(shape.out_features)
        processors = torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
        most = shape.fixed_bytes(capability) + shape.batch(capability) * shape.tile_bytes(capability)
        self._launcher = Launcher(shape.program(capability), most)
        clusters = processors
        if split.cluster > 1:
            clusters = self._launcher.active_clusters(32 * split.warps, split.cluster)
        clusters = min(clusters, self.tiles)
        self.batch = min(-(-self.tiles // clusters), shape.batch(capability))
        self._config = self._launcher.config(clusters * split.cluster, 32 * split.warps, shape.dependent, split.cluster)

    def __call__(
        self,
        weights: Tensor,
        x: Tensor,
        out: Tensor,
        bias: Tensor | None = None,
        zero: float = 0.0,
        codebook: Tensor | None = None,
    ) -> None:
        """Write x W^T + bias into ``out`` on torch's current stream.

        ``weights`` are units from ``pack_units``; ``x`` (tokens, in_features) and ``out`` (tokens, out_features) have the shape's
        dtype, contiguous rows and 16-byte aligned rows of x; ``zero`` is the zero of every group when groups have none of their own;
        ``codebook`` float32 (2**bits,).
        """
        integers = (x.shape[0], self.shape.in_features, self.shape.out_features, x.stride(0), out.stride(0))
        self._launcher.launch(
            self._config,
            [
                weights.data_ptr(),
                codebook.data_ptr() if codebook is not None else 0,
                x.data_ptr(),
                bias.data_ptr() if bias is not None else 0,
                out.data_ptr(),
                *(np.int32(value) for value in (*integers, self.tiles, self.shape.units, self.batch)),
                np.float32(zero),
            ],
        )
