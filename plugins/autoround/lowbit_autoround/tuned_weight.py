"""``TunedWeight``: one weight with its learned rounding values, decoded for the forward pass and moved by its gradient.

No autograd runs through the quantization: the block runs with the decoded weight, autograd gives the gradient at that weight,
and the formulas of ``lowbit_autoround.ranges`` do the rest, once a step however many batches add up: on a GPU in kernels
(``fused``), on a CPU in loops of C (``loops``), or piece by piece in torch, to the same bits as in C.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TypeAlias

import torch
from torch import Tensor

from lowbit import QuantizedTensor, Scheme
from lowbit.workers import map_ranges
from lowbit_autoround import loops
from lowbit_autoround.ranges import Parts, Ranges, Steps

PIECE = 1 << 18
"""Weights in a piece: four float32 temporaries of it stay in a core's cache."""
LARGEST_VALUE = 0.5
"""V changes a code by one at most, in either direction (SignRound)."""
Rows: TypeAlias = Callable[[int, int], None]
"""Does its work on some rows of a weight, from start to stop."""


class TunedWeight:
    """A weight (out, in) in float32 groups (rows, groups, size), its rounding values V, and its ranges.

    A short last group is filled up with its last weight, which changes no extreme; its gradients are zero.
    """

    def __init__(self, scheme: Scheme, shape: tuple[int, int], groups: Tensor, ranges: Ranges, lr: float) -> None:
        self.scheme, self.shape, self.lr = scheme, shape, lr
        self.ranges = ranges
        self._groups, self._values = groups, torch.zeros_like(groups)
        self._steps = ranges.steps()
        self._divisor = _divisor(self._steps)
        self._fused = _fused(groups, shape[1])

    def decode(self, out: Tensor) -> None:
        """Write the weight that the present state means to ``out`` (out, in), of any float dtype."""
        decode_all([(self, out)])

    def learn(self, gradients: Sequence[Tensor], fraction: float, tune_scales: bool) -> None:
        """Take one step against the sum of ``gradients`` (out, in), loss gradients at the weight that ``decode`` gave.

        Args:
            gradients: One or more, in any float dtype, added in this order; the first may be overwritten.
            fraction: What is left of the first step size.
            tune_scales: Whether the ranges learn too.
        """
        learn_all([(self, gradients, tune_scales)], fraction)

    def _decoding(self, out: Tensor) -> Rows | None:
        """Fix the parameters, and return what decodes rows with them; None when that is done."""
        on_cpu = self._groups.device.type == "cpu"
        steps = self._steps = self.ranges.steps(check=on_cpu)  # elsewhere it would wait for the device: ``parts`` asks
        self._divisor = _divisor(steps)
        if self._fused:
            self._fused.decode(self._groups, self._values, steps, out)
            return None
        if on_cpu and (rows := loops.decoder(self._groups, self._values, steps, out)) is not None:
            return rows

        def work(start: int, stop: int) -> None:
            weight = self._rounded(start, stop)[0].mul_(steps.scale[start:stop, :, None])
            if steps.offset is not None:
                weight.add_(steps.offset[start:stop, :, None])
            out[start:stop] = weight.view(stop - start, -1)[:, : self.shape[1]]

        return work

    def _learning(self, gradients: Sequence[Tensor], lr: float, sums: tuple[Tensor, Tensor]) -> Rows:
        """Return what moves V of some rows and writes what the gradients of their ranges need (``ranges``) to ``sums``."""
        if self._groups.device.type == "cpu":
            rows = loops.learner(self._groups, self._values, self._steps, gradients, lr, LARGEST_VALUE, sums)
            if rows is not None:
                return rows
        by_scale, by_offset = sums
        sign = self._steps.scale.sign()[..., None]

        def work(start: int, stop: int) -> None:
            grad = self._grouped(gradients[0][start:stop])
            for other in gradients[1:]:
                grad = grad + self._grouped(other[start:stop])
            steps, unclamped, quotient = self._rounded(start, stop)
            inside = grad.masked_fill(steps != unclamped, 0.0)
            by_offset[start:stop] = loops.summed(grad - inside)
            by_scale[start:stop] = loops.summed((grad * steps).sub_(quotient.mul_(inside)))
            move = inside.sign_().mul_(sign[start:stop])
            self._values[start:stop].sub_(move, alpha=lr).clamp_(-LARGEST_VALUE, LARGEST_VALUE)

        return work

    def parts(self) -> Parts:
        """Return codes and stored parameters: exactly what ``decode`` last wrote, in memory of their own.

        Raises WeightError for parameters that the scheme's dtype cannot hold.
        """
        rows, columns = self.shape
        self.ranges.steps()
        codes = torch.empty(rows, columns, dtype=torch.uint8, device=self._groups.device)

        def work(start: int, stop: int) -> None:
            steps = self._rounded(start, stop)[0].add_(_rows(self._steps.zero, start, stop))
            codes[start:stop] = steps.to(torch.int16).to(torch.uint8).view(stop - start, -1)[:, :columns]

        _run([(self, work)])
        return {"codes": codes, **{name: part.clone() for name, part in self._steps.parts.items()}}

    def quantized(self, parts: Parts) -> QuantizedTensor:
        """Return ``parts`` as a tensor of this weight's scheme."""
        return QuantizedTensor(self.scheme, self.shape, parts)

    def _rounded(self, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return whole steps u, the same before the clamp, and (w - offset) / scale, for some rows."""
        steps, groups = self._steps, self._groups[start:stop]
        if steps.offset is not None:
            groups = groups - steps.offset[start:stop, :, None]
        quotient = groups / self._divisor[start:stop, :, None]
        unclamped = (quotient + self._values[start:stop]).round_()
        zero = _rows(steps.zero, start, stop)
        return (unclamped + zero).clamp_(0, steps.last).sub_(zero), unclamped, quotient

    def _grouped(self, gradient: Tensor) -> Tensor:
        missing = self._groups[0].numel() - gradient.shape[1]
        grad = torch.nn.functional.pad(gradient, (0, missing)).float() if missing else gradient.float()
        return grad.reshape(len(gradient), *self._groups.shape[1:])


def decode_all(weights: Sequence[tuple[TunedWeight, Tensor]]) -> None:
    """Write what several weights mean to a tensor each (out, in), of any float dtype; on a CPU in parallel."""
    _run([(weight, work) for weight, out in weights if (work := weight._decoding(out)) is not None])


def learn_all(weights: Sequence[tuple[TunedWeight, Sequence[Tensor], bool]], fraction: float) -> None:
    """Let several weights ``learn`` from their gradients, and their ranges, too, where said; on a CPU in parallel."""
    works, sums = [], []
    for weight, gradients, _ in weights:
        lr, like = weight.lr * fraction, weight._divisor
        if weight._fused:
            groups, values, steps = weight._groups, weight._values, weight._steps
            for other in gradients[1:]:
                gradients[0].add_(other)
            sums.append(weight._fused.learn(groups, values, steps, gradients[0], lr, LARGEST_VALUE))
        else:
            sums.append((torch.empty_like(like), torch.empty_like(like)))
            works.append((weight, weight._learning(gradients, lr, sums[-1])))
    _run(works)
    for (weight, _, tune_scales), (by_scale, by_offset) in zip(weights, sums, strict=True):
        if tune_scales:
            weight.ranges.learn(by_scale, by_offset, weight.lr * fraction)


def _run(works: Sequence[tuple[TunedWeight, Rows]]) -> None:
    """Do the work on all rows of all weights; on a CPU in pieces, several at once."""
    pieces: list[tuple[Rows, int, int]] = []
    for weight, work in works:
        rows, columns = len(weight._groups), weight._groups[0].numel()
        step = max(1, PIECE // columns) if weight._groups.device.type == "cpu" else rows
        pieces += [(work, start, min(start + step, rows)) for start in range(0, rows, step)]

    def run(start: int, stop: int) -> None:
        for work, first, last in pieces[start:stop]:
            work(first, last)

    if pieces:
        on_cpu = works[0][0]._groups.device.type == "cpu"
        map_ranges(run, len(pieces), 1, piece=1 if on_cpu else len(pieces), join=True)


def grouped(weight: Tensor, group_size: int | None) -> Tensor:
    """Return ``weight`` (out, in) as float32 (out, groups, size) of its own, the short last group filled with its last weight."""
    size = min(group_size or weight.shape[1], weight.shape[1])
    groups = weight.float()
    if missing := -weight.shape[1] % size:
        groups = torch.cat((groups, groups[:, -1:].expand(-1, missing)), 1)
    elif groups.data_ptr() == weight.data_ptr():
        groups = groups.clone()
    return groups.contiguous().view(len(weight), -1, size)


def _fused(groups: Tensor, columns: int) -> ModuleType | None:
    """Return the module of the CUDA kernels where they serve these groups."""
    if groups.device.type != "cuda":
        return None
    from lowbit_autoround import fused

    return fused if fused.serves(groups, columns) else None


def _divisor(steps: Steps) -> Tensor:
    """Return the scales to divide by: 1 where a scale is 0, whose steps mean nothing."""
    return steps.scale.masked_fill(steps.scale == 0, 1.0)


def _rows(zero: Tensor | float, start: int, stop: int) -> Tensor | float:
    return zero[start:stop, :, None] if isinstance(zero, Tensor) else zero
