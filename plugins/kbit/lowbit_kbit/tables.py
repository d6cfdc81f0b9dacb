"""The tables with which CUDA finds the nearest entry, for any ascending codebook, exactly (``cuda/quantize.cu`` reads them).

x falls into one of ``slots`` equal slots over the range of the midpoints. ``below[slot]`` counts the midpoints that lie more than
three quarters of a slot below the slot's middle: surely below x, however the device rounds on the way to the slot (by half a slot
and a thousandth). The ``compares`` next midpoints are compared with x itself, which finishes the count.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SLOTS = (256, 512, 1024, 2048, 4096)
MARGIN = 0.75
COMPARES = (1, 2, 4)
"""How many comparisons a kernel is compiled for; codebooks that need more are searched by halves."""


@dataclass(frozen=True, slots=True)
class SearchTables:
    """Midpoints (then infinity) float32 ``(2**k,)``, counts uint8 ``(slots,)``, and slot(x) = (x * step + start) * (slots - 1)."""

    edges: Tensor
    below: Tensor
    compares: int
    step: float
    start: float

    def to(self, device: torch.device) -> SearchTables:
        """Return the tables on another device."""
        return SearchTables(self.edges.to(device), self.below.to(device), self.compares, self.step, self.start)


def search_tables(edges: Tensor) -> SearchTables:
    """Return the smallest tables that need one comparison for ascending float32 ``edges`` on the CPU, or else the fewest.

    The edges are the midpoints of a codebook or, for stochastic rounding, its entries but the first: ``(2**k - 1,)``.
    """
    padded = torch.cat((edges, torch.tensor([torch.inf])))
    low, high = float(edges[0]), float(edges[-1])
    width = (high - low) or 1.0
    # A sixteenth of the range is left on either side, for the slots of everything that lies out there
    step = float(torch.tensor(7 / 8 / width))
    start = float(torch.tensor(1 / 16 - low * step))
    found = None
    if step < torch.finfo(torch.float32).max and abs(start) < 2**12:  # beyond, the slot of x would lose its digits
        for slots in SLOTS:
            below, needed = _counts(edges.double() * step + start, slots)
            compares = next((count for count in COMPARES if count >= needed), 0)
            if compares and (found is None or compares < found.compares):
                found = SearchTables(padded, below, compares, step, start)
            if compares == 1:
                break
    return found or SearchTables(padded, torch.zeros(1, dtype=torch.uint8), 0, 0.0, 0.0)


def _counts(places: Tensor, slots: int) -> tuple[Tensor, int]:
    """Return the counts for midpoints at ``places`` (0 to 1), and the most comparisons that are left."""
    places = places * (slots - 1)
    middles = torch.arange(slots, dtype=torch.float64)
    below = torch.searchsorted(places, middles - MARGIN)  # places strictly below
    reach = torch.searchsorted(places, middles + MARGIN, right=True)
    return below.to(torch.uint8), int((reach - below).max())
