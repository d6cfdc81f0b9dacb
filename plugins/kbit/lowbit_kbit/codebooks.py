"""The three codebooks that follow from a formula. All are float32 ``(2**bits,)``, ascending, antisymmetric, within [-1, 1].

They are computed in float64 on the CPU and rounded once, so every device and every run has the same bits. (The fourth, ``learned``,
is fitted to each tensor: ``lowbit_kbit.learned``.)
"""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType

import torch
from torch import Tensor


def fixed_codebook(name: str, bits: int) -> Tensor:
    """Return the codebook ``int``, ``nf`` or ``fp`` of ``bits`` bits: float32 ``(2**bits,)``."""
    return _antisymmetric(_POSITIVE_HALVES[name](bits)).float()


def midpoints(codebook: Tensor) -> Tensor:
    """Return where the nearest entry changes: the float32 averages of neighbouring entries, ``(len(codebook) - 1,)``."""
    return (codebook[1:] + codebook[:-1]) * 0.5


def is_antisymmetric(codebook: Tensor) -> bool:
    """Whether the codebook is its own mirror image, so that the sign of a scale makes no difference."""
    return torch.equal(codebook, -codebook.flip(0))


def _uniform_half(bits: int) -> Tensor:
    """Mid-rise: (2i + 1) / 2^k - 1, so no entry is zero and the outermost are half a step inside [-1, 1]."""
    steps = 2 * torch.arange(1 << bits - 1, dtype=torch.float64) + 1
    return steps / (1 << bits)


def _normal_float_half(bits: int) -> Tensor:
    """Quantiles of a Gaussian: ppf(linspace(0.5/n, 1 - 0.5/n, n)) / max with n = 2^k.

    Source: ``create_normal_float_codebook`` of bitsandbytes' k-bit branch (pull request 1858). Unlike its NF4 it has no
    entry at zero, which costs nothing at 4 bits and helps much at 2 and 3.
    """
    count = 1 << bits
    upper = (torch.arange(count // 2, count, dtype=torch.float64) + 0.5) / count
    quantiles: Tensor = torch.special.ndtri(upper)
    return quantiles / quantiles[-1]


def _small_float_half(bits: int) -> Tensor:
    """Sign, two exponent bits, k - 3 mantissa bits, subnormals, no infinity or NaN; at 2 bits sign and one exponent bit.

    So k = 4 is E2M1 (OCP MXFP4): {0, 0.5, 1, 1.5, 2, 3, 4, 6} / 6, and k = 6 is E2M3 (OCP MXFP6). Three exponent bits have three
    to four times the squared error on normalized groups, Gaussian and heavy-tailed (measured 2026-11-21), and one is a uniform
    grid, which ``int`` does better: zero has two codes here.
    """
    exponent_bits = min(2, bits - 1)
    mantissa_bits = bits - 1 - exponent_bits
    code = torch.arange(1 << bits - 1)
    exponent = code >> mantissa_bits
    fraction = (code & (1 << mantissa_bits) - 1).double() / (1 << mantissa_bits)
    magnitude = torch.where(exponent == 0, fraction, (1 + fraction) * 2.0 ** (exponent - 1))
    return magnitude / magnitude[-1]


def _antisymmetric(half: Tensor) -> Tensor:
    return torch.cat((-half.flip(0), half))


_POSITIVE_HALVES: MappingProxyType[str, Callable[[int], Tensor]] = MappingProxyType(
    {"int": _uniform_half, "nf": _normal_float_half, "fp": _small_float_half}
)
