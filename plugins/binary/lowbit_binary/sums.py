"""A group of weights as a sum of scaled signs: ``w ~ s_1 b_1 + ... + s_K b_K``, b = +-1, with the least squared error.

One plane: s is the mean magnitude (Rastegari et al. 2016, XNOR-Net, section 3.1). Two planes give the four values +-s_1 +- s_2,
that is, two free magnitudes: the best two are the means of the two parts of the sorted magnitudes, and one of the ``size - 1``
places to cut them is the best of all (one-dimensional 2-means). So one and two planes are exact, without alternation.

Three and four planes start from the exact two, add the signs of what remains, and alternate two closed forms (as ARB-LLM,
arXiv 2410.03129, does from greedy planes): for given signs the least-squares scales, for given scales the nearest of the
2**K sums. Each step lowers the error or leaves it; STEPS of them reach all but a hundredth of what there is to gain.

With weights h (importance of a column), every sum and mean below is weighted by h.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

STEPS = 8
RIDGE = 1e-6  # of the largest entry of the normal matrix: two planes may have become equal


def fit_scales(groups: Tensor, planes: int, importance: Tensor | None = None) -> Tensor:
    """Return the scales of ``planes`` sign planes: float32 (planes, rows, groups), not negative, the largest first.

    Args:
        groups: Finite float32 (rows, groups, size).
        planes: 1 to 4.
        importance: Positive float32 (groups, size), or None for 1.
    """
    extremes = groups.abs().amax(-1, keepdim=True)
    unit = groups / extremes.masked_fill(extremes == 0, 1)  # squares of what follows neither overflow nor vanish
    weights = torch.ones_like(unit[:1]) if importance is None else importance[None]
    if planes == 1:
        scales = (weighted_mean(unit.abs(), weights))[None]
    else:
        scales = _two_scales(unit.abs(), weights)
        if planes > 2:
            scales = _alternate(unit, weights, scales, planes)
    return scales * extremes.squeeze(-1)


def nearest_signs(groups: Tensor, scales: Tensor) -> Tensor:
    """Return the planes whose sum is nearest to each weight: bool (planes, rows, groups, size), True for +.

    ``scales`` are float32 (planes, rows, groups), not negative, the largest first. Of two sums equally near either may be taken.
    """
    if len(scales) == 1:
        return groups[None] >= 0
    if len(scales) == 2:  # the sums are +-(s_1 + s_2) and +-(s_1 - s_2): s_1 is the middle of the magnitudes
        positive = groups >= 0
        return torch.stack((positive, (groups.abs() > scales[0, ..., None]) == positive))
    signs = _combinations(len(scales), groups.device)  # (2**K, K)
    sums = torch.einsum("ck,krg->crg", signs, scales)
    ordered, order = sums.sort(dim=0, stable=True)
    place = torch.zeros_like(groups, dtype=torch.int64)
    for lower, upper in itertools.pairwise(ordered):
        place += groups > ((lower + upper) * 0.5)[..., None]
    chosen = order.permute(1, 2, 0).gather(-1, place)
    return (signs.T > 0)[:, chosen]


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """Return the mean over the last dimension; 0 where the weights sum to 0."""
    total = weights.sum(-1).expand(values.shape[:-1])
    return (values * weights).sum(-1) / total.masked_fill(total == 0, 1)


def _two_scales(magnitudes: Tensor, weights: Tensor) -> Tensor:
    """Return the best two scales (2, rows, groups) by trying every cut of the sorted magnitudes."""
    ordered, order = magnitudes.sort(-1)
    mass = weights.expand_as(ordered).gather(-1, order)
    below, below_mass = (ordered * mass).cumsum(-1), mass.cumsum(-1)
    above, above_mass = below[..., -1:] - below, below_mass[..., -1:] - below_mass
    tiny = torch.finfo(torch.float32).tiny
    explained = below.square() / below_mass + above.square() / above_mass.clamp_min(tiny)
    cut = explained[..., :-1].argmax(-1, keepdim=True) if ordered.shape[-1] > 1 else torch.zeros_like(order)
    upper = (magnitudes > ordered.gather(-1, cut)).float() * weights
    high, low = weighted_mean(magnitudes, upper), weighted_mean(magnitudes, weights - upper)
    high = torch.where(upper.sum(-1) > 0, high, low)  # all magnitudes equal
    return torch.stack(((high + low) * 0.5, (high - low) * 0.5))


def _alternate(unit: Tensor, weights: Tensor, scales: Tensor, planes: int) -> Tensor:
    """Add planes for what remains, then alternate least-squares scales and nearest signs."""
    for count in range(len(scales), planes):
        remains = (unit - _sum(nearest_signs(unit, scales), scales)).abs()
        scales = torch.cat((scales, weighted_mean(remains, weights)[None]))
        for _ in range(STEPS if count + 1 == planes else 2):
            scales = _least_squares(unit, weights, nearest_signs(unit, scales))
    return scales


def _sum(signs: Tensor, scales: Tensor) -> Tensor:
    return torch.where(signs, scales[..., None], -scales[..., None]).sum(0)


def _least_squares(unit: Tensor, weights: Tensor, signs: Tensor) -> Tensor:
    """Return the scales (planes, rows, groups) of least error for given signs; negative ones (a plane upside down) become positive."""
    planes = len(signs)
    values = [sign.float().mul_(2).sub_(1) for sign in signs]
    weighted = [value * weights for value in values]
    normal = torch.stack(
        [torch.stack([(weighted[i] * values[j]).sum(-1) for j in range(planes)], -1) for i in range(planes)], -2
    ).double()
    along = torch.stack([(each * unit).sum(-1) for each in weighted], -1).double()
    ridge = RIDGE * normal.diagonal(dim1=-2, dim2=-1).amax(-1).clamp_min(1e-30)
    normal = normal + ridge[..., None, None] * torch.eye(planes, dtype=torch.float64, device=unit.device)
    solved: Tensor = torch.linalg.solve(normal, along)
    return solved.float().abs().sort(-1, descending=True).values.permute(2, 0, 1).contiguous()


def _combinations(planes: int, device: torch.device) -> Tensor:
    """Return every choice of signs, float32 (2**planes, planes)."""
    return torch.tensor(list(itertools.product((-1.0, 1.0), repeat=planes)), device=device)
