"""What to do with a packed weight that no exact route leads on from: say what would hold it, or choose new codes.

``--allow-requantize`` rounds a second time, so nothing here happens without it. Without a ``--quantizer`` the new codes come
from the first installed quantizer that gives the nearest scheme the format stores; the format says whom to ask first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lowbit import lift
from lowbit.errors import LowbitError, OptionError
from lowbit.exact import exact_scheme
from lowbit.fold import DOWN, SIBLINGS
from lowbit.interfaces import Exporter, Quantizer
from lowbit.options import build_options
from lowbit.recipe import Choice
from lowbit.registry import Registry, Route
from lowbit.scheme import Grid, ScaleFormat, Scheme, Zero

SHOWN = 4
"""Exact alternatives that a refusal lists; the nearest come first."""
_GROUPS = (128, 64, 32, 16, None)
_ROUND_SHAPE = (4096, 4096)
"""A weight that every layout can cut into its blocks."""


def exact_alternatives(registry: Registry, scheme: Scheme, shape: tuple[int, int], format: str) -> list[str]:
    """Return ``FORMAT`` or ``FORMAT:VARIANT`` for everything that stores the same numbers packed, nearest first.

    The format that was asked for comes first (under another variant), then whoever needs the fewest bytes; a format that stores
    anything is last, because that says little.
    """
    found: list[tuple[bool, bool, int, str]] = []
    for name, exporter in registry.exporters.items():
        if (nbytes := _packed_size(registry, scheme, shape, name)) is None:
            continue
        held = exact_scheme(registry, scheme, shape, name)
        variants = [variant for variant, other in exporter.variants().items() if other == held]
        found.append((name != format, exporter.layouts is None, nbytes, f"{name}:{variants[0]}" if variants else name))
    return [name for *_, name in sorted(found)]


def way_out(registry: Registry, scheme: Scheme, shape: tuple[int, int], format: str) -> str:
    """Return the end of a refusal: which formats hold the weight exactly, and the flag that chooses new codes."""
    names = exact_alternatives(registry, scheme, shape, format)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    holds = f"these formats can, exactly: {', '.join(names[:SHOWN])}{more}" if names else "no installed format can"
    folding = (
        f"; of act-order only that of {DOWN} can be folded, into {' and '.join(SIBLINGS)}" if scheme.permutation else ""
    )
    return f"{holds}{folding}; --allow-requantize chooses new codes"


def why_not_exactly(
    registry: Registry, scheme: Scheme, shape: tuple[int, int], exporter: Exporter, reasons: Mapping[str, str]
) -> Mapping[str, str]:
    """Return what keeps a weight's codes from meaning the same in each variant of the format, the nearest variant first.

    A format without variants answers with its layouts' own ``reasons``.
    """
    variants = sorted(exporter.variants().items(), key=lambda it: _distance(scheme, it[1], shape))
    found = {}
    for variant, other in variants:
        route = registry.ask(other, shape, exporter.format, exporter.preferred(variant))
        refused = None if isinstance(route, Route) else next(iter(by_scheme(registry, other, route).values()))
        if reason := lift.why_not(scheme, other, shape) or refused:
            found[f"{exporter.format}:{variant}"] = reason
    return found or reasons


def by_scheme(registry: Registry, scheme: Scheme, reasons: Mapping[str, str]) -> dict[str, str]:
    """Return the refusals with those first that concern the shape only: of layouts that hold the scheme in another."""

    def other_shape(layout: str) -> bool:
        return layout in registry.packers and registry.packers[layout].why_not(scheme, _ROUND_SHAPE) is None

    return dict(sorted(reasons.items(), key=lambda it: not other_shape(it[0])))


def nearest_choice(registry: Registry, scheme: Scheme, shape: tuple[int, int], exporter: Exporter) -> Choice | None:
    """Return a quantizer with options for the scheme nearest to ``scheme`` that the format stores; None when there is none."""
    for target in nearest_schemes(registry, scheme, shape, exporter):
        if choice := choice_for(registry, target, shape, exporter):
            return choice
    return None


def choice_for(
    registry: Registry, target: Scheme, shape: tuple[int, int], exporter: Exporter, preferred: Sequence[str] = ()
) -> Choice | None:
    """Return the first installed quantizer that gives exactly ``target``, with its options; the format's own favourites first."""
    codebook = registry.fixed_codebook(target, shape, exporter.format, preferred)
    favourites = [registry.quantizers[name] for name in exporter.quantizers if name in registry.quantizers]
    others = [quantizer for quantizer in registry.quantizers.values() if quantizer not in favourites]
    for quantizer in (*favourites, *others):
        options = _fit(quantizer, target, codebook)
        if options is not None and not quantizer.needs_for(options):
            return Choice(quantizer, options)
    return None


def nearest_schemes(registry: Registry, scheme: Scheme, shape: tuple[int, int], exporter: Exporter) -> Iterator[Scheme]:
    """Yield schemes that the format stores packed: enough bits first, then the same grid, zero and group size."""
    known = dict.fromkeys((*exporter.variants().values(), *_affine_schemes(scheme)))
    for other in sorted(known, key=lambda other: _distance(scheme, other, shape)):
        route = registry.ask(other, shape, exporter.format)
        if isinstance(route, Route) and route.packer is not None:
            yield other


def _affine_schemes(source: Scheme) -> Iterator[Scheme]:
    """Yield plain affine schemes; formats name variants only for what is not simply these."""
    dtypes = dict.fromkeys((source.scales.dtype, "float16"))
    for bits in range(2, 9):
        for group_size in dict.fromkeys((source.group_size, *_GROUPS)):
            for zero in (Zero.SYMMETRIC, Zero.INTEGER):
                for dtype in dtypes:
                    yield Scheme(Grid.AFFINE, bits, group_size, zero, ScaleFormat(dtype))


def _distance(source: Scheme, other: Scheme, shape: tuple[int, int]) -> tuple[object, ...]:
    """Return a key that sorts schemes by how far they are from ``source``; ties keep the order of the list."""
    grid = source.grid if source.grid in (Grid.AFFINE, Grid.CODEBOOK) else Grid.AFFINE
    same_zero = other.zero is source.zero or not (other.symmetric or source.symmetric or other.zero is Zero.FLOAT)
    length = shape[0] * shape[1] if other.flat else shape[1]
    groups = abs(math.log2((source.group_size or shape[1]) / (other.group_size or length)))
    return (
        other.rate < source.rate,
        abs(other.rate - source.rate),
        other.levels is not None,
        other.grid is not grid,
        other.symmetric != source.symmetric,
        not same_zero,
        groups,
        other.scales.dtype != source.scales.dtype,
    )


def adapt(registry: Registry, choice: Choice, shape: tuple[int, int], exporter: Exporter) -> Choice | None:
    """Return the choice with those options that the user did not set changed to a variant of the format, the first that fits.

    So that ``--quantizer kbit --format bitsandbytes`` needs no table and no dtype of scales. None where nothing fits: neither the
    options nor, with a row that no block divides, the shape.
    """
    for variant, scheme in exporter.variants().items():
        if not isinstance(registry.ask(scheme, shape, exporter.format), Route):
            continue
        codebook = registry.fixed_codebook(scheme, shape, exporter.format, exporter.preferred(variant))
        try:
            return choice.fitted(scheme, "it", codebook)
        except OptionError:
            continue
    return None


def with_codebook(registry: Registry, format: str, codebook: Tensor | None) -> list[str]:
    """Return the layouts of a format whose codes mean exactly the entries of ``codebook``."""
    if codebook is None:
        return []
    packers = [registry.packers[layout] for layout in registry.exporters[format].layouts or ()]
    return [it.layout for it in packers if it.codebook is not None and torch.equal(it.codebook, codebook)]


def _fit(quantizer: Quantizer[object], target: Scheme, codebook: Tensor | None) -> object | None:
    try:
        options = quantizer.fit(build_options(quantizer.Options, {}, quantizer.name), target)
        if options is not None and codebook is not None:
            options = quantizer.with_codebook(options, codebook)
        return options if options is not None and quantizer.scheme(options) == target else None
    except (LowbitError, TypeError):  # a required option, or one that the target's numbers break: not this quantizer
        return None


def _packed_size(registry: Registry, scheme: Scheme, shape: tuple[int, int], format: str) -> int | None:
    """Return the bytes of such a weight where the format stores it packed and exactly, else None."""
    held = exact_scheme(registry, scheme, shape, format)
    if held is None or lift.why_not(scheme, held, shape):
        return None
    route = registry.ask(held, shape, format)
    return route.packer.spec(held, shape).nbytes if isinstance(route, Route) and route.packer else None
