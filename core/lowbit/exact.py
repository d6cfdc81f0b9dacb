"""Which scheme a format can store a weight in without changing what it means: its own, or the smallest that lifts to."""

from __future__ import annotations

from lowbit import lift
from lowbit.registry import Registry, Route
from lowbit.scheme import Scheme


def exact_scheme(registry: Registry, scheme: Scheme, shape: tuple[int, int], format: str) -> Scheme | None:
    """Return ``scheme`` when ``format`` stores it, else the scheme of the fewest bytes that holds the same numbers, else None.

    Candidates are the format's named variants and what ``lift.candidates`` proposes. What depends on the values is checked
    when they are there.
    """
    if isinstance(registry.ask(scheme, shape, format), Route):
        return scheme
    sizes: dict[Scheme, int] = {}
    variants = registry.exporters[format].variants().values()
    for other in (*variants, *lift.candidates(scheme, shape)):
        if lift.why_not(scheme, other, shape) is None:
            route = registry.ask(other, shape, format)
            if isinstance(route, Route) and route.packer is not None:
                sizes[other] = route.packer.spec(other, shape).nbytes
    return min(sizes, key=lambda other: sizes[other]) if sizes else None
