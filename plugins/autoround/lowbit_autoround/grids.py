"""AutoRound's three integer grids: from groups of weights to stored parameters and codes (formulas: autoround 0.16.1, int.py).

``groups`` is float32 (rows, groups, size); parameters are (rows, groups); codes are uint8 in the shape of ``groups``. Codes are
always computed with the parameters as stored, in float32, by division, rounded half to even::

    symmetric   scale = -extreme / 2^(b-1)          extreme: the element of largest magnitude, the positive one of two
                code  = clamp(round(w / scale), -2^(b-1), 2^(b-1) - 1) + 2^(b-1)
    integer     scale = (high - low) / (2^b - 1)    low = min(0, smallest), high = max(0, largest)
                zero  = clamp(round(-low / scale), 0, 2^b - 1)
                code  = clamp(round(w / scale) + zero, 0, 2^b - 1)
    minimum     scale = (largest - smallest) / (2^b - 1)    minimum = smallest
                code  = clamp(round((w - minimum) / scale), 0, 2^b - 1)

The symmetric grid uses its full range: the extreme lands on code 0 (-2^(b-1)), so the scale is negative where the extreme is
positive. GGUF's Q4_0 and Q8_0 store exactly this. A group of zeros has scale 0 and the code that means 0.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from lowbit_autoround.search import search_integer, search_minimum, search_symmetric
from lowbit_autoround.storage import check_finite, divisors, store, store_scales

Parameters = dict[str, Tensor]


class Grid(Protocol):
    """One of the three grids, for a number of bits and a dtype of scales."""

    def plain(self, groups: Tensor) -> Parameters:
        """Return the stored parameters that follow from each group's extremes. Raises WeightError."""

    def searched(self, groups: Tensor, importance: Tensor | None) -> Parameters:
        """Return the stored parameters of least (weighted) squared error that the search found. Raises WeightError.

        ``importance`` is float32 (groups, size), or None.
        """

    def codes(self, groups: Tensor, parameters: Parameters) -> Tensor:
        """Return the codes."""


class SymmetricGrid:
    """w = scale * (code - 2^(b-1)), with a signed scale."""

    def __init__(self, bits: int, dtype: torch.dtype) -> None:
        self._half, self._dtype, self._bits = 2 ** (bits - 1), dtype, bits

    def plain(self, groups: Tensor) -> Parameters:
        """Return the scales."""
        return {"scales": store_scales(_extremes(groups) / -self._half, self._dtype)}

    def searched(self, groups: Tensor, importance: Tensor | None) -> Parameters:
        """Return the scales that a search over both signs found."""
        extremes = _extremes(groups)
        store_scales(extremes / -self._half, self._dtype)  # refuses what the dtype cannot hold
        scales = search_symmetric(groups, extremes, self._bits, importance)
        return {"scales": store_scales(_within(scales, self._dtype), self._dtype)}

    def codes(self, groups: Tensor, parameters: Parameters) -> Tensor:
        """Return the codes."""
        steps = (groups / divisors(parameters["scales"])).round_().clamp_(-self._half, self._half - 1)
        return steps.to(torch.int8).view(torch.uint8).add_(self._half)  # torch converts to int8 six times as fast


class IntegerGrid:
    """w = scale * (code - zero), zero an integer among the codes: 0 is represented exactly."""

    def __init__(self, bits: int, dtype: torch.dtype) -> None:
        self._last, self._dtype, self._bits = 2**bits - 1, dtype, bits

    def plain(self, groups: Tensor) -> Parameters:
        """Return the scales and zeros."""
        low, high = _range_with_zero(groups)
        scales = store_scales((high - low) / self._last, self._dtype)
        zeros = (-low / divisors(scales)[..., 0]).round_().clamp_(0, self._last)
        return {"scales": scales, "zeros": zeros.to(torch.int16)}

    def searched(self, groups: Tensor, importance: Tensor | None) -> Parameters:
        """Return the scales and zeros that a search over both ends of the range found."""
        low, high = _range_with_zero(groups)
        store_scales((high - low) / self._last, self._dtype)  # refuses what the dtype cannot hold
        scales, zeros = search_integer(groups, low, high, self._bits, importance)
        return {"scales": store_scales(_within(scales, self._dtype), self._dtype), "zeros": zeros.to(torch.int16)}

    def codes(self, groups: Tensor, parameters: Parameters) -> Tensor:
        """Return the codes."""
        steps = (groups / divisors(parameters["scales"])).round_()
        return _bytes(steps.add_(parameters["zeros"].float()[..., None]).clamp_(0, self._last))


class MinimumGrid:
    """w = scale * code + minimum."""

    def __init__(self, bits: int, dtype: torch.dtype) -> None:
        self._last, self._dtype, self._bits = 2**bits - 1, dtype, bits

    def plain(self, groups: Tensor) -> Parameters:
        """Return the scales and minimums."""
        low, high = _range(groups)
        return self._stored((high - low) / self._last, low)

    def searched(self, groups: Tensor, importance: Tensor | None) -> Parameters:
        """Return the scales and minimums that a search over both ends of the range found."""
        low, high = _range(groups)
        self._stored((high - low) / self._last, low)  # refuses what the dtype cannot hold
        scales, minimums = search_minimum(groups, low, high, self._bits, importance)
        return self._stored(_within(scales, self._dtype), _within(minimums, self._dtype))

    def codes(self, groups: Tensor, parameters: Parameters) -> Tensor:
        """Return the codes."""
        above = groups - parameters["minimums"].float()[..., None]
        return _bytes(above.div_(divisors(parameters["scales"])).round_().clamp_(0, self._last))

    def _stored(self, scales: Tensor, minimums: Tensor) -> Parameters:
        return {
            "scales": store_scales(scales, self._dtype),
            "minimums": store(minimums, self._dtype, "minimum"),
        }


def _range(groups: Tensor) -> tuple[Tensor, Tensor]:
    low, high = groups.amin(-1), groups.amax(-1)
    check_finite(low, high)
    return low, high


def _range_with_zero(groups: Tensor) -> tuple[Tensor, Tensor]:
    low, high = _range(groups)
    return low.clamp_(max=0), high.clamp_(min=0)


def _extremes(groups: Tensor) -> Tensor:
    low, high = _range(groups)
    return torch.where(high >= -low, high, low)


def _bytes(codes: Tensor) -> Tensor:
    """Return whole float32 codes as uint8; by way of int16 torch converts them four times as fast."""
    return codes.to(torch.int16).to(torch.uint8)


def _within(values: Tensor, dtype: torch.dtype) -> Tensor:
    largest = torch.finfo(dtype).max
    return values.clamp_(-largest, largest)
