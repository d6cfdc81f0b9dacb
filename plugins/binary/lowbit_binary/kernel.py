"""``binary-popcount``: one-bit linear layers on a CPU, added (or chained) with floats between them.

A sum of planes is one 1-bit linear layer for each plane, ``y = sum_p s_p * (B_p x)``, whose outputs are added; a product is two in
a row, ``y = a * (B1 (m * (B2 (b * x))))``. Each multiplies by XOR and counting bits (``lowbit_binary.popcount``).

Activations are rounded to ``PLANES[dtype]`` bits in each group, scaled by the group's absmax A. That adds at most
``sum_p |s_p| * L * A / (2**n - 1)`` for a group of L columns to what float32 sums leave: with 12 bits less than the rounding of
bfloat16 inputs, with 16 bits less than that of float16.
"""

from __future__ import annotations

from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from lowbit import Kernel, MatmulProblem, PackedSpec, PackedTensor, QuantizedTensor, Scheme, TensorSpec
from lowbit.grids import dequantize
from lowbit.parts import part_specs
from lowbit.scheme import BinaryForm
from lowbit.workers import map_ranges
from lowbit_binary.packer import WordsPacker
from lowbit_binary.popcount import available, from_lanes, sign_product, split_activations, to_lanes

PLANES = MappingProxyType({torch.bfloat16: 12, torch.float16: 16})
"""Bits of an activation by dtype of x."""
MOST_ROWS = 4
"""Rows of x up to which counting bits is faster than writing W out once."""
PREPARED = "binary-lanes"
PIECE = 1 << 16


class PopcountKernel(Kernel):
    """Serves ``binary-words`` for bfloat16 and float16 activations."""

    name = "binary-popcount"
    priority = 20

    def why_not(self, problem: MatmulProblem) -> str | None:
        """Refuse other layouts, devices and dtypes, add-ons, and a numpy that cannot count bits."""
        if problem.layout != WordsPacker.layout:
            return f"{self.name} runs layout {WordsPacker.layout!r}, not {problem.layout!r}"
        if reason := WordsPacker().why_not(problem.scheme, problem.shape):
            return reason
        if problem.device != "cpu":
            return f"{self.name} runs on cpu, not on {problem.device}"
        if problem.dtype not in PLANES:
            return f"{self.name} rounds activations to 16 bits at most, which is too coarse for {problem.dtype}"
        if problem.scheme.outliers:
            return f"{self.name} multiplies by sign planes alone, not by {problem.scheme.summary()}"
        if not available():
            return f"{self.name} needs numpy 2, which can count bits: pip install 'numpy>=2'"
        return None

    def prepare(self, packed: PackedTensor) -> PackedTensor:
        """Rearrange into 64-bit words with groups innermost; what is prepared stays as it is."""
        if packed.layout == PREPARED:
            return packed
        quantized = WordsPacker().unpack(packed)
        buffers = {}
        for name, part in quantized.parts.items():
            if name in ("planes", "left", "right"):
                planes = part if part.dim() == 3 else part[None]
                buffers[name] = torch.stack([to_lanes(plane, _size(packed.scheme, plane)) for plane in planes])
            else:
                buffers[name] = part.clone()
        specs = {name: TensorSpec.of(buffer) for name, buffer in buffers.items()}
        return PackedTensor(PackedSpec(PREPARED, packed.scheme, packed.shape, specs), buffers)

    def dequantize(self, packed: PackedTensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Put the signs back in rows and decode as the layout's plain-torch kernel does."""
        return dequantize(_unprepared(self.prepare(packed))).to(dtype)

    def matmul(self, x: Tensor, packed: PackedTensor, bias: Tensor | None = None) -> Tensor:
        """Count bits for a few rows of x, write W out once for many; float32 sums, one rounding to x's dtype."""
        prepared = self.prepare(packed)
        flat = x.reshape(-1, prepared.shape[1]).float()
        if len(flat) > MOST_ROWS or x.dtype not in PLANES:
            product = flat @ self.dequantize(prepared).T
        else:
            product = torch.empty(len(flat), prepared.shape[0])
            for row, result in zip(flat, product, strict=True):
                result.copy_(_forward(row, prepared, PLANES[x.dtype]))
        if bias is not None:
            product += bias.float()
        return product.to(x.dtype).reshape(*x.shape[:-1], prepared.shape[0])


def one_bit_linear(x: Tensor, words: Tensor, scales: Tensor, size: int, planes: int) -> Tensor:
    """Return ``sum_g scales[:, g] * (B_g x_g)``, float32 (rows,): a linear layer of one-bit weights.

    Args:
        x: float32 (columns,).
        words: Signs as of ``to_lanes``, int64 (lanes, rows, groups).
        scales: float32 (rows, groups).
        size: Columns of a group; the last may be short.
        planes: Bits that an activation is rounded to.
    """
    groups = words.shape[2]
    lengths = np.full(groups, size, np.int64)
    lengths[-1] = len(x) - (groups - 1) * size
    signs, steps = split_activations(x, size, planes)
    lanes, activations = words.numpy().view(np.uint64), signs.numpy().view(np.uint64)
    result = torch.empty(words.shape[1])

    def work(start: int, stop: int) -> None:
        counted = torch.from_numpy(sign_product(lanes[:, start:stop], activations, lengths))
        result[start:stop] = (counted.float() * (scales[start:stop] * steps)).sum(1)

    map_ranges(work, words.shape[1], words.shape[0] * groups, piece=PIECE)
    return result


def _forward(x: Tensor, prepared: PackedTensor, planes: int) -> Tensor:
    """Return W x for float32 x (in,): float32 (out,)."""
    buffers, scheme = prepared.buffers, prepared.scheme
    assert scheme.binary is not None
    if scheme.binary.form is BinaryForm.PRODUCT:
        inner = prepared.buffers["middle_scales"].float()
        hidden = one_bit_linear(
            x * buffers["column_scales"].float(), buffers["right"][0], inner[:, None], len(x), planes
        )
        return one_bit_linear(hidden, buffers["left"][0], buffers["row_scales"].float()[:, None], len(hidden), planes)
    size = min(scheme.group_size or len(x), len(x))
    total = torch.zeros(prepared.shape[0])
    for plane, (words, scales) in enumerate(zip(buffers["planes"], buffers["scales"], strict=True)):
        scaled = x * buffers["column_scales"][plane].float() if scheme.binary.column_scales else x
        total += one_bit_linear(scaled, words, scales.float(), size, planes)
    return total


def _size(scheme: Scheme, plane: Tensor) -> int:
    return min(scheme.group_size or plane.shape[-1], plane.shape[-1])


def _unprepared(prepared: PackedTensor) -> QuantizedTensor:
    parts = {}
    for name, spec in part_specs(prepared.scheme, prepared.shape).items():
        part = prepared.buffers[name]
        if name in ("planes", "left", "right"):
            columns = spec.shape[-1]
            size = min(prepared.scheme.group_size or columns, columns)
            part = torch.stack([from_lanes(plane, columns, size) for plane in part]).view(spec.shape)
        parts[name] = part
    return QuantizedTensor(prepared.scheme, prepared.shape, parts)
