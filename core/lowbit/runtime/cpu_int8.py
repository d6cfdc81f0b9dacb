"""``cpu-int8``: torch's int8 weight-only product for symmetric codes with one scale a row and bfloat16 activations."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.grids import decode_scales
from lowbit.interfaces import MatmulProblem
from lowbit.parts import TensorSpec
from lowbit.runtime.unpacked import UnpackedKernel, matmul_rows
from lowbit.scheme import Grid, Scheme
from lowbit.tensors import PackedTensor, QuantizedTensor

MOST_ROWS = 256
"""Rows of x from which decoding W once is faster."""


class Int8Kernel(UnpackedKernel):
    """``w = q * s`` with signed q and one bfloat16 s for each row, summed in float32."""

    name = "cpu-int8"
    priority = 30
    prepared_layout = "cpu-int8"

    def why_not_unpacked(self, problem: MatmulProblem) -> str | None:
        """Refuse other dtypes, other grids, groups, zeros and add-ons."""
        scheme, columns = problem.scheme, problem.shape[1]
        if problem.dtype != torch.bfloat16:
            return f"torch's int8 product is fast in bfloat16 only, not in {str(problem.dtype).removeprefix('torch.')}"
        if scheme.grid is not Grid.AFFINE or not scheme.symmetric or scheme.bits <= 4:
            return f"multiplies by symmetric affine codes of 5 to 8 bits, not by {scheme.summary()}"
        if scheme.groups(problem.shape) != 1 or scheme.scales.two_level:
            return f"takes one scale for each row, not groups of {scheme.group_size}"
        if scheme.flat or scheme.permutation or scheme.rotation or scheme.outliers:
            return f"takes no add-ons and no flat groups, not {scheme.summary()}"
        if columns % 32:
            return f"needs in_features in multiples of 32, not {columns}"  # torch 2.13 reads past the end of others
        return None

    def code_specs(self, scheme: Scheme, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        """Signed codes and bfloat16 scales."""
        return {"signed": TensorSpec(torch.int8, shape), "row_scales": TensorSpec(torch.bfloat16, (shape[0],))}

    def arrange(self, quantized: QuantizedTensor) -> dict[str, Tensor]:
        """Subtract the midpoint; an 8-bit code then spans int8."""
        signed = (quantized.parts["codes"].short() - quantized.scheme.midpoint).to(torch.int8)
        return {"signed": signed, "row_scales": decode_scales(quantized)[:, 0].bfloat16()}

    def codes(self, prepared: PackedTensor) -> Tensor:
        """Add the midpoint again."""
        return (prepared.buffers["signed"].short() + prepared.scheme.midpoint).to(torch.uint8)

    def matmul(self, x: Tensor, packed: PackedTensor, bias: Tensor | None = None) -> Tensor:
        """Multiply; float32 sums inside torch, rounded once to bfloat16."""
        prepared = self.prepare(packed)
        flat = x.reshape(-1, prepared.shape[1])
        if not 0 < flat.shape[0] <= MOST_ROWS or x.dtype != torch.bfloat16:
            return matmul_rows(x, self.unpacked(prepared), bias)
        product = torch._weight_int8pack_mm(
            flat.contiguous(), prepared.buffers["signed"], prepared.buffers["row_scales"]
        )
        if bias is not None:
            product = product + bias
        return product.reshape(*x.shape[:-1], prepared.shape[0])
