"""Runs the blocks of a model one after the other: each is filled, measured, quantized, run, and emptied again."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.calibration.block import Block
from lowbit.calibration.capture import Call, capture, embed
from lowbit.calibration.chains import Chain
from lowbit.calibration.skeleton import Filling, Skeleton
from lowbit.calibration.statistics import Statistics
from lowbit.errors import SchemeError, WeightError
from lowbit.grids import dequantize
from lowbit.interfaces import Calibration, Checkpoint, Quantizer
from lowbit.metrics import ErrorSum, measure
from lowbit.plan import measured
from lowbit.recipe import Choice
from lowbit.registry import Registry
from lowbit.tensors import QuantizedTensor

Note = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class _Visit:
    """A filled block while it is worked on: its number, its chosen linears, and how it is called."""

    number: int
    name: str
    module: nn.Module
    linears: Mapping[str, str]
    call: Call

    def run(self, hidden: Tensor, samples: range) -> Tensor:
        """Run the block as it is now."""
        return self.call.run(self.module, hidden)


class CapturedBlock(Block):
    """A filled block and the two chains: the inputs of the quantized model, the outputs of the float one."""

    def __init__(self, visit: _Visit, weights: Sequence[str], chains: Chains, note: Note) -> None:
        self.name, self.module, self._call, self._note = visit.name, visit.module, visit.call, note
        self.linears = {weight: visit.linears[weight] for weight in weights}
        assert chains.quantized is not None
        self._inputs, self._targets, self._device = chains.quantized, chains.floating, chains.device
        self.samples = len(self._inputs.states)
        self.resident = all(chain.states.device == chains.device for chain in (self._inputs, self._targets))

    def inputs(self, index: Sequence[int]) -> Tensor:
        """Return the quantized model's hidden states before the block."""
        return self._inputs.gather(index, self._device)

    def targets(self, index: Sequence[int]) -> Tensor:
        """Return the float model's hidden states behind the block."""
        return self._targets.gather(index, self._device)

    def mask(self, index: Sequence[int]) -> Tensor:
        """Every token counts: samples are cut from running text, none is padded."""
        return torch.ones(len(index), self._inputs.shape[1], dtype=torch.bool)

    def forward(self, hidden: Tensor) -> Tensor:
        """Run the module as the model does."""
        return self._call.run(self.module, hidden)

    def log(self, text: str) -> None:
        """Show a line, with the block's name before it."""
        self._note(f"{self.name}: {text}")


@dataclass(slots=True)
class Chains:
    """The activations that are carried from block to block.

    Attributes:
        floating: Of the float model.
        quantized: Of the quantized model; None when no quantizer asks for block inputs.
        device: Where blocks run.
    """

    floating: Chain
    quantized: Chain | None
    device: torch.device

    @property
    def nbytes(self) -> int:
        """Bytes of all activations."""
        return sum(chain.states.nbytes for chain in (self.floating, self.quantized) if chain is not None)


@dataclass(frozen=True, slots=True)
class Finished:
    """A block that is done: codes and float weights, on the CPU, by tensor name, and the relative error of its output.

    ``errors`` are those of the weights, measured where the block ran; none when that is the CPU: packing will, piece by piece.
    """

    name: str
    quantized: Mapping[str, QuantizedTensor]
    weights: Mapping[str, Tensor]
    calibration: Mapping[str, Calibration]
    error: float | None = None
    errors: Mapping[str, ErrorSum] = field(default_factory=dict)


@dataclass(slots=True)
class BlockRunner:
    """Quantizes the linears of decoder blocks with what ``choices`` say, in the order of the blocks.

    Attributes:
        skeleton: The model.
        choices: By tensor name; tensors outside of blocks are not looked at.
        tokens: Calibration samples, int64 (samples, seqlen).
        batch_size: Samples that run through a block at once.
        weighs: Give importance to quantizers that need nothing, too.
        records: Measure importance for every chosen weight, though its quantizer is not given it.
        known: What was measured before, by tensor; it is not measured again.
        folder: Where activations are kept when memory shall not hold them.
        note: Is told a line about each block.
    """

    skeleton: Skeleton
    choices: Mapping[str, Choice]
    tokens: Tensor
    batch_size: int = 8
    weighs: bool = False
    records: bool = False
    known: Mapping[str, Calibration] = field(default_factory=dict)
    folder: Path | None = None
    note: Note = lambda text: None

    def start(self) -> Chains:
        """Return the chains before the first block."""
        floating = embed(self.skeleton, self.tokens, self.batch_size, self._file("float", 0))
        quantized = floating.copy(self._file("quantized", 0), self.skeleton.device) if self.carries else None
        return Chains(floating, quantized, self.skeleton.device)

    @property
    def carries(self) -> bool:
        """Whether any quantizer needs the block's inputs, and so the quantized chain."""
        return any("block_inputs" in self._needs(name) for name in self.choices)

    def run(self, chains: Chains | None = None, first: int = 0) -> Iterator[Finished]:
        """Yield every block when it is done, from block ``first`` on; ``chains`` are its inputs, and are advanced in place."""
        calls = capture(self.skeleton, self.tokens)
        chains = chains or self.start()
        blocks = list(enumerate(self.skeleton.blocks))[first:]
        with closing(self._fillings([name for _, name in blocks])) as fillings:
            for number, name in blocks:
                yield self._block(number, name, chains, calls[name], partial(next, fillings))

    def _fillings(self, names: Sequence[str]) -> Generator[Filling]:
        """Yield what fills the blocks; where they run on a GPU the next one is read meanwhile, never more. None is kept here."""
        if self.skeleton.device.type == "cpu":
            for name in names:
                yield self.skeleton.read(name)
            return
        with ThreadPoolExecutor(1, "lowbit-read") as reader:
            ahead = deque(reader.submit(self.skeleton.read, name) for name in names[:1])
            for name in names[1:]:
                wait(ahead)
                ahead.append(reader.submit(self.skeleton.read, name))
                yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()

    def _block(self, number: int, name: str, chains: Chains, call: Call, filling: Callable[[], Filling]) -> Finished:
        linears = {weight: path for weight, path in self.skeleton.linears(name).items() if weight in self.choices}
        with self.skeleton.filled(name, filling=filling) as module:
            visit = _Visit(number, name, module, linears, call)
            calibration = self._measure(visit, chains)
            weights = {weight: self.skeleton.source_weight(weight) for weight in linears}
            found = self._quantize(visit, chains, weights, calibration)
            errors = self._errors(visit, weights, found)
            error = self._carry(visit, chains, found)
        quantized = {weight: _to_cpu(found[weight]) for weight in linears}
        return Finished(name, quantized, weights, calibration, error, errors)

    def _measure(self, visit: _Visit, chains: Chains) -> dict[str, Calibration]:
        """Advance the float chain, and gather statistics of the float model's activations on the way."""
        wanted = {name: self._wanted(name) for name in visit.linears}
        watched = {name: path for name, path in visit.linears.items() if wanted[name]}
        hessian = frozenset(name for name in watched if "hessian" in wanted[name])
        statistics = Statistics(visit.module, watched, hessian)
        file = self._file("float", visit.number + 1)
        with statistics.gathering(), torch.no_grad():
            chains.floating = chains.floating.advance(visit.run, self.batch_size, chains.device, file)
        found = statistics.results(self.note)
        if missed := sorted(watched.keys() - found.keys()):
            raise WeightError(
                f"{missed[0]}: no calibration token reached this layer; give more samples, or leave it out by a rule"
            )
        return {name: merged(self.known.get(name), found.get(name)) for name in visit.linears}

    def _quantize(
        self, visit: _Visit, chains: Chains, weights: Mapping[str, Tensor], calibration: Mapping[str, Calibration]
    ) -> dict[str, QuantizedTensor]:
        found: dict[str, QuantizedTensor] = {}
        for names in _by_quantizer({name: self.choices[name] for name in visit.linears}):
            quantizer = self.choices[names[0]].quantizer
            block = None
            if any("block_inputs" in self._needs(weight) for weight in names):
                block = CapturedBlock(visit, names, chains, self.note)
            placed = {weight: _placed(visit, weight, weights[weight]) for weight in names}
            options = {weight: self.choices[weight].options for weight in names}
            handed = {weight: self._handed(weight, calibration[weight]) for weight in names}
            try:
                found |= quantizer.quantize_block(placed, options, handed, block)
            except (WeightError, SchemeError) as error:
                raise type(error)(f"{visit.name}: {error}") from error
        return found

    def _errors(
        self, visit: _Visit, weights: Mapping[str, Tensor], found: Mapping[str, QuantizedTensor]
    ) -> dict[str, ErrorSum]:
        """Measure codes that are on another device than the CPU, against the weights of the checkpoint."""
        if self.skeleton.device.type == "cpu":
            return {}
        return {weight: measure(_placed(visit, weight, weights[weight]), found[weight]) for weight in visit.linears}

    def _carry(self, visit: _Visit, chains: Chains, found: Mapping[str, QuantizedTensor]) -> float | None:
        """Advance the quantized chain through the block with its new weights; return its distance from the float chain."""
        if chains.quantized is None:
            return None
        for name, path in visit.linears.items():
            linear = visit.module.get_submodule(path)
            assert isinstance(linear, nn.Linear)
            linear.weight = nn.Parameter(dequantize(found[name]).to(linear.weight), requires_grad=False)
        total = ErrorSum()

        def run(hidden: Tensor, samples: range) -> Tensor:
            nonlocal total
            result = visit.run(hidden, samples)
            target = chains.floating.gather(samples, chains.device).double()
            squared, reference = (result.double() - target).square().sum(), target.square().sum()
            total += ErrorSum(False, 0.0, float(squared), float(reference))
            return result

        with torch.no_grad():
            file = self._file("quantized", visit.number + 1)
            chains.quantized = chains.quantized.advance(run, self.batch_size, chains.device, file)
        if not math.isfinite(total.squared + total.reference):
            raise WeightError(
                f"{visit.name}: the outputs of this block are NaN or infinite in calibration; leave its largest layers out by "
                "rules, or check that the checkpoint runs"
            )
        return total.relative

    def _needs(self, name: str) -> frozenset[str]:
        choice = self.choices[name]
        return choice.quantizer.needs_for(choice.options)

    def _given(self, name: str) -> frozenset[str]:
        """Return what the quantizer of a weight is given."""
        return self._needs(name) or (frozenset({"importance"}) if self.weighs else frozenset())

    def _wanted(self, name: str) -> frozenset[str]:
        """Return what must be measured for a weight."""
        wanted = self._given(name) | (frozenset({"importance"}) if self.records else frozenset())
        return (wanted & {"importance", "hessian"}) - measured(self.known, name)

    def _handed(self, name: str, found: Calibration) -> Calibration:
        """Return what the quantizer sees: what was known before, and what it is given."""
        given, known = self._given(name), self.known.get(name, Calibration())
        importance = found.importance if "importance" in given else known.importance
        return Calibration(importance, found.hessian if "hessian" in given else known.hessian)

    def _file(self, chain: str, number: int) -> Path | None:
        return self.folder / f"{chain}-{number}.bin" if self.folder else None


def run_blocks(
    checkpoint: Checkpoint,
    choices: Mapping[str, Choice],
    tokens: Tensor,
    registry: Registry,
    *,
    batch_size: int = 8,
    device: str = "cpu",
    note: Note = lambda text: None,
) -> Iterator[Finished]:
    """Yield every decoder block of an open checkpoint, quantized; ``BlockRunner`` with its defaults.

    Args:
        checkpoint: Of any format; packed weights are dequantized.
        choices: By tensor name, as ``Recipe.choose`` returns them.
        tokens: int64 (samples, seqlen).
        registry: Components.
        batch_size: Samples that run through a block at once.
        device: Where blocks run: in float32 on a CPU, else in bfloat16.
        note: Is told a line about each block.
    """
    place = torch.device(device)
    skeleton = Skeleton(checkpoint, registry, place, compute_dtype(place))
    yield from BlockRunner(skeleton, choices, tokens, batch_size, note=note).run()


def compute_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype in which blocks run: float32 on a CPU; bfloat16 elsewhere, which has float32's range."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def merged(known: Calibration | None, found: Calibration | None) -> Calibration:
    """Return what either measured; ``known`` first."""
    known, found = known or Calibration(), found or Calibration()
    importance = found.importance if known.importance is None else known.importance
    return Calibration(importance, found.hessian if known.hessian is None else known.hessian)


def _placed(visit: _Visit, name: str, weight: Tensor) -> Tensor:
    """Return a weight on the device: the block's own, where it computes in the dtype of the checkpoint."""
    own = visit.module.get_submodule(visit.linears[name]).weight
    assert isinstance(own, nn.Parameter)
    return own.detach() if own.dtype == weight.dtype else weight.to(own.device)


def _by_quantizer(choices: Mapping[str, Choice]) -> list[list[str]]:
    """Return names that share a quantizer, together."""
    groups: dict[Quantizer[Any], list[str]] = {}
    for name, choice in choices.items():
        groups.setdefault(choice.quantizer, []).append(name)
    return list(groups.values())


def _to_cpu(quantized: QuantizedTensor) -> QuantizedTensor:
    parts = {name: _fetched(part) for name, part in quantized.parts.items()}
    return QuantizedTensor(quantized.scheme, quantized.shape, parts)


def _fetched(part: Tensor) -> Tensor:
    """Return ``part`` on the CPU; from a GPU into page-locked memory, which torch keeps for the next block: the GPU waits meanwhile."""
    if part.device.type != "cuda":
        return part.cpu()
    return torch.empty(part.shape, dtype=part.dtype, pin_memory=True).copy_(part)
