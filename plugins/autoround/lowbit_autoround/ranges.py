"""What tuning learns about the groups of a weight: multipliers of their ranges, and the scales and offsets that follow.

A weight w of a group decodes to ``W = s u + o`` with whole steps u in [low, high]; u = clamp(round((w - o) / s + V)) (SignRound,
arXiv 2309.05516). With the loss gradient g at W, rounding passed straight through, and ``in`` 1 where the clamp did nothing,

    dL/ds = sum g (u - in (w - o) / s) = A        dL/do = sum g (1 - in) = B        dL/dz = -s B    (u counted from -z)

so two sums for each group are all that its parameters need; each class below chains them to its multipliers. A step is
``p -= lr * sign(gradient)``. A scale is stored rounded, and it is the stored one that decodes, in tuning as in the file.

Tensors are float32 (rows, groups) throughout; ``low`` and ``high`` of a class without zeros are the same for all groups.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit_autoround.kquants import Units
from lowbit_autoround.storage import check_finite, divisors, store, store_scales

Parts = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Steps:
    """Decoded parameters of all groups: ``W = scale * u + offset`` (offset None: 0), ``-zero <= u <= last - zero``.

    ``zero`` is a number or (rows, groups); codes are ``u + zero``.
    """

    scale: Tensor
    offset: Tensor | None
    zero: Tensor | float
    last: int
    parts: Parts


class Ranges(ABC):
    """The learned parameters of all groups of one weight."""

    highest = 1.0
    """Largest multiplier; the smallest is 0."""

    def __init__(self, like: Tensor) -> None:
        self.below, self.above = torch.ones_like(like), torch.ones_like(like)

    @abstractmethod
    def steps(self, check: bool = True) -> Steps:
        """Return the parameters as stored. Raises WeightError for what the dtype cannot hold, if asked to ``check``."""

    @abstractmethod
    def gradients(self, by_scale: Tensor, by_offset: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss gradients of ``below`` and ``above``, from A and B for the last ``steps``."""

    def learn(self, by_scale: Tensor, by_offset: Tensor, lr: float) -> None:
        """Take one step of SignSGD."""
        gradients = self.gradients(by_scale, by_offset)
        for multiplier, gradient in zip((self.below, self.above), gradients, strict=True):
            multiplier.sub_(gradient.sign(), alpha=lr).clamp_(0.0, self.highest)


class SymmetricRange(Ranges):
    """The larger of both extremes, each with its multiplier, lands on the lowest code: scale = -+extreme / 2^(b-1)."""

    def __init__(self, groups: Tensor, bits: int, dtype: torch.dtype) -> None:
        self._low, self._high = _extremes_about_zero(groups)
        self._half, self._dtype = 2 ** (bits - 1), dtype
        super().__init__(self._low)

    def steps(self, check: bool = True) -> Steps:
        """Return signed scales; negative where the upper extreme counts."""
        below, above = self._low * self.below, self._high * self.above
        scales = store_scales(torch.where(above >= below, -above, below) / self._half, self._dtype, check)
        return Steps(scales.float(), None, float(self._half), 2 * self._half - 1, {"scales": scales})

    def gradients(self, by_scale: Tensor, by_offset: Tensor) -> tuple[Tensor, Tensor]:
        """Only the extreme that counts has a gradient."""
        counts_above, whole = self._high * self.above >= self._low * self.below, by_scale / self._half
        return (whole * self._low).masked_fill_(counts_above, 0), (-whole * self._high).mul_(counts_above)


class IntegerRange(Ranges):
    """Scale and whole zero of a range that holds 0: scale = (high M + low m) / last, zero = round(low m / scale)."""

    def __init__(self, groups: Tensor, bits: int, dtype: torch.dtype) -> None:
        self._low, self._high = _extremes_about_zero(groups)
        self._last, self._dtype = 2**bits - 1, dtype
        super().__init__(self._low)
        self._scale = self._low

    def steps(self, check: bool = True) -> Steps:
        """Return scales and zeros."""
        below, above = self._low * self.below, self._high * self.above
        scales = store_scales((above + below) / self._last, self._dtype, check)
        self._scale = divisors(scales)[..., 0]
        zeros = (below / self._scale).round_().clamp_(0, self._last)
        return Steps(scales.float(), None, zeros, self._last, {"scales": scales, "zeros": zeros.to(torch.int16)})

    def gradients(self, by_scale: Tensor, by_offset: Tensor) -> tuple[Tensor, Tensor]:
        """The zero moves with both multipliers, through the scale, and with ``below`` itself."""
        whole = (by_scale + by_offset * self._low * self.below / self._scale) / self._last
        return (whole - by_offset).mul_(self._low), whole * self._high


class MinimumRange(Ranges):
    """Both ends of the range move toward its middle: offset = low + h (1 - m), scale = (high - low - h (2 - m - M)) / last."""

    def __init__(self, groups: Tensor, bits: int, dtype: torch.dtype) -> None:
        self._low, high = groups.amin(-1), groups.amax(-1)
        check_finite(self._low, high)
        self._width, self._half_width = high - self._low, high / 2 - self._low / 2
        self._last, self._dtype = 2**bits - 1, dtype
        super().__init__(self._low)

    def steps(self, check: bool = True) -> Steps:
        """Return scales and minimums."""
        cut_below, cut_above = self._half_width * (1 - self.below), self._half_width * (1 - self.above)
        scales = store_scales((self._width - cut_below - cut_above) / self._last, self._dtype, check)
        minimums = store(self._low + cut_below, self._dtype, "minimum", check)
        parts = {"scales": scales, "minimums": minimums}
        return Steps(scales.float(), minimums.float(), 0.0, self._last, parts)

    def gradients(self, by_scale: Tensor, by_offset: Tensor) -> tuple[Tensor, Tensor]:
        """Lowering the lower end raises the scale and lowers the offset."""
        whole = by_scale * self._half_width / self._last
        return whole - by_offset * self._half_width, whole


class SearchedScales(Ranges):
    """Searched scales times ``above``, within a factor of 2 (SignRoundV2, arXiv 2512.04746); searched zeros stay.

    A minimum moves by half the searched range for each unit of ``below``. K-quants pass ``scale_units`` and ``offset_units``:
    scales and minimums are rounded to their multiples.
    """

    highest = 2.0

    def __init__(
        self,
        scales: Tensor,
        bits: int,
        dtype: torch.dtype,
        zero: Tensor | float = 0.0,
        offsets: Tensor | None = None,
        scale_units: Units | None = None,
        offset_units: Units | None = None,
    ) -> None:
        super().__init__(scales)
        self._scales, self._offsets, self._zero = scales, offsets, zero
        self._last, self._dtype = 2**bits - 1, dtype
        self._reach = scales.abs() * (self._last / 2)
        self._scale_units, self._offset_units = scale_units, offset_units

    def steps(self, check: bool = True) -> Steps:
        """Return scales, with zeros or offsets."""
        parts: Parts = {}
        scale = self._stored("scales", self._scales * self.above, self._scale_units, parts, check)
        offset = None
        if self._offsets is not None:
            moved = self._offsets + self._reach * (self.below - 1)
            offset = self._stored("minimums", moved, self._offset_units, parts, check)
        if isinstance(self._zero, Tensor):
            parts["zeros"] = self._zero.to(torch.int16)
        return Steps(scale, offset, self._zero, self._last, parts)

    def gradients(self, by_scale: Tensor, by_offset: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and offset move apart from each other."""
        return by_offset * self._reach, by_scale * self._scales

    def _stored(self, name: str, values: Tensor, units: Units | None, parts: Parts, check: bool) -> Tensor:
        if units is None:
            is_scale = name == "scales"
            parts[name] = (
                store_scales(values, self._dtype, check) if is_scale else store(values, self._dtype, "minimum", check)
            )
            return parts[name].float()
        parts[name], parts[f"super_{name}"] = units.units(values), units.steps
        return units.decode(parts[name])


def _extremes_about_zero(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Return how far each group reaches below and above zero, both 0 or more."""
    low, high = groups.amin(-1), groups.amax(-1)
    check_finite(low, high)
    return low.clamp_(max=0).neg_(), high.clamp_(min=0)
