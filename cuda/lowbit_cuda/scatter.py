"""``write_scattered``: a weight whose units hold its columns in another order, as floats in its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lowbit_cuda.gemm import OUTPUTS
from lowbit_cuda.loaded import load
from lowbit_cuda.program import KernelProgram
from lowbit_cuda.units import UnitFormat, row_tiles, units_across

_WARPS, _BLOCKS_PER_PROCESSOR = 8, 8


def scatter_program(format: UnitFormat, dtype: torch.dtype) -> KernelProgram:
    """Return an instance of ``scatter.cu``."""
    source = Path(__file__).parent / "kernels" / "scatter.cu"
    return format.program(source, "lowbit_scatter", {"LOWBIT_TYPE": OUTPUTS[dtype]})


def write_scattered(
    format: UnitFormat, units: Tensor, source: Tensor, out: Tensor, zero: float = 0.0, codebook: Tensor | None = None
) -> None:
    """Write the weight into contiguous ``out`` (out_features, in_features) on torch's current stream.

    ``source`` int32 (columns of the units,), in multiples of 4: the column of ``out`` of each, in_features where there is none.
    """
    rows, columns = out.shape
    across = units_across(len(source))
    count = row_tiles(rows) * across
    kernel = load(scatter_program(format, out.dtype), out.device.index)
    kernel(
        max(1, min(-(-count // _WARPS), _BLOCKS_PER_PROCESSOR * kernel.processors)),
        32 * _WARPS,
        *(units, codebook, source, out),
        *(np.int32(value) for value in (rows, columns, len(source))),
        np.int64(count),
        np.int32(across),
        np.float32(zero),
    )
