"""Blockwise k-bit quantization for lowbit: 2 to 8 bits, four kinds of codebook, three ways to choose the scale."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lowbit import Quantizer, hookimpl


@hookimpl
def lowbit_register_quantizers(register: Callable[[Quantizer[Any]], None]) -> None:
    """Register the quantizer ``kbit``."""
    from lowbit_kbit.quantizer import KbitQuantizer

    register(KbitQuantizer())
