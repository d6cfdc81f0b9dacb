"""How large an error may be, and why: quantization error of Gaussian weights, and rounding error of a matrix product."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from types import MappingProxyType

import torch
from torch import Tensor

from lowbit.scheme import BinaryForm, Grid, Scheme

_COLUMNS = (
    "normal-float absmax",
    "optimal absmax",
    "optimal signed absmax",
    "normal-float searched",
    "joint searched",
    "uniform searched",
    "lloyd-max rms",
)
_ROWS = {
    (2, 32): (0.1811, 0.1130, 0.1061, 0.1046, 0.1050, 0.1070, 0.1116),
    (2, 64): (0.2160, 0.1179, 0.1149, 0.1114, 0.1112, 0.1127, 0.1145),
    (2, 128): (0.2489, 0.1200, 0.1189, 0.1153, 0.1144, 0.1157, 0.1160),
    (3, 32): (0.03152, 0.02828, 0.02610, 0.02543, 0.02534, 0.02912, 0.03224),
    (3, 64): (0.03655, 0.03152, 0.02983, 0.02922, 0.02911, 0.03286, 0.03336),
    (3, 128): (0.04109, 0.03351, 0.03249, 0.03183, 0.03154, 0.03502, 0.03394),
    (4, 32): (0.00758, 0.00662, 0.00628, 0.00622, 0.00581, 0.00717, 0.00877),
    (4, 64): (0.00839, 0.00762, 0.00727, 0.00718, 0.00688, 0.00869, 0.00912),
    (4, 128): (0.00904, 0.00839, 0.00807, 0.00797, 0.00776, 0.00988, 0.00931),
    (5, 32): (0.00233, 0.00158, 0.00153, 0.00182, 0.00136, 0.00170, 0.00231),
    (5, 64): (0.00244, 0.00183, 0.00178, 0.00200, 0.00164, 0.00215, 0.00240),
}

MEASURED: Mapping[str, Mapping[tuple[int, int], float]] = MappingProxyType(
    {name: MappingProxyType({key: row[column] for key, row in _ROWS.items()}) for column, name in enumerate(_COLUMNS)}
)
"""Mean squared error of ``MEASURED[recipe][bits, group_size]``, measured on N(0,1), 8.4M samples, float32 scales.

"absmax": the scale is the largest magnitude of the group; "signed": it keeps that weight's sign; "searched": the best of 25
scales; "optimal": the codebook is re-fitted for the recipe; "rms": the scale is the group's root mean square.
"""

GREEDY_BINARY = (0.3634, 0.1306, 0.0585, 0.0330)
"""What 1 to 4 sign planes leave of a Gaussian when each plane takes the signs of the residual, times its mean magnitude.

The first is 1 - 2/pi (Rastegari et al. 2016, XNOR-Net, section 3.1); the others measured on N(0,1), 1M samples.
"""

SLACK = 1.15
"""Float16 scales, integer zeros and the statistics of a test weight cost less than this over the expected error."""


@cache
def largest_square(count: int) -> float:
    """Return E[max(w1**2 ... wn**2)] for n independent N(0,1) weights: the integral of P(max |w| > m) 2m dm."""
    step = 1 / 512
    return sum(
        2 * m * step * (1 - math.erf(m / math.sqrt(2)) ** count) for m in (step * (i + 0.5) for i in range(5120))
    )


def uniform_nmse(codes: int, group_size: int, symmetric: bool = True) -> float:
    """Return the error of rounding N(0,1) weights to ``codes`` evenly spaced values that reach each group's absmax M.

    Rounding to a step d costs d**2/12 (Bennett 1948). A grid from -M to M has d = 2M/(codes - 1); one that also holds zero
    uses an odd number of codes, so a symmetric grid with an even number leaves one out.
    """
    intervals = codes - 1 - (symmetric and codes % 2 == 0)
    return min(1.0, largest_square(group_size) * (2 / intervals) ** 2 / 12) if intervals else 1.0


def nmse_budget(scheme: Scheme, in_features: int) -> float:
    """Return the largest error, relative to the mean square, that a quantizer may make on Gaussian weights.

    AFFINE: round to nearest on the group's range (``uniform_nmse``); any search does better. CODEBOOK: twice that, because
    a codebook made for another shape costs more (float-like codes of 4 bits in groups of 64: 0.0149, against 0.0117 for a
    uniform grid). Float-like codes of 8 bits spend most of theirs near zero (e4m3: 0.00063 against 0.00004) and need a
    budget of their own: override ``max_nmse``. TRELLIS: 1.6 times the bound 2**-2R; the codes of QTIP and EXL3 reach 1.06
    to 1.41 times it at 1 to 4 bits. BINARY: ``GREEDY_BINARY``. Two-level scales add an eighth. The figures are measured on
    N(0,1).
    """
    if scheme.trellis:
        error = 1.6 * math.pow(2, -2 * scheme.trellis.tile_bits / math.prod(scheme.trellis.tile))
    elif scheme.binary:
        error = 1.0 if scheme.binary.form is BinaryForm.PRODUCT else GREEDY_BINARY[min(scheme.binary.planes, 4) - 1]
    elif scheme.vector > 1:
        error = min(1.0, 4 * math.pow(2, -2 * scheme.bits / scheme.vector))
    else:
        group = min(scheme.group_size or in_features, in_features)
        error = uniform_nmse(scheme.code_count, group, scheme.symmetric) * (2 if scheme.grid is Grid.CODEBOOK else 1)
    return min(1.0, error * SLACK * (1.125 if scheme.scales.two_level else 1))


def roundoff(dtype: torch.dtype) -> float:
    """Return the unit roundoff: the largest relative error of one rounding to ``dtype``."""
    return float(torch.finfo(dtype).eps) / 2


def matmul_bound(x: Tensor, weight: Tensor, dtype: torch.dtype, bias: Tensor | None = None) -> Tensor:
    """Return float64 bounds on ``|kernel - exact|`` for ``x @ weight.T + bias`` computed in ``dtype``.

    With k = in_features, u the roundoff of ``dtype`` and v that of float32: weights are rounded once to ``dtype`` (u),
    products are summed in float32 in any order (gamma = n v / (1 - n v) with n = k + 4, Higham, Accuracy and Stability of
    Numerical Algorithms, 2nd edition, section 4.2; the 4 pay for scales that are applied after the sum), and the result is
    rounded once to ``dtype`` (u), or twice when a bias is added to a rounded product. Underflow costs a smallest subnormal.
    """
    u, v = roundoff(dtype), roundoff(torch.float32)
    terms = (x.shape[-1] + 4) * v
    gamma = terms / (1 - terms)
    magnitude = x.double().abs() @ weight.double().abs().T
    exact = (x.double() @ weight.double().T).abs()
    inner = (u + gamma + u * gamma) * magnitude
    underflow = (
        torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps * (1 + x.double().abs().sum(-1, keepdim=True))
    )
    bound = inner + u * (exact + inner) + underflow
    if bias is not None:
        bound = bound + (u + v) * (exact + bound + bias.double().abs()) + u * bias.double().abs()
    return bound


def dequantize_bound(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return float64 bounds on ``|kernel - weight|`` for a float32 ``weight`` that a kernel writes in ``dtype``.

    One rounding to ``dtype``, and four float32 roundings of terms no larger than the row's largest weight, because a fast
    kernel may multiply and add in another order than the reference.
    """
    largest = weight.double().abs().amax(-1, keepdim=True) if weight.numel() else weight.double()
    underflow = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    return roundoff(dtype) * weight.double().abs() + 4 * roundoff(torch.float32) * largest + underflow
