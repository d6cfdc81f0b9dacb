"""The matrix of schemes and formats: computed from the same ``why_not`` calls that a conversion makes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from lowbit.exact import exact_scheme
from lowbit.registry import Registry, Route
from lowbit.scheme import Binary, Grid, Outliers, Rotation, ScaleFormat, Scheme, Trellis, Zero

SHAPE = (4096, 4096)
"""A weight that every group size and block divides, so that the matrix shows what a format can hold at all."""

K_SCALES = ScaleFormat(bits=6, super_group=8)

SCHEMES: Mapping[str, Scheme] = MappingProxyType(
    {
        "affine 8-bit g32": Scheme(Grid.AFFINE, 8, 32),
        "affine 8-bit g128": Scheme(Grid.AFFINE, 8, 128),
        "affine 5-bit g32": Scheme(Grid.AFFINE, 5, 32),
        "affine 4-bit g32": Scheme(Grid.AFFINE, 4, 32),
        "affine 4-bit g32 min": Scheme(Grid.AFFINE, 4, 32, Zero.MINIMUM),
        "affine 4-bit g32 two-level (K)": Scheme(Grid.AFFINE, 4, 32, Zero.MINIMUM, K_SCALES),
        "affine 4-bit g128": Scheme(Grid.AFFINE, 4, 128),
        "affine 4-bit g128 asym": Scheme(Grid.AFFINE, 4, 128, Zero.INTEGER),
        "affine 3-bit g128": Scheme(Grid.AFFINE, 3, 128),
        "affine 4-bit g256 asym": Scheme(Grid.AFFINE, 4, 256, Zero.INTEGER),
        "affine 2-bit g64": Scheme(Grid.AFFINE, 2, 64),
        "affine 4-bit g128 +outliers": Scheme(Grid.AFFINE, 4, 128, outliers=Outliers(0.01)),
        "affine 4-bit g128 +permutation": Scheme(Grid.AFFINE, 4, 128, permutation=True),
        "codebook 4-bit g64": Scheme(Grid.CODEBOOK, 4, 64),
        "codebook 3-bit g64": Scheme(Grid.CODEBOOK, 3, 64),
        "trellis 2-bit +rotation": Scheme(
            Grid.TRELLIS, 0, flat=True, trellis=Trellis("mul1", (2,)), rotation=Rotation()
        ),
        "binary 2 planes g128": Scheme(Grid.BINARY, 2, 128, binary=Binary(2)),
    }
)


@dataclass(frozen=True, slots=True)
class Cell:
    """What one format says to one scheme: the layout it would use (None: dequantized), or the reason of the refusal.

    ``exact`` is the other scheme, when codes that exist already reach the layout by an exact re-expression only.
    """

    layout: str | None = None
    reason: str | None = None
    exact: Scheme | None = None

    def text(self) -> str:
        """Return the layout (with ``=`` before it when codes are re-expressed exactly), ``dequantized``, or ``-``."""
        if self.exact:
            return f"= {self.layout}"
        return "-" if self.reason else self.layout or "dequantized"


def compute(registry: Registry) -> dict[str, dict[str, Cell]]:
    """Return a row for every scheme in ``SCHEMES``, with a cell for every export format."""
    return {
        name: {format: _cell(registry, scheme, format) for format in registry.exporters}
        for name, scheme in SCHEMES.items()
    }


def markdown(registry: Registry) -> str:
    """Return the matrix as the Markdown table that the README holds."""
    formats = list(registry.exporters)
    lines = [f"| scheme | {' | '.join(formats)} |", "|---" * (len(formats) + 1) + "|"]
    for name, cells in compute(registry).items():
        lines.append(f"| {name} | {' | '.join(cells[format].text() for format in formats)} |")
    return "\n".join(lines)


def _cell(registry: Registry, scheme: Scheme, format: str) -> Cell:
    answer = registry.ask(scheme, SHAPE, format)
    if isinstance(answer, Route):
        return Cell(layout=answer.packer.layout if answer.packer else None)
    reason = min(answer.values(), key=len)
    other = exact_scheme(registry, scheme, SHAPE, format)
    if other is None:
        return Cell(reason=reason)
    route = registry.ask(other, SHAPE, format)
    assert isinstance(route, Route)
    assert route.packer is not None
    return Cell(route.packer.layout, reason, other)
