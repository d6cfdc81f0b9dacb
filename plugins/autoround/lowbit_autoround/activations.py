"""Running a block on its calibration sequences: piece by piece, so that results do not depend on the number of threads.

On a CPU a batch is cut into pieces of about PIECE_TOKENS tokens, by its shape alone. Each runs in one thread, forward and
backward, and the results are added in order. That is also faster than the same batch at once with all threads in every
operation: attention, norms and small products use all cores, too. Other devices run whole batches.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor, nn

from lowbit.calibration.block import Block
from lowbit.errors import OptionError
from lowbit.workers import map_ranges
from lowbit_autoround.token_wise import TokenWise

T = TypeVar("T")
PIECE_TOKENS = 512
HELD_SHARE = 0.25
"""Activations are kept on a device of their own for the whole block when they take at most this share of its free memory: gathering
and copying a batch takes longer than the step that it is for."""


class Runner:
    """Runs pieces of batches through a block, in bfloat16 autocast on CUDA devices that have it."""

    def __init__(self, block: Block, batch_size: int) -> None:
        self.block = block
        self.device = next(block.module.parameters()).device
        self.tokens = block.mask([0]).shape[1]
        on_cpu = self.device.type == "cpu"
        self._piece = max(1, PIECE_TOKENS // self.tokens) if on_cpu else batch_size
        self._inputs, self._targets = self._held(block.inputs), self._held(block.targets)
        self._token_wise = TokenWise(
            block.module, [block.module.get_submodule(path) for path in block.linears.values()]
        )

    def inputs(self, index: Sequence[int]) -> Tensor:
        """Return what the block receives for these samples, (len(index), seqlen, hidden) on the device."""
        return self.block.inputs(index).to(self.device) if self._inputs is None else _gather(self._inputs, index)

    def targets(self, index: Sequence[int]) -> Tensor:
        """Return what the float block gives for these samples, shaped and placed likewise."""
        return self.block.targets(index).to(self.device) if self._targets is None else _gather(self._targets, index)

    def _held(self, read: Callable[[Sequence[int]], Tensor]) -> Tensor | None:
        """Return all samples on the device, or None where that is the host or they take too much of it."""
        first, samples = read([0]), self.block.samples
        if self.device.type != "cuda" or self.block.resident:
            return None
        free = torch.cuda.mem_get_info(self.device)[0]
        if 2 * samples * first.numel() * first.element_size() > HELD_SHARE * free:
            return None
        held = torch.empty(samples, *first.shape[1:], dtype=first.dtype, device=self.device)
        for start in range(0, samples, self._piece):
            chosen = range(start, min(start + self._piece, samples))
            held[start : chosen.stop] = read(chosen)
        return held

    def each(self, work: Callable[[Sequence[int]], T], index: Sequence[int]) -> list[T]:
        """Return what ``work`` returns for each piece of the samples ``index``, in order; in parallel on a CPU."""
        pieces = [index[start : start + self._piece] for start in range(0, len(index), self._piece)]
        if self.device.type != "cpu":
            return [work(piece) for piece in pieces]
        return map_ranges(lambda start, stop: work(pieces[start]), len(pieces), 1, piece=1)

    def dealt(self, index: Sequence[int], chances: Tensor) -> list[int]:
        """Return ``index`` in an order whose pieces expect about as many tokens each, so that no thread waits for another.

        Sequences are dealt to the pieces in turn, those that expect most first, back and forth.
        """
        pieces = -(-len(index) // self._piece)
        expected = dict(zip(index, chances[list(index)].sum(1).tolist(), strict=True))
        order = sorted(index, key=lambda sample: -expected[sample])
        turns = [order[start : start + pieces] for start in range(0, len(order), pieces)]
        turns[1::2] = [turn[::-1] for turn in turns[1::2]]
        return [turn[place] for place in range(pieces) for turn in turns if place < len(turn)]

    def rounds(self, index: Sequence[int]) -> list[Sequence[int]]:
        """Return ``index`` in parts that keep all threads busy: what is held for each piece may be added up after each part."""
        pieces = 2 * torch.get_num_threads() if self.device.type == "cpu" else 1
        step = pieces * self._piece
        return [index[start : start + step] for start in range(0, len(index), step)]

    def _placed(self, tokens: Tensor) -> Tensor:
        """Return places of tokens on the device; from pinned memory, as another copy waits for what the device does."""
        return tokens.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tokens

    def precision(self) -> AbstractContextManager[object]:
        """Return the autocast context of the device."""
        if self.device.type == "cuda" and torch.cuda.is_bf16_supported():
            return torch.autocast("cuda", torch.bfloat16)
        return nullcontext()

    @contextmanager
    def skipping(self) -> Iterator[None]:
        """Let what treats tokens one by one skip those that do not count in ``squared_error``, where that is told to skip."""

        def run(hidden: Tensor) -> Tensor:
            with self.precision():
                return self.block.forward(hidden)

        with self._token_wise.skipping(run, self.inputs([0])):
            yield

    def changes(self, index: Sequence[int]) -> Tensor:
        """Return how far the block moves each token, by the root of the sum of squares, float32 (len(index), seqlen) on the CPU."""
        return (self.targets(index).float() - self.inputs(index).float()).square().sum(-1).sqrt().cpu()

    def squared_error(self, index: Sequence[int], counted: Tensor, trim: float, skip: bool = False) -> Tensor:
        """Return the sum of squared output errors over some tokens, float32.

        Args:
            index: Samples.
            counted: How much each token counts, float32 (len(index), seqlen) on the CPU.
            trim: Share of the errors of the tokens that count, the largest, that is left out.
            skip: Whether to compute no more of the other tokens than these need.
        """
        counted = counted.flatten()
        tokens = self._placed(counted.nonzero()[:, 0])
        with self.precision(), self._token_wise.only(tokens if skip else None):
            output = self.block.forward(self.inputs(index)).flatten(0, 1)
        targets = self.targets(index).flatten(0, 1)
        if len(tokens) < len(output):
            output, targets = output.index_select(0, tokens), targets.index_select(0, tokens)
        error = output.float() - targets.float()
        if trim and (dropped := int(trim * error.numel())):
            sizes = error.detach().abs().flatten()
            error = error.masked_fill((sizes >= torch.topk(sizes, dropped).values[-1]).view_as(error), 0.0)
        if bool((counted == 1).all()):
            return error.square().sum()
        return error.square().sum(-1) @ self._placed(counted)[tokens]


def _gather(states: Tensor, index: Sequence[int]) -> Tensor:
    return torch.stack([states[sample] for sample in index])  # a list as index would be copied to the device first


@contextmanager
def borrowed_weights(block: Block, shapes: Mapping[str, torch.Size]) -> Iterator[dict[str, nn.Parameter]]:
    """Put parameters with gradients in place of the named weights, and give the module back as it was.

    Raises OptionError for a weight that no linear layer of the block holds in this shape.
    """
    linears = {name: _linear(block, name, shape) for name, shape in shapes.items()}
    originals = {name: linear.weight for name, linear in linears.items()}
    frozen = [(parameter, parameter.requires_grad) for parameter in block.module.parameters()]
    borrowed = {name: nn.Parameter(torch.empty_like(weight.data)) for name, weight in originals.items()}
    try:
        for parameter, _ in frozen:
            parameter.requires_grad_(False)
        for name, linear in linears.items():
            linear.weight = borrowed[name]
        yield borrowed
    finally:
        for name, linear in linears.items():
            linear.weight = originals[name]
        for parameter, flag in frozen:
            parameter.requires_grad_(flag)


def measure_importance(runner: Runner, index: Sequence[int], names: Sequence[str]) -> dict[str, Tensor]:
    """Return the mean square of each input column of the named linears, float32 (in,), over some samples.

    A linear that no token reaches (an expert) is left out.
    """
    current = threading.local()
    linears = {name: runner.block.module.get_submodule(runner.block.linears[name]) for name in names}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = args[0].detach().float().flatten(0, -2)
            total, count = current.sums.get(name, (0.0, 0))
            current.sums[name] = (total + rows.square().sum(0), count + len(rows))

        return hook

    def work(piece: Sequence[int]) -> dict[str, tuple[Tensor, int]]:
        current.sums = {}
        with torch.no_grad(), runner.precision():
            runner.block.forward(runner.inputs(piece))
        return dict(current.sums)

    handles = [linear.register_forward_pre_hook(watch(name)) for name, linear in linears.items()]
    try:
        found = runner.each(work, index)
    finally:
        for handle in handles:
            handle.remove()
    return {name: mean for name in names if (mean := _mean([sums[name] for sums in found if name in sums])) is not None}


def _mean(sums: Sequence[tuple[Tensor, int]]) -> Tensor | None:
    count = sum(rows for _, rows in sums)
    return torch.stack([total for total, _ in sums]).sum(0) / count if count else None


def _linear(block: Block, name: str, shape: torch.Size) -> nn.Linear:
    path = block.linears.get(name)
    linear = block.module.get_submodule(path) if path is not None else None
    weight = getattr(linear, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.shape != shape:
        raise OptionError(
            f"{name} is no linear layer of its own in {block.name}, so that autoround cannot tune it; "
            f"round it to nearest with a rule {name}=autoround,recipe=rtn"
        )
    assert isinstance(linear, nn.Module)
    return linear  # type: ignore[return-value]  # anything that multiplies by its weight will do
