"""The work behind ``lowbit convert``: one conversion with its progress bar, or one and its copies in further formats."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import click

from lowbit.cli.calibration import BLOCK_WORK, bar_bytes, wishes_of
from lowbit.cli.console import progress_bar
from lowbit.errors import OptionError

if TYPE_CHECKING:
    from lowbit.calibration.wishes import Wishes
    from lowbit.convert import Report
    from lowbit.interfaces import Calibration, Checkpoint
    from lowbit.plan import Plan, Step, Target
    from lowbit.recipe import Recipe
    from lowbit.registry import Registry

SIZE_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
NOT_COPIED = MappingProxyType(
    {"dataset": None, "statistics": None, "save_imatrix": None, "imatrix": None, "resume": False}
)
"""What only the first of several formats needs: the others move its codes."""


@contextmanager
def planned(
    source: Path, target: Target, recipe: Recipe, flags: Mapping[str, Any], registry: Registry
) -> Iterator[tuple[Checkpoint, Plan, Mapping[str, Calibration], Wishes]]:
    """Open a source and plan its conversion, checked for the loader of ``--for``; yields what is known and wished of calibration too."""
    from lowbit.convert import known_calibration, open_source, plan_conversion

    with open_source(source, target, recipe, registry) as checkpoint:
        wishes = wishes_of(flags)
        known = known_calibration(checkpoint, registry, flags["imatrix"], wishes)
        plan = plan_conversion(checkpoint, target, recipe, registry, known, wishes)
        check(plan, target, flags, registry)
        yield checkpoint, plan, known, wishes


def run(
    source: Path,
    destination: Path,
    target: Target,
    recipe: Recipe,
    flags: Mapping[str, Any],
    registry: Registry,
    silent: bool,
    work: Path | None = None,
    also: Sequence[Target] = (),
) -> Report:
    """Convert, as the flags say; ``work`` is whose work directory a calibrated job uses, ``also`` what must be able to follow."""
    from lowbit.convert import calibrated, execute

    with planned(source, target, recipe, flags, registry) as (checkpoint, plan, known, wishes):
        followers(source, plan, also, flags, registry)
        with progress_bar(bar_bytes(plan, wishes, known), silent) as advance:

            def progress(phase: str, step: Step) -> None:
                size = {"calibrate": BLOCK_WORK * step.source.nbytes, "convert": step.source.nbytes}
                advance(size.get(phase, step.target.nbytes), f"{phase} {step.name}")

            def note(line: str) -> None:
                if not silent:
                    click.echo(line, err=True)

            place, shard_size = work or destination, shard_bytes(flags["shard_size"], plan, destination)
            with calibrated(plan, checkpoint, place, registry, known, wishes, note, progress) as finished:
                overwrite = flags["overwrite"]
                report = execute(
                    plan, checkpoint, destination, registry, known, overwrite, shard_size, progress, finished
                )
    if lost := report.plan.exporter.left_out(destination, report.plan.metadata):
        click.echo(f"Warning: {destination} has no place for {', '.join(lost)}; a folder as destination has.", err=True)
    return report


def followers(
    source: Path, plan: Plan, others: Sequence[Target], flags: Mapping[str, Any], registry: Registry
) -> list[Plan]:
    """Plan how the result of ``plan`` moves to further formats; raise NoRouteError where one cannot hold it."""
    from lowbit.convert import plan_conversion
    from lowbit.plan import PlannedCheckpoint
    from lowbit.recipe import NOTHING

    plans = []
    for other in others:
        plans.append(plan_conversion(PlannedCheckpoint(source, plan), other, NOTHING, registry))
        check(plans[-1], other, flags, registry)
    return plans


def run_several(
    source: Path,
    destination: Path,
    targets: Mapping[str, Target],
    recipe: Recipe,
    flags: Mapping[str, Any],
    registry: Registry,
    silent: bool,
) -> dict[str, Report]:
    """Convert to the first format, and move its codes to the others, exactly; ``destination`` gets a folder for each.

    Whether the others can hold the codes is known before any work. The destination appears with all of them, or not at all.
    """
    from lowbit.recipe import NOTHING
    from lowbit.staging import staged, sweep

    if flags["resume"]:
        sweep(destination)  # the work directory is this job's, so nobody else writes there
    (first, target), *others = targets.items()
    reports = {}
    with staged(destination, flags["overwrite"]) as folder:
        folder.mkdir()
        also = [other for _, other in others]
        reports[first] = run(source, folder / first, target, recipe, flags, registry, silent, destination, also)
        for name, other in others:
            reports[name] = run(
                folder / first, folder / name, other, NOTHING, {**flags, **NOT_COPIED}, registry, silent
            )
    return reports


def folder_names(formats: Sequence[str]) -> list[str]:
    """Return the folder of each format, ``gguf:q4_0`` in gguf-q4_0; raise OptionError for a format that is given twice."""
    names = [text.strip().replace(":", "-") for text in formats]
    if twice := [name for name in names if names.count(name) > 1]:
        raise OptionError(f"--format names {twice[0]} twice; give each format once")
    return names


def check(plan: Plan, target: Target, flags: Mapping[str, Any], registry: Registry) -> None:
    """Hold a plan against the rules of the program that will load the result, if ``--for`` names one."""
    from lowbit.loaders import check_loader

    if flags["loader"]:
        verdict = check_loader(flags["loader"], target.format, plan.entries, plan.metadata, registry, flags["tp"])
        for warning in verdict.warnings:
            click.echo(f"Warning: {warning}.", err=True)


def shard_bytes(text: str | None, plan: Plan, destination: Path) -> int:
    """Return the bytes of tensors in one file; raise OptionError where the destination is one file and would hold more."""
    from lowbit.interfaces import DEFAULT_SHARD_SIZE

    if text is None:
        return DEFAULT_SHARD_SIZE
    size, suffix = parse_size(text), plan.exporter.suffix
    if suffix and destination.suffix == suffix and plan.nbytes > size:
        raise OptionError(
            f"{destination} is one file and would hold {plan.nbytes:,} bytes, more than --shard-size {text}; give a folder, "
            f"such as {destination.with_suffix('')}, for several files"
        )
    return size


def parse_size(text: str) -> int:
    """Parse a size such as ``5GB``, ``200MB`` or a number of bytes; raises OptionError."""
    number = text.strip().upper().rstrip("KMGB")
    unit = text.strip().upper()[len(number) :]
    try:
        size = int(float(number) * SIZE_UNITS[unit])
    except (KeyError, ValueError):
        size = 0
    if size <= 0:
        raise OptionError(f"--shard-size must be a size such as 5GB or 200MB, got {text!r}")
    return size
