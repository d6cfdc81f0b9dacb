"""One definition of error for the CLI, the tests and the benchmarks: accumulated over pieces, in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.grids import decode_rows, dequantize
from lowbit.tensors import QuantizedTensor
from lowbit.workers import PIECE, map_ranges

DEVICE_PIECE = 1 << 24
"""Weights that are compared at once on a GPU, which waits for the CPU after each piece."""


@dataclass(frozen=True, slots=True)
class ErrorSum:
    """What is known of the difference between a reference and a result; add two to join their tensors.

    Attributes:
        exact: Whether every float32 bit agrees.
        max_abs: Largest absolute difference.
        squared: Sum of squared differences.
        reference: Sum of squares of the reference.
    """

    exact: bool = True
    max_abs: float = 0.0
    squared: float = 0.0
    reference: float = 0.0

    def __add__(self, other: ErrorSum) -> ErrorSum:
        return ErrorSum(
            self.exact and other.exact,
            max(self.max_abs, other.max_abs),
            self.squared + other.squared,
            self.reference + other.reference,
        )

    @property
    def relative(self) -> float:
        """Root of the mean squared difference over that of the reference (relative RMSE); its square is the NMSE."""
        if self.reference == 0:
            return 0.0 if self.squared == 0 else math.inf
        return math.sqrt(self.squared / self.reference)

    def text(self) -> str:
        """``exact``, or the relative error."""
        return "exact" if self.exact else f"{self.relative:.4f}"


def compare(reference: Tensor, result: Tensor) -> ErrorSum:
    """Compare two weights of one shape, in float32; exact means bit for bit, except that zeros of either sign agree."""
    if reference.shape != result.shape:
        raise ValueError(f"shapes differ: {tuple(reference.shape)} and {tuple(result.shape)}")
    first, second = reference.reshape(-1), result.reshape(-1)
    piece = PIECE if first.device.type == "cpu" else DEVICE_PIECE
    pieces = map_ranges(lambda start, stop: _compare(first[start:stop], second[start:stop]), len(first), 1, piece=piece)
    return sum(pieces, ErrorSum())


def measure(weight: Tensor, quantized: QuantizedTensor) -> ErrorSum:
    """Compare a weight with what its codes mean, a piece at a time, so that no whole float32 copy exists."""
    if not quantized.dense.row_separable or weight.device.type != "cpu":
        return compare(weight, dequantize(quantized))
    pieces = map_ranges(
        lambda start, stop: _compare(weight[start:stop].reshape(-1), decode_rows(quantized, start, stop).view(-1)),
        *quantized.shape,
    )
    return sum(pieces, ErrorSum())


def _compare(reference: Tensor, result: Tensor) -> ErrorSum:
    wanted, found = reference.float(), result.float()
    if torch.equal(wanted.view(torch.int32), found.view(torch.int32)):  # NaN agrees with itself
        return ErrorSum(reference=float(torch.dot(wanted, wanted).double()))
    difference = found - wanted
    squared = float(torch.dot(difference, difference).double())
    exact = squared == 0 and torch.equal(wanted, found)
    largest = float(difference.abs_().max()) if difference.numel() else 0.0
    return ErrorSum(exact, largest, squared, float(torch.dot(wanted, wanted).double()))
