"""``convert``: the main job. Carries out a plan one tensor at a time, reopens what it wrote, and compares.

Importer -> [dequantize] -> Quantizer -> QuantizedTensor -> Packer -> PackedTensor -> Exporter -> reopened, compared
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import torch

import lowbit
from lowbit import memory
from lowbit.budget import within_budget
from lowbit.calibration.wishes import Wishes
from lowbit.card import command_line, fingerprint, write_card
from lowbit.checksum import checksum
from lowbit.errors import OutputError, VerificationError
from lowbit.fold import fold_act_order
from lowbit.interfaces import DEFAULT_SHARD_SIZE, Calibration, Checkpoint, Value
from lowbit.metadata import Metadata
from lowbit.metrics import ErrorSum
from lowbit.plan import Action, Plan, Step, Target, make_plan
from lowbit.prefetch import prefetch
from lowbit.recipe import NOTHING, Recipe
from lowbit.registry import Registry
from lowbit.staging import check_destination, staged
from lowbit.work import Work
from lowbit.workers import map_each


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
    calibrating: Wishes | None = None,
    overwrite: bool = False,
    shard_size: int = DEFAULT_SHARD_SIZE,
    progress: Progress | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> Report:
    """Convert ``source`` to ``destination``, which appears complete and verified, or not at all.

    Args:
        source: A checkpoint of any installed format.
        destination: What to write.
        target: Format, variant and dtype.
        registry: Components.
        recipe: What to quantize, and how.
        imatrix: An importance matrix for quantizers that weigh columns by it.
        calibrating: What to calibrate on where a quantizer needs measurements that ``imatrix`` does not hold; None refuses it.
        overwrite: Replace the destination.
        shard_size: Most bytes of tensors in one file.
        progress: Told when a step is done.
        note: Told a line about each decoder block that was calibrated.

    Raises a LowbitError for everything that is the user's to solve, before any work where headers can tell.
    """
    check_destination(destination, overwrite)
    with open_source(source, target, recipe, registry) as checkpoint:
        known = known_calibration(checkpoint, registry, imatrix, calibrating)
        plan = plan_conversion(checkpoint, target, recipe, registry, known, calibrating)
        report = progress or (lambda phase, step: None)
        with calibrated(plan, checkpoint, destination, registry, known, calibrating, note, report) as finished:
            return execute(plan, checkpoint, destination, registry, known, overwrite, shard_size, progress, finished)


def open_source(source: Path, target: Target, recipe: Recipe, registry: Registry) -> Checkpoint:
    """Open a checkpoint; where codes are moved, what act-order the format lacks is folded into neighbours if it can be."""
    checkpoint = registry.open(source)
    try:
        return checkpoint if recipe.quantizes else fold_act_order(checkpoint, target.format, registry)
    except BaseException:
        checkpoint.close()
        raise


def known_calibration(
    checkpoint: Checkpoint, registry: Registry, imatrix: Path | None, calibrating: Wishes | None
) -> Mapping[str, Calibration]:
    """Return what an importance matrix and a file of statistics say of the weights, by tensor."""
    importance = registry.calibration(imatrix, checkpoint) if imatrix else {}
    if calibrating is None or calibrating.statistics is None or not calibrating.statistics.exists():
        return importance
    from lowbit.calibration.measured import StatisticsFile

    return StatisticsFile(calibrating.statistics, checkpoint).beside(importance)


def plan_conversion(
    checkpoint: Checkpoint,
    target: Target,
    recipe: Recipe,
    registry: Registry,
    calibration: Mapping[str, Calibration] = MappingProxyType({}),
    calibrating: Wishes | None = None,
) -> Plan:
    """Return the plan of a conversion: what ``--dry-run`` prints."""
    recipe = within_budget(recipe, checkpoint, target, registry, calibration)
    collects, weighs = (calibrating.collects, calibrating.weighs) if calibrating else (frozenset(), False)
    plan = make_plan(checkpoint, recipe, target, registry, calibration, collects, weighs)
    said = {"source_fingerprint": fingerprint(checkpoint.path), "command": command_line(target, recipe)}
    return replace(plan, metadata=_with_provenance(plan, target, said))


@contextmanager
def calibrated(
    plan: Plan,
    checkpoint: Checkpoint,
    destination: Path,
    registry: Registry,
    known: Mapping[str, Calibration],
    calibrating: Wishes | None,
    note: Callable[[str], None],
    progress: Progress,
) -> Iterator[Mapping[str, tuple[Value, ErrorSum]]]:
    """Yield the weights that calibration has quantized, with their errors: none when the plan needs no calibration."""
    if calibrating is None or not any(calibrating.concerns(step, known) for step in plan.steps):
        yield {}
        return
    from lowbit.calibration.job import Job

    job = Job(plan, checkpoint, destination, registry, known, calibrating, note, progress)
    with job.running() as results:
        yield results


def execute(
    plan: Plan,
    checkpoint: Checkpoint,
    destination: Path,
    registry: Registry,
    calibration: Mapping[str, Calibration] = MappingProxyType({}),
    overwrite: bool = False,
    shard_size: int = DEFAULT_SHARD_SIZE,
    progress: Progress | None = None,
    finished: Mapping[str, tuple[Value, ErrorSum]] = MappingProxyType({}),
) -> Report:
    """Carry out a plan. The destination is written beside its place, reopened, compared, and only then renamed there.

    ``finished`` holds tensors that calibration has quantized already, with their errors.
    """
    check_space(plan, destination)
    report = progress or (lambda phase, step: None)
    outcomes: list[Outcome] = []
    digests: dict[str, Future[bytes]] = {}

    def results() -> Generator[tuple[str, Value]]:
        work = Work(registry, calibration)
        hashed: Future[bytes] | None = None
        reads = (None if step.name in finished else checkpoint.read(step.name) for step in plan.steps)
        with closing(prefetch(reads)) as values:
            for step, value in zip(plan.steps, values, strict=True):
                result, error = finished[step.name] if value is None else work.run(step, value)
                del value
                outcomes.append(Outcome(step, error))
                if hashed:
                    hashed.result()  # one result at a time waits for its hash, so that memory stays bounded
                hashed = digests[step.name] = hasher.submit(checksum, result)
                yield step.name, result
                report("convert", step)

    workers = ThreadPoolExecutor(1, "lowbit-hash")
    with memory.reused(), staged(destination, overwrite) as temporary, workers as hasher:
        with closing(prefetch(results())) as stream:  # the next tensor is worked on while this one is written
            plan.exporter.write(temporary, plan.entries, stream, plan.metadata, shard_size)
        found = {name: done.result() for name, done in digests.items()}
        if temporary.is_dir():
            write_card(temporary, plan, outcomes, found)
        verify(temporary, plan, found, registry, report)
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
        for name, found in zip(names, map_each(lambda name: checksum(reopened.read(name)), names), strict=True):
            if found != digests[name]:
                raise VerificationError(
                    f"{name} reads back with other bytes than were written; the disk may be failing"
                )
            report("verify", steps[name])


def _with_provenance(plan: Plan, target: Target, said: Mapping[str, str]) -> Metadata:
    """Add to the metadata how the weights were made: for people, and for whoever must repeat it."""
    choices = {f"{step.choice.quantizer.name}: {step.choice.options}" for step in plan.steps if step.choice}
    made = {**said, "lowbit_version": lowbit.__version__, "torch_version": torch.__version__, "format": target.format}
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
