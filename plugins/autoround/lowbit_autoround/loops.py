"""The two passes over a weight that a tuning step makes, as loops of C on a CPU: one read of what torch reads ten times.

``TunedWeight`` does the same in torch, to the same bits: every operation rounds alike, and sums over a group run in the order of
``summed``. So a job may go on without the compiler that it began with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lowbit.compiled import CLoops
from lowbit_autoround.ranges import Steps

LANES = 16
"""Sums that run side by side (tune.c)."""
_LOOPS = CLoops(Path(__file__).with_name("tune.c"))


def decoder(groups: Tensor, values: Tensor, steps: Steps, out: Tensor) -> Callable[[int, int], None] | None:
    """Return what writes decoded rows, from start to stop, to ``out`` (out, in); None without a compiler."""
    loop = _LOOPS.find("decode")
    if loop is None:
        return None
    state, (_, columns) = _state(groups, values, steps), out.shape
    exact = out.dtype is torch.float32 and out.is_contiguous()

    def work(start: int, stop: int) -> None:
        rows = out[start:stop] if exact else torch.empty(stop - start, columns)
        loop(*state, rows, start, stop, *groups.shape[1:], columns)
        if not exact:
            out[start:stop] = rows

    return work


def learner(
    groups: Tensor,
    values: Tensor,
    steps: Steps,
    gradients: Sequence[Tensor],
    lr: float,
    largest: float,
    sums: tuple[Tensor, Tensor],
) -> Callable[[int, int], None] | None:
    """Return what moves ``values`` of some rows by ``lr``, within ``largest``; None without a compiler.

    It writes the sums A and B of ``lowbit_autoround.ranges`` (rows, groups) to ``sums``.
    """
    loop = _LOOPS.find("learn")
    if loop is None:
        return None
    state, columns = _state(groups, values, steps), gradients[0].shape[1]
    read = [gradient.float().contiguous() for gradient in gradients]
    addresses = torch.tensor([gradient.data_ptr() for gradient in read])

    def work(start: int, stop: int) -> None:
        loop(*state, addresses, len(read), lr, largest, *sums, start, stop, *groups.shape[1:], columns)

    return work


def summed(values: Tensor) -> Tensor:
    """Return the sums over the last dimension, on a CPU in the order of tune.c: LANES sums side by side, then their halves added."""
    if values.device.type != "cpu":
        return values.sum(-1)
    missing = -values.shape[-1] % LANES
    parts = torch.nn.functional.pad(values, (0, missing)).view(*values.shape[:-1], -1, LANES)
    total = torch.zeros_like(parts[..., 0, :])
    for part in parts.unbind(-2):
        total.add_(part)
    while total.shape[-1] > 1:
        total = total[..., : total.shape[-1] // 2] + total[..., total.shape[-1] // 2 :]
    return total[..., 0]


def _state(groups: Tensor, values: Tensor, steps: Steps) -> tuple[Tensor | float | None, ...]:
    """Return the first arguments of both loops."""
    zeros = steps.zero.float().contiguous() if isinstance(steps.zero, Tensor) else None
    zero = 0.0 if isinstance(steps.zero, Tensor) else float(steps.zero)
    offset = None if steps.offset is None else steps.offset.contiguous()
    return groups, values, steps.scale.contiguous(), offset, zeros, zero, float(steps.last)
