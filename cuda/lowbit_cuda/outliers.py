"""Outliers on the GPU: a sparse matrix (CSR) added to a product, or to a weight."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lowbit_cuda.gemm import OUTPUTS
from lowbit_cuda.loaded import LoadedKernel, load
from lowbit_cuda.program import KernelProgram

_COLUMNS = {torch.int16: "short", torch.int32: "int"}
_THREADS, _ROWS, _TOKENS = 256, 8, 8


@dataclass(frozen=True, slots=True, eq=False)
class OutlierMatrix:
    """CSR on a GPU: ``ends`` int32 (out + 1,), ``columns`` int16 or int32 (n,), ``values`` float16, bfloat16 or float32 (n,)."""

    ends: Tensor
    columns: Tensor
    values: Tensor

    def add_product(self, x: Tensor, out: Tensor) -> None:
        """Add x S^T to ``out`` (tokens, out); sums in float32. Rows of ``x`` (tokens, in) and of ``out`` are contiguous."""
        (tokens, rows), kernel = out.shape, self._kernel("lowbit_outlier_product", x.dtype)
        if tokens:
            sizes = (np.int32(tokens), np.int32(rows), np.int64(x.stride(0)), np.int64(out.stride(0)))
            grid = (-(-rows // _ROWS), -(-tokens // _TOKENS))
            kernel(grid, _THREADS, self.ends, self.columns, self.values, x, out, *sizes)

    def add_to(self, weight: Tensor) -> None:
        """Add S to contiguous ``weight`` (out, in), each entry rounded to its dtype."""
        rows, columns = weight.shape
        kernel = self._kernel("lowbit_outlier_add", weight.dtype)
        sizes = (np.int32(rows), np.int64(columns))
        kernel(-(-rows // _THREADS), _THREADS, self.ends, self.columns, self.values, weight, *sizes)

    def _kernel(self, entry: str, dtype: torch.dtype) -> LoadedKernel:
        return load(outlier_program(entry, dtype, self.columns.dtype, self.values.dtype), self.values.device.index)


def outlier_program(entry: str, dtype: torch.dtype, columns: torch.dtype, values: torch.dtype) -> KernelProgram:
    """Return an instance of ``outliers.cu``: ``lowbit_outlier_product`` or ``lowbit_outlier_add``."""
    defines: dict[str, str | int] = {
        "LOWBIT_TYPE": OUTPUTS[dtype],
        "LOWBIT_COLUMN": _COLUMNS[columns],
        "LOWBIT_VALUE": OUTPUTS[values],
    }
    return KernelProgram(Path(__file__).parent / "kernels" / "outliers.cu", entry, defines)
