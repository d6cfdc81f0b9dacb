"""The programs of this package, for ``lowbit kernels`` and the test that compiles everything."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lowbit_cuda.arch import capability_of
from lowbit_cuda.decoder import AFFINE, CODEBOOK
from lowbit_cuda.gemm import Dequantizer, GemmShape
from lowbit_cuda.gemv import GemvShape
from lowbit_cuda.outliers import outlier_program
from lowbit_cuda.popcount import PopcountShape
from lowbit_cuda.program import KernelProgram
from lowbit_cuda.scatter import scatter_program
from lowbit_cuda.units import UnitFormat

COLUMNS = 4096
"""in_features of the products: it is a compile-time number of some."""


def programs(arch: str) -> Sequence[KernelProgram]:
    """Return products of one row, eight and 64, and the dequantizer, for every decoder, in groups of 128, as far as ``arch`` has room.

    And what serves groups of 16, act-order, outliers and signs, once each.
    """
    capability, found = capability_of(arch), []
    for decoder in (*AFFINE.values(), *CODEBOOK.values()):
        format = UnitFormat(decoder, 128)
        shapes = (
            GemvShape(format, COLUMNS, COLUMNS),
            GemvShape(format, COLUMNS, COLUMNS, 8),
            GemmShape(format, COLUMNS, COLUMNS),
        )
        found += [shape.program(capability) for shape in shapes if shape.why_not(capability) is None]
        found.append(Dequantizer.program(format, torch.float16))
    sixteens = UnitFormat(AFFINE[4], 16)
    shape = GemvShape(sixteens, COLUMNS, COLUMNS)
    found += [shape.program(capability)] if shape.why_not(capability) is None else []
    found.append(scatter_program(sixteens, torch.float16))
    for entry in ("lowbit_outlier_product", "lowbit_outlier_add"):
        found.append(outlier_program(entry, torch.float16, torch.int16, torch.float16))
    signs = PopcountShape(COLUMNS, COLUMNS)
    found += [signs.program(capability)] if signs.why_not(capability) is None else []
    return found
