"""The quantizer ``ggml``: the types of llama.cpp's GGUF files, by its weightings and searches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lowbit.hookspecs import hookimpl
from lowbit.interfaces import Quantizer
from lowbit_formats.ggml.quantizer import GgmlQuantizer


@hookimpl
def lowbit_register_quantizers(register: Callable[[Quantizer[Any]], None]) -> None:
    """Register the quantizer."""
    register(GgmlQuantizer())
