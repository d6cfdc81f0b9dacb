"""``convert``: the main job. Carries out a plan one tensor at a time, reopens what it wrote, and compares.

Importer -> [dequantize] -> Quantizer -> QuantizedTensor -> Packer -> PackedTensor -> Exporter -> reopened, compared
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from torch import Tensor

import lowbit
from lowbit.errors import OutputError, SchemeError, VerificationError, WeightError
from lowbit.grids import dequantize
from lowbit.interfaces import DEFAULT_SHARD_SIZE, Calibration, Checkpoint, MatmulProblem, Metadata, Value
from lowbit.lift import lift
from lowbit.metrics import ErrorSum, compare, measure
from lowbit.parts import TensorSpec
from lowbit.plan import Action, Plan, Step, Target, make_plan
from lowbit.prefetch import prefetch
from lowbit.recipe import NOTHING, Recipe
from lowbit.registry import Registry
from lowbit.staging import check_destination, staged
from lowbit.tensors import PackedSpec, PackedTensor, raw_bytes


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one tensor: the step, and the error of the result against the source."""

    step: Step
    error: ErrorSum


@dataclass(frozen=True, slots=True)
class Report:
    """What a conversion did; every outcome was verified in the reopened destination."""

    plan: Plan
    outcomes: tuple[Outcome, ...]

    @property
    def error(self) -> ErrorSum:
        """The error over all tensors whose meaning the conversion touched (copies are exact)."""
        return sum((outcome.error for outcome in self.outcomes if outcome.step.action is not Action.COPY), ErrorSum())


Progress = Callable[[str, Step], None]
"""Called with ``"convert"`` or ``"verify"`` and a step, when the step is done."""


def convert(
    source: Path,
    destination: Path,
    target: Target,
    registry: Registry,
    recipe: Recipe = NOTHING,
    *,
    imatrix: Path | None = None,
    overwrite: bool = False,
    shard_size: int = DEFAULT_SHARD_SIZE,
    progress: Progress | None = None,
) -> Report:
    """Convert ``source`` to ``destination``, which appears complete and verified, or not at all.

    ``imatrix`` is an importance matrix for quantizers that weigh columns by it. Raises a LowbitError for everything that is the user's to solve, before any work where headers can tell.
    """
    check_destination(destination, overwrite)
    with registry.open(source) as checkpoint:
        calibration = registry.calibration(imatrix, checkpoint) if imatrix else {}
        plan = plan_conversion(checkpoint, target, recipe, registry, calibration)
        return execute(plan, checkpoint, destination, registry, calibration, overwrite, shard_size, progress)


def plan_conversion(
    checkpoint: Checkpoint,
    target: Target,
    recipe: Recipe,
    registry: Registry,
    calibration: Mapping[str, Calibration] = MappingProxyType({}),
) -> Plan:
    """Return the plan of a conversion: what ``--dry-run`` prints."""
    plan = make_plan(checkpoint, recipe, target, registry, calibration)
    return replace(plan, metadata=_with_provenance(plan, target))


def execute(
    plan: Plan,
    checkpoint: Checkpoint,
    destination: Path,
    registry: Registry,
    calibration: Mapping[str, Calibration] = MappingProxyType({}),
    overwrite: bool = False,
    shard_size: int = DEFAULT_SHARD_SIZE,
    progress: Progress | None = None,
) -> Report:
    """Carry out a plan. The destination is written beside its place, reopened, compared, and only then renamed there."""
    check_space(plan, destination)
    report = progress or (lambda phase, step: None)
    outcomes: list[Outcome] = []
    digests: dict[str, Future[bytes]] = {}

    def results() -> Generator[tuple[str, Value]]:
        work = _Work(registry, calibration)
        hashed: Future[bytes] | None = None
        with closing(prefetch(checkpoint.read(step.name) for step in plan.steps)) as values:
            for step, value in zip(plan.steps, values, strict=True):
                result, error = work.run(step, value)
                del value
                outcomes.append(Outcome(step, error))
                if hashed:
                    hashed.result()  # one result at a time waits for its hash, so that memory stays bounded
                hashed = digests[step.name] = hasher.submit(digest, result)
                yield step.name, result
                report("convert", step)

    with staged(destination, overwrite) as temporary, ThreadPoolExecutor(1, "lowbit-hash") as hasher:
        with closing(prefetch(results())) as stream:  # the next tensor is worked on while this one is written
            plan.exporter.write(temporary, plan.entries, stream, plan.metadata, shard_size)
        verify(temporary, plan, {name: done.result() for name, done in digests.items()}, registry, report)
    return Report(plan, tuple(outcomes))


def verify(
    written: Path,
    plan: Plan,
    digests: dict[str, bytes],
    registry: Registry,
    report: Progress = lambda phase, step: None,
) -> None:
    """Reopen ``written`` and raise VerificationError unless names, schemes and bytes are those that were meant."""
    with registry.open(written) as reopened:
        if missing := plan.entries.keys() ^ reopened.entries.keys():
            raise VerificationError(
                f"the written file does not hold the same tensors: {min(missing)} is in only one of them"
            )
        for step in plan.steps:
            if reopened.entries[step.name] != step.target:
                raise VerificationError(
                    f"{step.name} reads back as {reopened.entries[step.name]}, not as {step.target}"
                )
        names = list(reopened.entries)
        steps = {step.name: step for step in plan.steps}
        for name, value in zip(names, prefetch(map(reopened.read, names)), strict=True):
            if digest(value) != digests[name]:
                raise VerificationError(
                    f"{name} reads back with other bytes than were written; the disk may be failing"
                )
            report("verify", steps[name])


def _with_provenance(plan: Plan, target: Target) -> Metadata:
    """Add to the metadata how the weights were made: for people, and for whoever must repeat it."""
    choices = {f"{step.choice.quantizer.name}: {step.choice.options}" for step in plan.steps if step.choice}
    made = {"lowbit_version": lowbit.__version__, "format": target.format}
    if choices:
        made["quantizers"] = "; ".join(sorted(choices))
    return replace(plan.metadata, provenance={**plan.metadata.provenance, **made})


def check_space(plan: Plan, destination: Path) -> None:
    """Raise OutputError when the destination's disk cannot hold what the plan will write."""
    free = shutil.disk_usage(destination.parent).free
    if plan.nbytes > free:
        raise OutputError(
            f"{destination} needs {plan.nbytes:,} bytes and its disk has {free:,} free; free some space or choose another disk"
        )


def digest(value: Value) -> bytes:
    """Return the SHA-256 of a tensor's bytes, or of a packed tensor's buffers in the order of their names."""
    buffers = dict(sorted(value.buffers.items())) if isinstance(value, PackedTensor) else {"": value}
    total = hashlib.sha256()
    for name, buffer in buffers.items():
        total.update(name.encode())
        total.update(raw_bytes(buffer).numpy().data)
    return total.digest()


@dataclass(frozen=True, slots=True)
class _Work:
    """Carries out steps; one instance a conversion."""

    registry: Registry
    calibration: Mapping[str, Calibration]

    def run(self, step: Step, value: Value) -> tuple[Value, ErrorSum]:
        try:
            return self._run(step, value)
        except (WeightError, SchemeError) as error:
            raise type(error)(f"{step.name}: {error}") from error

    def _run(self, step: Step, value: Value) -> tuple[Value, ErrorSum]:
        if step.action is Action.QUANTIZE:
            return self._quantize(step, value)
        if step.action is Action.TRANSCODE:
            assert isinstance(value, PackedTensor)
            return self._transcode(step, value)
        if step.action is Action.COPY:
            return value, ErrorSum()
        assert isinstance(step.target, TensorSpec)
        floats = self._floats(value)
        result = floats.to(step.target.dtype)
        return result, compare(floats, result)

    def _quantize(self, step: Step, value: Value) -> tuple[Value, ErrorSum]:
        assert step.choice is not None
        weight = self._floats(value)
        quantizer, options = step.choice.quantizer, step.choice.options
        quantized = quantizer.quantize_block({step.name: weight}, {step.name: options}, self.calibration)[step.name]
        if isinstance(step.target, TensorSpec):
            result = dequantize(quantized).to(step.target.dtype)
            return result, compare(weight, result)
        assert step.packer is not None
        stored = lift(quantized, step.target.scheme)  # another scheme only where the format lacks the quantizer's own
        return step.packer.pack(stored), measure(weight, stored)

    def _transcode(self, step: Step, value: PackedTensor) -> tuple[Value, ErrorSum]:
        assert step.packer is not None
        assert isinstance(step.target, PackedSpec)
        quantized = self.registry.packers[value.layout].unpack(value)
        result = step.packer.pack(lift(quantized, step.target.scheme))
        return result, measure(dequantize(quantized), step.packer.unpack(result))

    def _floats(self, value: Value) -> Tensor:
        if not isinstance(value, PackedTensor):
            return value
        kernel = self.registry.reference_kernel(MatmulProblem(value.layout, value.scheme, value.shape))
        return kernel.dequantize(value)
