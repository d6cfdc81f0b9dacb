"""Seeded weights for tests: ordinary ones, and those that break careless arithmetic.

Every function has a generator of its own, so that it never touches torch's global one, and returns float32 (out, in) unless
told otherwise. ``AWKWARD`` lists the kinds that every quantizer must survive.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

Shape = tuple[int, int]
FP16_MAX, FP16_TINY = 65504.0, 2.0**-24  # the largest and the smallest positive float16


def generator(seed: int) -> torch.Generator:
    """Return a CPU generator of its own."""
    return torch.Generator().manual_seed(seed)


def gaussian(shape: Shape, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return independent N(0, 1) weights, rounded to ``dtype``; the error budgets are for these."""
    return torch.randn(shape, generator=generator(seed)).to(dtype)


def heavy_tailed(shape: Shape, seed: int = 0, freedom: int = 3) -> Tensor:
    """Return Student-t weights: a normal over the root of a mean of ``freedom`` squared normals, so a few are huge."""
    source = generator(seed)
    normal = torch.randn(shape, generator=source)
    return normal / torch.randn((freedom, *shape), generator=source).square().mean(0).sqrt()


def zero_groups(shape: Shape, group_size: int, seed: int = 0) -> Tensor:
    """Return Gaussian weights with a first group of zeros in each row, and a last row of nothing but zeros."""
    weight = gaussian(shape, seed)
    weight[:, :group_size] = 0
    weight[-1] = 0
    return weight


def constant_groups(shape: Shape, group_size: int, seed: int = 0) -> Tensor:
    """Return Gaussian weights whose first group in each row is one value: no range to divide by; signs alternate by row."""
    weight = gaussian(shape, seed)
    signs = torch.tensor([1.0, -1.0]).repeat(shape[0])[: shape[0], None]
    weight[:, :group_size] = 0.3 * signs
    return weight


def fp16_extremes(shape: Shape, group_size: int, seed: int = 0) -> Tensor:
    """Return weights among +-65504, +-1, +-2**-24 and +-0: scales that overflow or vanish in float16 show here."""
    values = torch.tensor([FP16_MAX, -FP16_MAX, 1.0, -1.0, FP16_TINY, -FP16_TINY, 0.0, -0.0])
    return values[torch.randint(len(values), shape, generator=generator(seed))]


def subnormal(shape: Shape, group_size: int, seed: int = 0) -> Tensor:
    """Return weights of a few float16 steps of 2**-24: an absmax scale rounds to zero in float16."""
    return torch.randint(-3, 4, shape, generator=generator(seed)) * FP16_TINY


def one_outlier(shape: Shape, group_size: int, seed: int = 0) -> Tensor:
    """Return Gaussian weights with one weight a row that is a thousand times larger."""
    weight = gaussian(shape, seed)
    column = torch.randint(shape[1], (shape[0],), generator=generator(seed + 1))
    weight[torch.arange(shape[0]), column] *= 1000
    return weight


def beyond_fp16(shape: Shape, group_size: int, seed: int = 0) -> Tensor:
    """Return weights that float32 and bfloat16 hold and float16 does not: quantize them, or refuse with WeightError."""
    return gaussian(shape, seed) * 1e30


def non_finite(shape: Shape, value: float, row: int = -1, column: int = -1, seed: int = 0) -> Tensor:
    """Return Gaussian weights with one NaN or infinity."""
    weight = gaussian(shape, seed)
    weight[row, column] = value
    return weight


AWKWARD: Mapping[str, Callable[[Shape, int, int], Tensor]] = MappingProxyType(
    {
        "heavy-tailed": lambda shape, group_size, seed: heavy_tailed(shape, seed),
        "zero-groups": zero_groups,
        "all-zero": lambda shape, group_size, seed: torch.zeros(shape),
        "constant-groups": constant_groups,
        "fp16-extremes": fp16_extremes,
        "subnormal": subnormal,
        "one-outlier": one_outlier,
    }
)
"""Kinds of finite weights by name: ``AWKWARD[kind](shape, group_size, seed)``."""
