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
from lowbit_autoround.tuned_weight import TunedWeight, decode_all, learn_all

CHECKS = (0.8, 1.0)
"""When the state is compared with the best, as shares of all steps: each costs a forward pass over the subset."""
CHECKED_SHARE = 8
"""One of so many sequences is in the subset, but at least a batch of them."""
EVEN = 0.25
"""This part of all chances goes to all tokens alike, so that none with a small change and a large error counts too much when drawn."""
ROUNDS = 8
"""Chances above 1 are cut to it so often, and the others raised for it."""
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
    """Sequences in random order, each once before any comes again; what does not fill a batch at the end is dropped."""

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

    def draw(self, chances: Tensor) -> Tensor:
        """Return how much each token counts: 1 / chance for those drawn, else 0; each is drawn with its chance, in [0, 1].

        Systematic sampling: how many are drawn from any stretch of tokens differs from what is expected by less than one.
        """
        offset = torch.rand((), generator=self._generator, dtype=torch.float64)
        reached = chances.double().flatten().cumsum(0).add_(offset).floor_()
        drawn = torch.diff(reached, prepend=reached.new_zeros(1)) > 0
        return torch.where(drawn.view(chances.shape), 1 / chances, 0.0)


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
        self._hidden = runner.block.targets([0]).shape[-1]
        self._chances = self._token_chances() if schedule.tokens < 1 else None

    def run(self, tune_scales: Mapping[str, bool]) -> Outcome:
        """Tune, and return the best state. Raises NotFiniteError when a loss is NaN or infinite."""
        schedule = self._schedule
        self._decode()
        before = after = self._check(0)
        best, best_step = self._parts(), 0
        checks = {max(1, round(share * schedule.iters)) for share in CHECKS}
        seed = crc32(f"{schedule.seed}:{self._runner.block.name}".encode())
        batches = Batches(self._runner.block.samples, schedule.batch_size * schedule.accumulate, seed)
        with nullcontext() if self._chances is None else self._runner.skipping():
            for step in range(schedule.iters):
                gradients = self._gradients(batches, step)
                learn_all(
                    [(self._weights[name], found, tune_scales[name]) for name, found in gradients.items()],
                    1 - step / schedule.iters,
                )
                del gradients
                self._decode()
                if step + 1 in checks and (loss := self._check(step + 1)) < after:
                    best, after, best_step = self._parts(), loss, step + 1
        return Outcome(best, before, after, best_step)

    def _decode(self) -> None:
        decode_all([(weight, self._parameters[name].data) for name, weight in self._weights.items()])

    def _parts(self) -> dict[str, Parts]:
        return {name: weight.parts() for name, weight in self._weights.items()}

    def _gradients(self, batches: Batches, step: int) -> dict[str, list[Tensor]]:
        """Return gradients that add up to that of the next batch's mean squared error, at each weight that the batch reached."""
        batch = batches.next()
        if self._chances is not None:
            batch = self._runner.dealt(batch, self._chances)
        counted = self._counted(batch)
        gain = LOSS_GAIN / self._values(counted)
        if self._chances is not None:
            counted = batches.draw(self._chances[batch])
        chosen = dict(zip(batch, counted, strict=True))
        parameters = tuple(self._parameters.values())
        skip = self._chances is not None

        def work(piece: Sequence[int]) -> tuple[Tensor, tuple[Tensor | None, ...]]:
            tokens = torch.stack([chosen[sample] for sample in piece])
            with torch.enable_grad():
                loss = self._runner.squared_error(piece, tokens, self._schedule.trim, skip) * gain
                return loss.detach(), torch.autograd.grad(loss, parameters, allow_unused=True)

        held: dict[str, list[Tensor]] = {name: [] for name in self._parameters}
        losses = []
        for some in self._runner.rounds(batch):
            for gradients in held.values():
                _add_up(gradients)
            for loss, found in self._runner.each(work, some):
                losses.append(loss)
                for gradients, gradient in zip(held.values(), found, strict=True):
                    gradients += [] if gradient is None else [gradient]
        if self._runner.device.type == "cpu":  # elsewhere asking would wait for the device; the next check will tell
            _require_finite(step, float(torch.stack(losses).sum()))
        return {name: gradients for name, gradients in held.items() if gradients}

    def _check(self, step: int) -> float:
        """Return the mean squared error over the fixed subset, all its tokens."""

        def work(piece: Sequence[int]) -> float:
            with torch.no_grad():
                return float(self._runner.squared_error(piece, self._counted(piece), self._schedule.trim))

        loss = math.fsum(self._runner.each(work, self._checked)) / self._values(self._counted(self._checked))
        _require_finite(step, loss)
        return loss

    def _counted(self, index: Sequence[int]) -> Tensor:
        return self._runner.block.mask(index).float()

    def _token_chances(self) -> Tensor:
        """Return how likely a step counts each token, float32 (samples, seqlen): ``schedule.tokens`` of them on average.

        The more a token changes in the block, the larger its error, so that it is drawn more often and counts less each time: the
        expected gradient stays what it is, and differs less from step to step. Trimmed losses draw all alike, as they rank errors.
        """
        everything = range(self._runner.block.samples)
        counted = self._counted(everything)
        if self._schedule.trim:
            return chances(counted, self._schedule.tokens)
        changes = torch.cat(self._runner.each(self._runner.changes, everything))
        finite = torch.isfinite(changes)
        found = chances(torch.where(finite, changes, 0.0) * counted, self._schedule.tokens)
        return torch.where(finite, found, counted)  # a step shall meet what is not finite, and say so

    def _values(self, counted: Tensor) -> int:
        """Return how many output values belong to the tokens that count; at least 1."""
        return max(1, int(counted.sum()) * self._hidden)


def checked_samples(samples: int, batch_size: int) -> list[int]:
    """Return the subset on which states are compared, spread evenly over all samples."""
    count = min(samples, max(batch_size, samples // CHECKED_SHARE))
    return [place * samples // count for place in range(count)]


def chances(sizes: Tensor, share: float) -> Tensor:
    """Return chances in [0, 1], EVEN of them alike and the rest in proportion to ``sizes``, that add up to ``share`` of all sizes above 0."""
    there = sizes > 0
    wanted = share * float(there.sum())
    mixed = torch.where(there, EVEN * float(sizes.sum()) / max(1, int(there.sum())) + (1 - EVEN) * sizes, 0.0).double()
    found, certain = mixed, torch.zeros_like(there)
    for _ in range(ROUNDS):
        rest = torch.where(certain, 0.0, mixed)
        found = torch.where(certain, 1.0, rest * ((wanted - float(certain.sum())) / max(float(rest.sum()), 1e-30)))
        certain |= found >= 1
    return found.clamp_(0.0, 1.0).float()


def _add_up(gradients: list[Tensor]) -> None:
    """Leave one gradient, the sum in float32: what ``learn`` would find in the same order."""
    if len(gradients) > 1:
        total = gradients[0].float()
        for other in gradients[1:]:
            total.add_(other)
        gradients[:] = [total]


def _require_finite(step: int, loss: float) -> None:
    if not math.isfinite(loss):
        raise NotFiniteError(step, loss)
