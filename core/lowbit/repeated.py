"""Values of wide groups repeated for the narrow groups inside them."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from lowbit.compiled import CLoops

_LOOPS = CLoops(Path(__file__).with_name("repeated.c"))
_NAMES = {2: "repeat_halves", 4: "repeat_words"}


def repeated(values: Tensor, times: int) -> Tensor:
    """Repeat each value of (rows, groups) to (rows, groups * times); the same tensor for once.

    torch takes 1.7 ns for each half that it writes, the loop 0.2 (2026-11-21).
    """
    if times == 1:
        return values
    name = _NAMES.get(values.dtype.itemsize)
    if name and values.device.type == "cpu" and values.is_contiguous() and (loop := _LOOPS.find(name)) is not None:
        result = values.new_empty(len(values), values.shape[1] * times)
        loop(values, result, values.numel(), times)
        return result
    return values.repeat_interleave(times, dim=1)
