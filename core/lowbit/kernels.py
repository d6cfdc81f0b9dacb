"""The plain-torch kernel that every layout gets for nothing: unpack, then decode by ``lowbit.grids``."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.grids import dequantize
from lowbit.interfaces import Kernel, MatmulProblem, Packer
from lowbit.tensors import PackedTensor


class ReferenceKernel(Kernel):
    """Serves one layout on every device, slowly; each faster kernel is compared with it.

    Register one beside a new packer: ``register(ReferenceKernel(MyPacker()))``.
    """

    name = "reference"

    def __init__(self, packer: Packer) -> None:
        self.packer = packer
        self.name = f"torch-{packer.layout}"  # type: ignore[misc]  # one instance a layout, each with its own name

    def why_not(self, problem: MatmulProblem) -> str | None:
        """Refuse other layouts, and what the packer refuses."""
        if problem.layout != self.packer.layout:
            return f"runs layout {self.packer.layout!r}, not {problem.layout!r}"
        return self.packer.why_not(problem.scheme, problem.shape)

    def dequantize(self, packed: PackedTensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Unpack and decode in float32, then round once."""
        return dequantize(self.packer.unpack(packed)).to(dtype)

    def why_no_rows(self, problem: MatmulProblem) -> str | None:
        """Refuse layouts whose rows cannot be read alone."""
        if self.packer.row_buffers(problem.scheme, problem.shape):
            return None
        return f"the rows of layout {problem.layout!r} ({problem.scheme.summary()}) cannot be read alone"

    def rows(self, packed: PackedTensor, numbers: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Unpack and decode only these rows."""
        return self.dequantize(self.packer.rows(packed, numbers), dtype)
