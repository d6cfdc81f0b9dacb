"""Where tuning starts: groups, ranges or searched scales, and rounding values of zero, which is rounding to nearest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from lowbit import Scheme
from lowbit.scheme import Zero
from lowbit.workers import map_ranges
from lowbit_autoround.kquants import Units
from lowbit_autoround.ranges import IntegerRange, MinimumRange, Ranges, SearchedScales, SymmetricRange
from lowbit_autoround.search import search_integer, search_minimum, search_symmetric
from lowbit_autoround.storage import check_finite
from lowbit_autoround.tuned_weight import TunedWeight, grouped

SEARCH_PIECE = 1 << 19
PLAIN: Mapping[Zero, Callable[[Tensor, int, torch.dtype], Ranges]] = MappingProxyType(
    {Zero.SYMMETRIC: SymmetricRange, Zero.INTEGER: IntegerRange, Zero.MINIMUM: MinimumRange}
)


def tuned_weight(weight: Tensor, scheme: Scheme, importance: Tensor | None, search: bool, lr: float) -> TunedWeight:
    """Return ``weight`` (out, in) ready to be tuned in ``scheme``.

    Args:
        weight: Any float dtype; it is not kept.
        scheme: One of the quantizer's.
        importance: Of each column, float32 (in,), for the search.
        search: Whether to start from searched scales rather than from each group's extremes; two-level schemes always do.
        lr: First step size.

    Raises WeightError for NaN or infinity, and for a scale or minimum that the scheme's dtype cannot hold.
    """
    groups, dtype = grouped(weight, scheme.group_size), getattr(torch, scheme.scales.dtype)
    if search or scheme.scales.two_level:
        ranges: Ranges = _searched(groups, scheme, _group_importance(importance, groups, weight.shape[1]), dtype)
    else:
        ranges = PLAIN[scheme.zero](groups, scheme.bits, dtype)
    return TunedWeight(scheme, (weight.shape[0], weight.shape[1]), groups, ranges, lr)


def _searched(groups: Tensor, scheme: Scheme, importance: Tensor | None, dtype: torch.dtype) -> SearchedScales:
    bits, largest = scheme.bits, torch.finfo(dtype).max
    found = _in_pieces(lambda piece: _search(piece, scheme, importance), groups)
    scales = found[0].clamp_(-largest, largest)
    if scheme.zero is Zero.INTEGER:
        return SearchedScales(scales, bits, dtype, zero=found[1])
    if not scheme.scales.two_level:
        if scheme.symmetric:
            return SearchedScales(scales, bits, dtype, zero=float(scheme.midpoint))
        return SearchedScales(scales, bits, dtype, offsets=found[1].clamp_(-largest, largest))
    unit_bits, per_super = scheme.scales.bits, scheme.scales.super_group
    assert unit_bits is not None
    assert per_super is not None
    units = Units(scales, unit_bits, per_super, scheme.scales.signed, "scale")
    if scheme.symmetric:
        return SearchedScales(scales, bits, dtype, zero=float(scheme.midpoint), scale_units=units)
    offsets = found[1].clamp_(max=0.0)
    depths = Units(offsets, unit_bits, per_super, scheme.scales.signed, "minimum")
    return SearchedScales(scales, bits, dtype, offsets=offsets, scale_units=units, offset_units=depths)


def _search(groups: Tensor, scheme: Scheme, importance: Tensor | None) -> tuple[Tensor, ...]:
    """Return scales, and zeros or minimums, of some rows of groups."""
    low, high = groups.amin(-1), groups.amax(-1)
    check_finite(low, high)
    if scheme.zero is Zero.SYMMETRIC:
        return (search_symmetric(groups, torch.where(high >= -low, high, low), scheme.bits, importance),)
    if scheme.zero is Zero.INTEGER:
        return search_integer(groups, low.clamp_(max=0), high.clamp_(min=0), scheme.bits, importance)
    if scheme.scales.two_level:  # a minimum above zero cannot be stored
        low.clamp_(max=0)
        high = torch.maximum(high, low)
    return search_minimum(groups, low, high, scheme.bits, importance)


def _in_pieces(search: Callable[[Tensor], tuple[Tensor, ...]], groups: Tensor) -> list[Tensor]:
    rows, columns = len(groups), groups[0].numel()
    piece = SEARCH_PIECE if groups.device.type == "cpu" else rows * columns
    found = map_ranges(lambda start, stop: search(groups[start:stop]), rows, columns, piece=piece)
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


def _group_importance(importance: Tensor | None, groups: Tensor, columns: int) -> Tensor | None:
    """Return the importance as (groups, size); what fills up a short group has none."""
    missing = groups[0].numel() - columns
    if importance is None and not missing:
        return None
    known = torch.ones(columns, device=groups.device) if importance is None else importance
    return torch.nn.functional.pad(known, (0, missing)).view(groups.shape[1:])
