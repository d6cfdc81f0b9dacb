"""``lowbit inspect``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lowbit.cli.console import human_bytes, human_count, json_option, print_json, print_table
from lowbit.cli.convert import describe, entry_json

if TYPE_CHECKING:
    from lowbit.interfaces import Checkpoint


@click.command("inspect", short_help="Show tensors, schemes, layouts and sizes.")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--tensors", is_flag=True, help="List every tensor.")
@json_option
def inspect_command(path: Path, tensors: bool, as_json: bool) -> None:
    """Show what PATH holds: tensors, schemes, layouts, bits per weight, sizes. Reads headers only."""
    from lowbit.plugins import installed

    with installed().open(path) as checkpoint:
        document = _document(checkpoint)
        if as_json:
            print_json(document)
        else:
            _show(checkpoint, document, tensors)


def _document(checkpoint: Checkpoint) -> dict[str, Any]:
    weights = sum(math.prod(entry.shape) for entry in checkpoint.entries.values())
    nbytes = sum(entry.nbytes for entry in checkpoint.entries.values())
    return {
        "path": str(checkpoint.path),
        "model_type": checkpoint.metadata.config.get("model_type"),
        "provenance": dict(checkpoint.metadata.provenance),
        "side_files": [file.name for file in checkpoint.metadata.side_files],
        "weights": weights,
        "bytes": nbytes,
        "bits_per_weight": round(8 * nbytes / max(1, weights), 4),
        "tensors": [
            {"name": name, "shape": list(entry.shape), **entry_json(entry)}
            for name, entry in checkpoint.entries.items()
        ],
    }


def _show(checkpoint: Checkpoint, document: dict[str, Any], tensors: bool) -> None:
    heading = f"{document['path']}: {document['model_type'] or 'unknown model type'}, {human_count(document['weights'])} weights"
    click.echo(heading)
    for key, value in document["provenance"].items():
        click.echo(f"  {key}: {value}")
    if tensors:
        rows = [
            (
                name,
                "x".join(map(str, entry.shape)),
                describe(entry),
                _bits(entry.nbytes, entry.shape),
                human_bytes(entry.nbytes),
            )
            for name, entry in checkpoint.entries.items()
        ]
        total = ("total", "", "", f"{document['bits_per_weight']:.3f}", human_bytes(document["bytes"]))
        print_table("", ("tensor", "shape", "stored as", ">bits", ">bytes"), rows, total)
    else:
        _show_groups(checkpoint, document)
    if document["side_files"]:
        click.echo(f"Side files: {', '.join(document['side_files'])}")


def _show_groups(checkpoint: Checkpoint, document: dict[str, Any]) -> None:
    groups: dict[str, list[Any]] = {}
    for entry in checkpoint.entries.values():
        groups.setdefault(describe(entry), []).append(entry)
    rows = []
    for what, entries in groups.items():
        weights = sum(math.prod(entry.shape) for entry in entries)
        nbytes = sum(entry.nbytes for entry in entries)
        rows.append((what, str(len(entries)), human_count(weights), _bits(nbytes, (weights,)), human_bytes(nbytes)))
    bits = f"{document['bits_per_weight']:.3f}"
    total = (
        "total",
        str(len(checkpoint.entries)),
        human_count(document["weights"]),
        bits,
        human_bytes(document["bytes"]),
    )
    print_table("", ("stored as", ">tensors", ">weights", ">bits", ">bytes"), rows, total)


def _bits(nbytes: int, shape: tuple[int, ...]) -> str:
    return f"{8 * nbytes / max(1, math.prod(shape)):.3f}"
