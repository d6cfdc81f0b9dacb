"""The three codebooks that follow from a formula. All are float32 ``(2**bits,)``, ascending, antisymmetric, within [-1, 1].

They are computed in float64 on the CPU and rounded once, so every device and every run has the same bits. (The fourth, ``learned``,
is fitted to each tensor: ``lowbit_kbit.learned``.)
"""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType

import torch
from torch import Tensor

from lowbit.errors import OptionError


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


def compact(table: Tensor, bits: int | None = None) -> tuple[Tensor, Tensor]:
    """Return the entries that a scattered table really has, and the new code of each old one.

    bitsandbytes keeps every codebook in 256 places: a narrower one has its values at both ends (3 bits: places 0 to 2 and 252 to
    255) or in front, and zeros in between. Zero is an entry like any other: it is kept, once.

    Args:
        table: float (n,), n up to 256, in any order.
        bits: Of the new codes; None takes as few as the entries need.

    Returns:
        Ascending float32 ``(2**bits,)``, the last entry repeated where there are fewer, and uint8 ``(n,)``:
        ``entries[codes[i]] == table[i]``, so ``codes[old.long()]`` converts codes exactly.

    Raises OptionError when the table has more entries than ``bits`` can count, or holds NaN or infinity.
    """
    values = table.float().cpu()
    if not bool(torch.isfinite(values).all()):
        raise OptionError("the codebook holds NaN or infinity; give finite entries")
    entries: Tensor = values.unique()  # type: ignore[no-untyped-call]  # torch leaves it so
    needed = max(1, (len(entries) - 1).bit_length())
    if needed > (bits or 8):
        raise OptionError(
            f"the codebook has {len(entries)} entries, which {bits or 8} bits cannot count; use {needed} bits"
        )
    padding = entries[-1:].expand(2 ** (bits or needed) - len(entries))
    return torch.cat((entries, padding)), torch.searchsorted(entries, values).to(torch.uint8)
