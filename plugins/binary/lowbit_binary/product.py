"""The product form: ``W ~ diag(a) B1 diag(m) B2 diag(b)`` with signs B1 (out, rank) and B2 (rank, in).

Double binary factorization (arXiv 2505.11076, section 3): each factor is a sign matrix times a matrix of rank one, ``B o (u v^T)``,
and the two are improved in turn by ADMM. With V fixed and its rows of norm 1, some steps of

    U = (W V^T + rho (Z - Y)) (V V^T + (rho + REG) I)^-1        least squares, pulled towards Z
    Z = sign(U + Y) o rank-one(|U + Y|)                         the nearest allowed matrix
    Y = Y + U - Z

where rho is 1, except in the first of the steps, where it grows with the cube of the progress from 0 to 1: early factors start
from the free solution, late ones from the allowed one. At the end the three vectors of
scales are fitted by least squares, one at a time, to the signs that were found. Columns are weighted by their importance: W is
scaled by its root before, and b by the inverse afterwards.

``rank = rate * out * in / (out + in)``: the two sign matrices then hold ``rate`` bits for each weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.parts import part_specs
from lowbit.scheme import Scheme
from lowbit.workers import map_ranges
from lowbit_binary.options import BinaryOptions
from lowbit_binary.storage import check_finite, store

REG = 3e-2
INNER = 3
POWER_STEPS = 5
REFITS = 3


def factorize(weight: Tensor, scheme: Scheme, options: BinaryOptions, importance: Tensor | None) -> dict[str, Tensor]:
    """Return the parts of the product for ``weight`` (out, in): planes ``left`` and ``right``, and three vectors of scales.

    Raises WeightError for NaN or infinity, and for a scale that the scheme's dtype cannot hold.
    """
    target = weight.float()
    check_finite(target)
    specs = part_specs(scheme, (weight.shape[0], weight.shape[1]))
    dtype, rank = specs["row_scales"].dtype, specs["left"].shape[1]
    size = target.abs().amax().clamp_min(1e-30)
    root = torch.ones_like(target[0]) if importance is None else importance.sqrt()
    scaled = target / size * root
    left, right = _factors(scaled, rank, options)
    rows, middle, columns = _scales(scaled, left, right)
    share = size ** (1 / 3)  # spread over the three vectors, so that none leaves the range of float16
    return {
        "left": (left > 0).to(torch.uint8),
        "right": (right > 0).to(torch.uint8),
        "row_scales": store(rows * share, dtype),
        "middle_scales": store(middle * share, dtype),
        "column_scales": store(columns / root * share, dtype),
    }


def _factors(weight: Tensor, rank: int, options: BinaryOptions) -> tuple[Tensor, Tensor]:
    """Return the allowed factors (out, rank) and (rank, in) after ``options.steps`` steps."""
    source = torch.Generator().manual_seed(options.seed)
    left = torch.randn(weight.shape[0], rank, generator=source).to(weight.device)
    right = torch.randn(rank, weight.shape[1], generator=source).to(weight.device)
    left_dual, right_dual = torch.zeros_like(left), torch.zeros_like(right)
    transposed = weight.T.contiguous()
    for step in range(options.steps):
        pull = min(1.0, step / max(1, options.steps - 3)) ** 3
        sizes = right.norm(dim=1).clamp_min(1e-30)  # one factor carries the sizes while the other has norms of 1
        right, right_dual = right / sizes[:, None], right_dual / sizes[:, None]
        left, left_dual = _improve(weight, right, left * sizes, left_dual * sizes, pull)
        sizes = left.norm(dim=0).clamp_min(1e-30)
        left, left_dual = left / sizes, left_dual / sizes
        found, dual = _improve(transposed, left.T, right.T * sizes, right_dual.T * sizes, pull)
        right, right_dual = found.T.contiguous(), dual.T.contiguous()
    return left, right


def _improve(weight: Tensor, other: Tensor, allowed: Tensor, dual: Tensor, pull: float) -> tuple[Tensor, Tensor]:
    """Return the factor Z and the dual Y after INNER steps; ``weight`` (n, k), ``other`` (rank, k), the rest (n, rank)."""
    gram, along = _product(other, other.T), _product(weight, other.T)
    for step in range(INNER):
        rho = pull if step == 0 else 1.0
        if step < 2:
            inverse = torch.linalg.inv(gram + (rho + REG) * torch.eye(len(gram), device=gram.device))
        free = _product(along + rho * (allowed - dual), inverse)
        allowed = _nearest(free + dual)
        dual = dual + free - allowed
    return allowed, dual


def _nearest(values: Tensor) -> Tensor:
    """Return the signs of ``values`` times the best rank-one matrix of their magnitudes (power iteration)."""
    magnitudes = values.abs()
    along = magnitudes.mean(0)
    for _ in range(POWER_STEPS):
        down = magnitudes @ along
        down = down / down.norm().clamp_min(1e-30)
        along = down @ magnitudes
    return torch.where(values >= 0, 1.0, -1.0) * (down[:, None] * along)


def _scales(weight: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return least-squares scales of rows, rank and columns for the signs of two factors."""
    rows, inner = left.abs().mean(1), left.abs().mean(0)
    columns, inner = right.abs().mean(0), inner * right.abs().mean(1)
    inner = inner / (rows.mean() * columns.mean()).clamp_min(1e-30)
    one, two = torch.where(left >= 0, 1.0, -1.0), torch.where(right >= 0, 1.0, -1.0)
    for _ in range(REFITS):
        rows = _quotient(weight, _product(one * inner, two * columns))
        inner = _inner(weight, one * rows[:, None], two * columns)
        columns = _quotient(weight.T, _product(one * rows[:, None] * inner, two).T)
    sizes = [vector.abs().mean().clamp_min(1e-30) for vector in (rows, inner, columns)]
    even = (sizes[0] * sizes[1] * sizes[2]) ** (1 / 3)
    return rows * (even / sizes[0]), inner * (even / sizes[1]), columns * (even / sizes[2])


def _quotient(weight: Tensor, product: Tensor) -> Tensor:
    """Return the scale of each row of ``product`` that brings it nearest to ``weight``."""
    return (weight * product).sum(1) / product.square().sum(1).clamp_min(1e-30)


def _inner(weight: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return the middle scales m of least error for ``left @ diag(m) @ right``."""
    gram = _product(left.T, left) * _product(right, right.T)
    gram.diagonal().add_(1e-6 * gram.diagonal().amax().clamp_min(1e-30))
    along = (_product(left.T, weight) * right).sum(1)
    solved: Tensor = torch.linalg.solve(gram.double(), along.double())
    return solved.float()


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Multiply; on a CPU by row pieces that depend on the shape alone, so that threads change no bit."""
    if left.device.type != "cpu":
        return left @ right
    out = torch.empty(left.shape[0], right.shape[1])

    def fill(start: int, stop: int) -> None:
        torch.mm(left[start:stop], right, out=out[start:stop])

    map_ranges(fill, left.shape[0], 1, piece=max(1, -(-left.shape[0] // 8)))
    return out
