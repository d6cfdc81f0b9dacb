"""The model card of a converted folder: the source's own README.md, and a section that says what was done, by whom and how well.

Nothing in it depends on when or where the conversion ran, so that the same conversion writes the same bytes.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lowbit.errors import CheckpointError
from lowbit.interfaces import Entry
from lowbit.metrics import ErrorSum
from lowbit.plan import Plan, Step, Target
from lowbit.recipe import Recipe, Rule
from lowbit.tensors import PackedSpec

if TYPE_CHECKING:
    from lowbit.convert import Outcome

CARD = "README.md"
SAMPLES, SAMPLE = 16, 1 << 16
"""Pieces of each file, and bytes of a piece, that its fingerprint covers besides the size."""


def fingerprint(path: Path) -> str:
    """Return a SHA-256 that identifies a checkpoint: names and sizes of its files, and 16 pieces of 64 KiB of each.

    The first piece holds the header, which describes every tensor. Hashing all bytes as they pass was weighed: SHA-256 takes 0.86
    seconds of a core for a gigabyte (2026-11-21), an eighth of what quantizing costs and more than moving codes does, and a
    GGUF file states its source in front of all data.
    Raises CheckpointError for a file that cannot be read.
    """
    total = hashlib.sha256()
    try:
        files = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
        for file in files:
            size = file.stat().st_size
            total.update(f"{file.name}\0{size}\0".encode())
            for piece in _pieces(file, size):
                total.update(piece)
    except OSError as error:
        raise CheckpointError(f"cannot read {error.filename}: {error.strerror or error}") from error
    return total.hexdigest()


def command_line(target: Target, recipe: Recipe) -> str:
    """Return the ``lowbit convert`` that does the same; calibration has flags of its own, which are not in it."""
    words = ["lowbit", "convert", "SOURCE", "DESTINATION", "--format", _format(target)]
    if target.dtype:
        words += ["--dtype", str(target.dtype).removeprefix("torch.")]
    if recipe.default:
        words += ["--quantizer", recipe.default.quantizer]
        for key, value in recipe.default.settings.items():
            words += ["--set", f"{key}={value}"]
    for rule in recipe.rules:
        words += ["--rule", _rule(rule)]
    return shlex.join([*words, "--allow-requantize"] if recipe.requantize else words)


def write_card(folder: Path, plan: Plan, outcomes: Sequence[Outcome], digests: Mapping[str, bytes]) -> None:
    """Write README.md into a converted folder: what the source's says, and the section of this conversion after it."""
    own = plan.metadata.side_file(CARD)
    before = own.read().decode(errors="replace").rstrip() + "\n\n" if own else ""
    (folder / CARD).write_text(before + section(plan, outcomes, digests), encoding="utf-8")


def section(plan: Plan, outcomes: Sequence[Outcome], digests: Mapping[str, bytes]) -> str:
    """Return the section: provenance, one row for each kind of change, and the hash of what was written."""
    facts = {**plan.metadata.provenance, "tensors_checksum": combined(digests)}
    lines = ["## Converted with lowbit", "", "| | |", "|---|---|"]
    lines += [f"| {key} | {_cell(facts[key])} |" for key in _ORDER if key in facts]
    lines += ["", "| action | from | to | tensors | weights | bits | error |", "|---|---|---|---|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in rows(outcomes)]
    lines += [
        "",
        "Bits count scales and all. The error is the relative root mean square error against the source; `exact` means that every",
        "float32 bit is the same. The folder was reopened and every byte compared before it appeared.",
        "",
    ]
    return "\n".join(lines)


def rows(outcomes: Sequence[Outcome]) -> list[tuple[str, ...]]:
    """Return action, from, to, tensors, weights, bits and error for each kind of change, in the order of the file."""
    kinds: dict[tuple[str, str, str], list[Outcome]] = {}
    for outcome in outcomes:
        step = outcome.step
        kinds.setdefault((step.action.value, described(step.source), described(step.target)), []).append(outcome)
    return [(*kind, *_sums(members)) for kind, members in kinds.items()]


def described(entry: Entry) -> str:
    """Return the layout and scheme of a packed entry, or the dtype of a plain one."""
    if isinstance(entry, PackedSpec):
        return f"{entry.layout} ({entry.scheme.summary()})"
    return str(entry.dtype).removeprefix("torch.")


def combined(digests: Mapping[str, bytes]) -> str:
    """Return one SHA-256 of all tensors, from names and their digests in the order of the names."""
    total = hashlib.sha256()
    for name, digest in sorted(digests.items()):
        total.update(name.encode() + b"\0" + digest)
    return total.hexdigest()


_ORDER = (
    "source",
    "source_fingerprint",
    "command",
    "quantizers",
    "act_order",
    "format",
    "lowbit_version",
    "torch_version",
    "tensors_checksum",
)


def _pieces(file: Path, size: int) -> Iterator[bytes]:
    """Yield pieces at equal distances, the first from the start and the last to the end; a small file is one piece."""
    starts = [(size - SAMPLE) * index // (SAMPLES - 1) for index in range(SAMPLES)] if size > SAMPLE else [0]
    with file.open("rb") as opened:
        for start in starts:
            opened.seek(start)
            yield opened.read(SAMPLE)


def _sums(outcomes: Sequence[Outcome]) -> tuple[str, str, str, str]:
    steps: list[Step] = [outcome.step for outcome in outcomes]
    weights = sum(step.weights for step in steps)
    bits = 8 * sum(step.target.nbytes for step in steps) / max(1, weights)
    error = sum((outcome.error for outcome in outcomes), ErrorSum())
    return str(len(steps)), f"{weights:,}", f"{bits:.3f}", error.text()


def _format(target: Target) -> str:
    return f"{target.format}:{target.variant}" if target.variant else target.format


def _rule(rule: Rule) -> str:
    return f"{rule.pattern}=" + ",".join([rule.quantizer, *(f"{key}={value}" for key, value in rule.settings.items())])


def _cell(text: str) -> str:
    """Return text for a cell: a bar would end it, a new line the table."""
    return "`" + " ".join(text.split()).replace("|", "\\|") + "`"
