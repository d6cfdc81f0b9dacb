"""Proof that two quantized weights are the same numbers, without writing either out as floats.

A dequantized value is ``s * (q - z)``, two float32 operations on the parts of its own group. So when every scale has the same
float32 value and every ``q - z`` is the same integer, every dequantized bit is the same; and when two weights of one scheme have
the same parts, whatever the scheme is. A minimum of ``-z * s`` says the same where ``s * q`` needs no more than 24 bits. That
compares one byte for each weight in place of two float32 products.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from lowbit.lift import SIGNIFICAND
from lowbit.repeated import repeated
from lowbit.scheme import Grid, Scheme, Zero
from lowbit.tensors import QuantizedTensor, bit_equal
from lowbit.workers import map_ranges


def same_numbers(first: QuantizedTensor, second: QuantizedTensor) -> bool:
    """Whether it is proved that every float32 bit of the two weights agrees; False where only their floats can tell."""
    if first.shape != second.shape:
        return False
    if first.scheme == second.scheme:
        return all(_equal(part, second.parts[name]) for name, part in first.parts.items())
    if not (_integral(first.scheme) and (_integral(second.scheme) or _has_minimum(first.scheme, second.scheme))):
        return False
    size = _common_group(first, second)
    if size is None:
        return False
    scales, others = (_spread(weight.parts["scales"], weight, size) for weight in (first, second))
    if not (bit_equal(scales, others) or bit_equal(scales.float(), others.float())):
        return False
    if second.scheme.zero is Zero.MINIMUM:
        minimums = _spread(second.parts["minimums"].float(), second, size)
        same = torch.equal(minimums, -_zeros(first, size).float() * scales.float())
        return same and _equal(first.parts["codes"], second.parts["codes"])
    return _same_values(first, second, size)


def _integral(scheme: Scheme) -> bool:
    """Whether a weight is a scale times an integer, with groups along the rows and nothing else to it."""
    extras = scheme.outliers or scheme.rotation or scheme.permutation or scheme.flat or scheme.scales.two_level
    return scheme.grid is Grid.AFFINE and scheme.zero in (Zero.SYMMETRIC, Zero.INTEGER) and not extras


def _has_minimum(first: Scheme, second: Scheme) -> bool:
    """Whether the second adds a minimum to codes times scales that float32 holds exactly, so that only ``s * (q - z)`` counts."""
    exact = SIGNIFICAND[first.scales.dtype] + first.bits <= 24
    return second.zero is Zero.MINIMUM and exact and _integral(replace(second, zero=Zero.SYMMETRIC))


def _common_group(first: QuantizedTensor, second: QuantizedTensor) -> int | None:
    """Return the smaller group size, if it divides the larger one and the rows; else None."""
    columns = first.shape[1]
    small, large = sorted(weight.scheme.group_size or columns for weight in (first, second))
    return small if large % small == 0 and columns % large == 0 else None


def _spread(values: Tensor, weight: QuantizedTensor, size: int) -> Tensor:
    """Repeat (rows, groups) to groups of ``size``."""
    return repeated(values, (weight.scheme.group_size or weight.shape[1]) // size)


def _same_values(first: QuantizedTensor, second: QuantizedTensor, size: int) -> bool:
    """Whether ``q - z`` is the same everywhere: codes differ by as much as their zeros do."""
    rows, columns = first.shape
    offsets = _zeros(first, size) - _zeros(second, size)
    codes, others = first.parts["codes"], second.parts["codes"]
    if codes is others:
        return not bool(offsets.any())
    constant = bool((offsets == offsets.flatten()[0]).all()) if offsets.numel() else True

    # Values less than 256 apart are equal if they are equal modulo 256, and one byte each is a third of the work
    dtype = torch.uint8 if _most_apart(first.scheme, second.scheme) < 256 else torch.int16
    narrow = offsets.to(dtype)

    def same(start: int, stop: int) -> bool:
        if constant:
            return _equal_but(codes[start:stop], others[start:stop], int(offsets[0, 0]))
        left = codes[start:stop].view(stop - start, -1, size).to(dtype) - narrow[start:stop, :, None]
        return alike(left, others[start:stop].to(dtype).view(left.shape))

    return all(map_ranges(same, rows, columns)) if first.parts["codes"].numel() else True


def _most_apart(first: Scheme, second: Scheme) -> int:
    """Return by how much ``q - z`` of two schemes can differ."""
    (low, high), (other_low, other_high) = _range(first), _range(second)
    return max(high - other_low, other_high - low)


def _range(scheme: Scheme) -> tuple[int, int]:
    """Return the lowest and highest ``q - z``."""
    if scheme.symmetric:
        return -scheme.midpoint, scheme.code_count - 1 - scheme.midpoint
    return 1 - 2**scheme.bits, 2**scheme.bits - 1


def _equal_but(codes: Tensor, others: Tensor, offset: int) -> bool:
    """Whether ``codes - offset`` equals ``others``, as integers and not modulo 256."""
    if offset == 0:
        return alike(codes, others)
    if offset < 0:
        return bool(codes.max() <= 255 + offset) and alike(codes + -offset, others)
    return bool(codes.min() >= offset) and alike(codes - offset, others)


def _zeros(weight: QuantizedTensor, size: int) -> Tensor:
    """Return the integer zeros, int16 (rows, groups of ``size``), or one for all: (1, 1)."""
    if weight.scheme.zero is Zero.INTEGER:
        return _spread(weight.parts["zeros"], weight, size)
    return torch.tensor([[weight.scheme.midpoint]], dtype=torch.int16)


def _equal(first: Tensor, second: Tensor) -> bool:
    """Whether two parts have the same bits; large ones are compared in parallel."""
    if first is second:
        return True
    if first.dim() < 2 or first.dtype.is_floating_point or first.device.type != "cpu":
        return bit_equal(first, second)
    pieces = map_ranges(lambda start, stop: alike(first[start:stop], second[start:stop]), len(first), first[0].numel())
    return all(pieces)


def alike(first: Tensor, second: Tensor) -> bool:
    """Whether two integer tensors of one shape on a CPU are equal.

    Where they lie one after the other, C's memcmp tells; else torch. One core compares 40 GB/s in cache so, 9 by ``torch.equal`` of
    int64, 1.2 of uint8 (2026-11-21).
    """
    if not (first.is_contiguous() and second.is_contiguous() and first.dtype == second.dtype):
        return bool((first.numpy() == second.numpy()).all())
    if (compare := _memcmp()) is None:
        return torch.equal(first, second)
    same: bool = compare(first.data_ptr(), second.data_ptr(), first.nbytes) == 0
    return same


@cache
def _memcmp() -> Callable[[int, int, int], int] | None:
    """Return memcmp of the C library that this process has loaded, if it can be found."""
    try:
        function = ctypes.CDLL(None).memcmp
    except (AttributeError, OSError, TypeError):  # TypeError: Windows has no name for it
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    function.restype = ctypes.c_int
    return function
