"""The second level of K-quants: the scales of a super-block become small integers times one float16, ``scale = d * unit``.

Rounding the scales moves the best codes, and other codes move the best scales, so the two take turns once: codes for the
rounded scales, then for these codes the best units, then the best ``d`` (and ``dmin``), then the final codes. llama.cpp
instead searches for ``d`` by the scales alone (``make_qp_quants``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit_formats.ggml.limits import FLOAT16_MAX
from lowbit_formats.ggml.scale_search import WholeNumbers, search_scale
from lowbit_formats.ggml.weighted_groups import LEAST, CodeSums, WeightedGroups, quotient, reciprocal

UNIT_FACTORS = (1.0, 0.97, 0.94, 1.04)


def to_half(values: Tensor) -> Tensor:
    """Round to float16; a scale that a search pushed beyond the largest float16 becomes that."""
    return values.clamp(-FLOAT16_MAX, FLOAT16_MAX).half()


def affine_units(
    groups: WeightedGroups, scale: Tensor, minimum: Tensor, highest: int, highest_unit: int, per_block: int
) -> dict[str, Tensor]:
    """Return the parts of a two-level affine scheme for scales >= 0 and minimums <= 0 (groups,).

    ``x = d * unit * q - dmin * mn``; ``per_block`` groups share ``d`` and ``dmin``; units are 0 to ``highest_unit``. The parts'
    minimums are added, so ``super_minimums`` is ``-dmin``.
    """
    scales, depths, counts = (v.view(-1, per_block) for v in (scale, -minimum, groups.sum_w))
    d, dmin = (_search_step(v, counts, 0, highest_unit) for v in (scales, depths))
    units, depth_units = _units(scales, d, highest_unit), _units(depths, dmin, highest_unit)
    groups.encode((d * units).view(-1), (-dmin * depth_units).view(-1), 0, highest)
    fit = _AffineFit(groups, groups.sums(), per_block)
    units = _units(fit.best_scales(dmin * depth_units), d, highest_unit)
    depth_units = _units(fit.best_depths(d * units), dmin, highest_unit)
    d, dmin = fit.best_floats(units, depth_units, d, dmin)
    groups.encode((d * units).view(-1), (-dmin * depth_units).view(-1), 0, highest)
    return {
        "codes": groups.codes.to(torch.int8).view(torch.uint8),
        "scales": units.to(torch.uint8),
        "super_scales": d.half(),
        "minimums": depth_units.to(torch.uint8),
        "super_minimums": -dmin.half(),
    }


def symmetric_units(
    groups: WeightedGroups, scale: Tensor, half: int, half_unit: int, per_block: int
) -> dict[str, Tensor]:
    """Return the parts of a two-level symmetric scheme for signed scales (groups,).

    ``x = d * unit * q`` with codes q from -half to half - 1, stored as q + half, and units from -half_unit to half_unit - 1.
    The scale of largest magnitude gets unit -half_unit.
    """
    scales = scale.view(-1, per_block)
    d = _search_step(scales, groups.sum_w.view(-1, per_block), -half_unit, half_unit - 1)
    units = _signed_units(scales, d, half_unit)
    groups.encode((d * units).view(-1), None, -half, half - 1)
    qq, xq = (sums.view(-1, per_block) for sums in groups.symmetric_sums())
    units = _signed_units(xq / qq.clamp_min(LEAST), d, half_unit)
    found = quotient((units * xq).sum(1, keepdim=True), (units * units * qq).sum(1, keepdim=True))
    d = torch.where(found * d > 0, _half(found), d)
    groups.encode((d * units).view(-1), None, -half, half - 1)
    return {
        "codes": groups.codes.to(torch.int8).add_(half).view(torch.uint8),
        "scales": units.to(torch.int8),
        "super_scales": d.half(),
    }


class _AffineFit:
    """Least squares for given codes, everything shaped (blocks, groups of a block)."""

    def __init__(self, groups: WeightedGroups, sums: CodeSums, per_block: int) -> None:
        self._q, self._qq, self._xq, self._w, self._wx = (
            values.view(-1, per_block) for values in (sums.q, sums.qq, sums.xq, groups.sum_w, groups.sum_wx)
        )

    def best_scales(self, depths: Tensor) -> Tensor:
        """Return the best scale of each group when ``depths`` is subtracted."""
        return (self._xq + depths * self._q) / self._qq.clamp_min(LEAST)

    def best_depths(self, scales: Tensor) -> Tensor:
        """Return the best depth of each group for given scales."""
        return (scales * self._q - self._wx) / self._w.clamp_min(LEAST)

    def best_floats(self, units: Tensor, depths: Tensor, d: Tensor, dmin: Tensor) -> tuple[Tensor, Tensor]:
        """Return the best float16 ``d`` and ``dmin`` (blocks, 1), as float32; those given where none is better.

        Minimizing sum w (x - d u q + dmin v)^2 over a block gives
            d sum u u w q q - dmin sum u v w q = sum u w x q,     d sum u v w q - dmin sum v v w = sum v w x
        """
        uu, uv = _sum(units * units * self._qq), _sum(units * depths * self._q)
        vv, ux, vx = _sum(depths * depths * self._w), _sum(units * self._xq), _sum(depths * self._wx)
        determinant = uu * vv - uv * uv
        solvable = determinant > 1e-6 * uu * vv
        scale = torch.where(solvable, quotient(ux * vv - uv * vx, determinant), quotient(ux + dmin * uv, uu))
        depth = torch.where(solvable, quotient(uv * ux - uu * vx, determinant), dmin)
        valid = (scale > 0) & (depth >= 0)
        return torch.where(valid, _half(scale), d), torch.where(valid, _half(depth), dmin)


def _search_step(values: Tensor, weights: Tensor, lowest: int, highest: int) -> Tensor:
    """Return the float16 step (blocks, 1), as float32, whose multiples are nearest to ``values`` (blocks, groups)."""
    end = lowest or highest
    targets = [end * factor for factor in UNIT_FACTORS]
    step = search_scale(WeightedGroups(values, weights), WholeNumbers(lowest, highest), targets, 0)
    return _half(step).unsqueeze(1)


def _units(values: Tensor, step: Tensor, highest: int) -> Tensor:
    return (values * reciprocal(step)).round_().clamp_(0, highest)


def _signed_units(values: Tensor, step: Tensor, half: int) -> Tensor:
    return (values * reciprocal(step)).round_().clamp_(-half, half - 1)


def _half(values: Tensor) -> Tensor:
    """Round to float16 and back."""
    return to_half(values).float()


def _sum(values: Tensor) -> Tensor:
    return values.sum(1, keepdim=True)
