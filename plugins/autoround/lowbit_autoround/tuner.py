"""AutoRound's tuning of a decoder block: rounding values and ranges by signed gradient descent on the block's output error.

A step runs a batch of calibration sequences through the block with its decoded low-bit weights, compares the outputs with those
of the float block, and moves every learned number by the step size against the sign of its gradient; the step size falls
linearly to zero (SignRound, arXiv 2309.05516; auto-round 0.16.1, sign_round/quantizer.py). Where auto-round keeps the state of
least loss on the passing batch, which rewards easy batches, the state kept here is the best on a fixed subset of the
sequences, tried at the CHECKS: the last step's, too, and the first, so that tuning never ends worse there than rounding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from zlib import crc32

import torch
from torch import Tensor, nn

from lowbit_autoround.activations import Runner
from lowbit_autoround.ranges import Parts
from lowbit_autoround.tuned_weight import TunedWeight

CHECKS = (0.5, 0.7, 0.85, 1.0)
"""When the state is compared with the best, as shares of all steps: each costs a forward pass over the subset."""
CHECKED_SHARE = 8
"""One of so many sequences is in the subset, but at least a batch of them."""
LOSS_GAIN = 1000.0
"""Gradients of float16 weights would vanish without; signs do not mind."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """What one block's tuning needs to know besides its weights."""

    iters: int
    batch_size: int
    accumulate: int
    tokens: float
    trim: float
    seed: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """The best state found: parts of every weight, mean squared errors before and after, and the step it was found at."""

    parts: Mapping[str, Parts]
    before: float
    after: float
    step: int


class NotFiniteError(Exception):
    """The loss became NaN or infinite at ``step``."""

    def __init__(self, step: int, loss: float) -> None:
        super().__init__(step, loss)
        self.step, self.loss = step, loss


class Batches:
    """Sequences in random order, each once before any comes again; what does not fill a batch at the end is dropped.

    With each batch comes the share of the tokens, drawn at random in every sequence, that its loss counts.
    """

    def __init__(self, samples: int, size: int, seed: int) -> None:
        self._samples, self._size = samples, min(size, samples)
        self._generator = torch.Generator().manual_seed(seed)
        self._waiting: list[int] = []

    def next(self) -> list[int]:
        """Return the next batch."""
        if len(self._waiting) < self._size:
            self._waiting = torch.randperm(self._samples, generator=self._generator).tolist()
        batch, self._waiting = self._waiting[: self._size], self._waiting[self._size :]
        return batch

    def draw(self, sequences: int, length: int, share: float) -> Tensor:
        """Return a random choice of ``share`` of the tokens of each sequence, bool (sequences, length)."""
        order = torch.rand(sequences, length, generator=self._generator).argsort(1)
        return order < max(1, round(share * length))


class Tuner:
    """Tunes weights that stand in for those of a block (``parameters``, by name)."""

    def __init__(
        self,
        runner: Runner,
        weights: Mapping[str, TunedWeight],
        parameters: Mapping[str, nn.Parameter],
        schedule: Schedule,
    ) -> None:
        self._runner, self._weights, self._schedule = runner, weights, schedule
        self._parameters = {name: parameters[name] for name in weights}
        self._checked = checked_samples(runner.block.samples, schedule.batch_size)
        self._skips, self._hidden = schedule.tokens < 1, runner.block.targets([0]).shape[-1]

    def run(self, tune_scales: Mapping[str, bool]) -> Outcome:
        """Tune, and return the best state. Raises NotFiniteError when a loss is NaN or infinite."""
        schedule = self._schedule
        self._decode()
        before = after = self._check(0)
        best, best_step = self._parts(), 0
        checks = {max(1, round(share * schedule.iters)) for share in CHECKS}
        seed = crc32(f"{schedule.seed}:{self._runner.block.name}".encode())
        batches = Batches(self._runner.block.samples, schedule.batch_size * schedule.accumulate, seed)
        with self._runner.skipping() if self._skips else nullcontext():
            for step in range(schedule.iters):
                gradients = self._gradients(batches, step)
                for name, gradient in gradients.items():
                    self._weights[name].learn(gradient, 1 - step / schedule.iters, tune_scales[name])
                del gradients
                self._decode()
                if step + 1 in checks and (loss := self._check(step + 1)) < after:
                    best, after, best_step = self._parts(), loss, step + 1
        return Outcome(best, before, after, best_step)

    def _decode(self) -> None:
        for name, weight in self._weights.items():
            weight.decode(self._parameters[name].data)

    def _parts(self) -> dict[str, Parts]:
        return {name: weight.parts() for name, weight in self._weights.items()}

    def _gradients(self, batches: Batches, step: int) -> dict[str, Tensor]:
        """Return the gradient of the next batch's mean squared error at each weight that the batch reached."""
        batch = batches.next()
        counted = self._counted(batch)
        if self._schedule.tokens < 1:
            counted &= batches.draw(len(batch), self._runner.tokens, self._schedule.tokens)
        gain = LOSS_GAIN / self._values(counted)
        chosen = dict(zip(batch, counted, strict=True))
        parameters = tuple(self._parameters.values())

        def work(piece: Sequence[int]) -> tuple[Tensor, tuple[Tensor | None, ...]]:
            tokens = torch.stack([chosen[sample] for sample in piece])
            with torch.enable_grad():
                loss = self._runner.squared_error(piece, tokens, self._schedule.trim, skip=self._skips) * gain
                return loss.detach(), torch.autograd.grad(loss, parameters, allow_unused=True)

        total: list[Tensor | None] = [None] * len(parameters)
        losses = []
        for loss, gradients in self._runner.each(work, batch):
            losses.append(loss)
            for place, gradient in enumerate(gradients):
                if gradient is not None:
                    held = total[place]
                    total[place] = gradient if held is None else held.add_(gradient)
        if self._runner.device.type == "cpu":  # elsewhere asking would wait for the device; the next check will tell
            _require_finite(step, float(torch.stack(losses).sum()))
        return {name: gradient for name, gradient in zip(self._parameters, total, strict=True) if gradient is not None}

    def _check(self, step: int) -> float:
        """Return the mean squared error over the fixed subset, all its tokens."""

        def work(piece: Sequence[int]) -> float:
            with torch.no_grad():
                return float(self._runner.squared_error(piece, self._counted(piece), self._schedule.trim))

        loss = math.fsum(self._runner.each(work, self._checked)) / self._values(self._counted(self._checked))
        _require_finite(step, loss)
        return loss

    def _counted(self, index: Sequence[int]) -> Tensor:
        return self._runner.block.mask(index).clone()

    def _values(self, counted: Tensor) -> int:
        """Return how many output values belong to the tokens that count; at least 1."""
        return max(1, int(counted.sum()) * self._hidden)


def checked_samples(samples: int, batch_size: int) -> list[int]:
    """Return the subset on which states are compared, spread evenly over all samples."""
    count = min(samples, max(batch_size, samples // CHECKED_SHARE))
    return [place * samples // count for place in range(count)]


def _require_finite(step: int, loss: float) -> None:
    if not math.isfinite(loss):
        raise NotFiniteError(step, loss)
