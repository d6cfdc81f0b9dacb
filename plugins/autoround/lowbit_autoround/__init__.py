"""AutoRound's grids for lowbit: round to nearest on full-range symmetric and asymmetric integers, plain or with searched scales."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lowbit import Quantizer, hookimpl


@hookimpl
def lowbit_register_quantizers(register: Callable[[Quantizer[Any]], None]) -> None:
    """Register the quantizer ``autoround``."""
    from lowbit_autoround.quantizer import AutoRoundQuantizer

    register(AutoRoundQuantizer())
