"""Options of ``lowbit convert`` for quantizers that look at activations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from lowbit.calibration.wishes import Wishes
    from lowbit.interfaces import Calibration
    from lowbit.plan import Plan
    from lowbit.registry import Registry

F = TypeVar("F", bound=Callable[..., Any])
BLOCK_WORK = 20
"""A calibrated weight counts so many times its bytes on the progress bar: reading, packing and writing are quick beside it."""
OPTIONS = (
    click.option(
        "--dataset",
        metavar="TEXTS",
        help="Text, .jsonl or .parquet file, data set, mix (a.txt:0.7,b.jsonl:0.3) or 'default' to calibrate on.",
    ),
    click.option(
        "--nsamples", type=int, help="Calibration samples.  [default: 128, or what the quantizer's options imply]"
    ),
    click.option(
        "--seqlen", type=int, help="Tokens of a sample.  [default: 2048, or what the options imply or the model takes]"
    ),
    click.option(
        "--batch-size", default=8, show_default=True, help="Samples that run through a decoder block at once."
    ),
    click.option(
        "--device", default="cpu", show_default=True, help="Where decoder blocks are calibrated: cpu, cuda or cuda:N."
    ),
    click.option("--offload", is_flag=True, help="Keep activations in files beside the destination, not in memory."),
    click.option(
        "--statistics",
        type=click.Path(path_type=Path),
        help="Measured statistics: used if the file is there, else written.",
    ),
    click.option(
        "--save-imatrix", type=click.Path(path_type=Path), help="Write the measured importance as llama.cpp's matrix."
    ),
    click.option("--resume", is_flag=True, help="Go on with a calibrated conversion that was stopped or killed."),
)


def calibration_options(command: F) -> F:
    """Add the options, in the order above."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command


def wishes_of(flags: Mapping[str, Any]) -> Wishes:
    """Return what the flags ask of calibration."""
    from lowbit.calibration.dataset import SEED
    from lowbit.calibration.wishes import Wishes

    names = ("dataset", "nsamples", "seqlen", "batch_size", "device", "offload", "statistics", "save_imatrix", "resume")
    seed = SEED if flags["seed"] is None else flags["seed"]
    return Wishes(seed=seed, **{name: flags[name] for name in names})


def seeds_samples_only(flags: Mapping[str, Any], registry: Registry) -> bool:
    """Whether ``--seed`` is for the calibration samples alone: they are drawn, and the quantizer draws nothing."""
    quantizer = registry.quantizers[flags["quantizer"]] if flags["quantizer"] else None
    if quantizer is None or "seed" in {field.name for field in fields(quantizer.Options)}:
        return False
    return bool(flags["dataset"] or quantizer.needs)


def bar_bytes(plan: Plan, wishes: Wishes, known: Mapping[str, Calibration]) -> int:
    """Return the length of the progress bar: bytes read and written, and the work on calibrated weights."""
    calibrated = sum(step.source.nbytes for step in plan.steps if wishes.concerns(step, known))
    return plan.source_nbytes + plan.nbytes + BLOCK_WORK * calibrated
