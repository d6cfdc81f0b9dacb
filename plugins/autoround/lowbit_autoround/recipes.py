"""``Tuning``: how a block is tuned, and the recipes under which AutoRound publishes its results (auto-round 0.16.1, cli/main.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

RecipeName = Literal["default", "best", "light", "rtn", "opt_rtn"]
MANY_STEPS = 1000
"""From this many steps on, up to LOW_BITS bits, the step is 2 / iters, as in auto-round 0.16.1."""
LOW_BITS = 3


@dataclass(frozen=True, slots=True)
class Tuning:
    """Settings of a tuning run; ``lr`` None is 1 / iters.

    Attributes:
        iters: Steps; 0 rounds to nearest.
        lr: First step size of rounding values and range multipliers; it falls linearly to 0.
        nsamples: Calibration sequences.
        seqlen: Tokens of one.
        batch_size: Sequences of a step.
        search: Whether scales are searched rather than taken from the extremes.
    """

    iters: int
    lr: float | None = None
    nsamples: int = 128
    seqlen: int = 2048
    batch_size: int = 8
    search: bool = False

    def step_size(self, bits: int) -> float:
        """Return the first step size for weights of ``bits`` bits."""
        if self.lr is not None:
            return self.lr
        return (2.0 if bits <= LOW_BITS and self.iters >= MANY_STEPS else 1.0) / self.iters


RECIPES: Mapping[RecipeName, Tuning] = MappingProxyType(
    {
        "default": Tuning(200),
        "best": Tuning(1000, nsamples=512),
        "light": Tuning(50, lr=5e-3),
        "rtn": Tuning(0),
        "opt_rtn": Tuning(0, search=True),
    }
)
