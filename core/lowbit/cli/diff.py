"""``lowbit diff``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lowbit.cli.console import json_option, print_json, print_table, progress_bar

if TYPE_CHECKING:
    from lowbit.diff import Difference


@click.command("diff", short_help="Compare the weights of two checkpoints.")
@click.argument("first", type=click.Path(path_type=Path))
@click.argument("second", type=click.Path(path_type=Path))
@click.option("--exit-code", is_flag=True, help="Exit with 1 unless everything is exact.")
@click.option("--all", "show_all", is_flag=True, help="List the exact tensors too.")
@json_option
def diff_command(first: Path, second: Path, exit_code: bool, show_all: bool, as_json: bool) -> None:
    """Compare the weights of FIRST and SECOND, whatever their formats: maximum absolute and relative error, or "exact"."""
    from lowbit.diff import differences
    from lowbit.metrics import ErrorSum
    from lowbit.plugins import installed

    registry = installed()
    found: list[Difference] = []
    with registry.open(first) as left, registry.open(second) as right:
        total = sum(entry.nbytes for entry in left.entries.values())
        with progress_bar(total, quiet=as_json) as advance:
            for difference in differences(left, right, registry):
                advance(difference.nbytes, difference.name)
                found.append(difference)
    exact = all(difference.exact for difference in found)
    error = sum((difference.error for difference in found if difference.error), ErrorSum())
    if as_json:
        tensors = [_json(difference) for difference in found]
        summary = {"exact": exact, "max_abs": error.max_abs, "relative_rmse": error.relative}
        print_json({"first": str(first), "second": str(second), **summary, "tensors": tensors})
    else:
        _show(found, exact, error, show_all)
    if exit_code and not exact:
        raise SystemExit(1)


def _show(found: list[Difference], exact: bool, error: Any, show_all: bool) -> None:
    rows = []
    for difference in found:
        if difference.error is None:
            rows.append((difference.name, difference.problem or "", ""))
        elif show_all or not difference.exact:
            rows.append((difference.name, f"{difference.error.max_abs:.4g}", difference.error.text()))
    same = sum(difference.exact for difference in found)
    if rows:
        print_table("", ("tensor", ">max abs", ">relative"), rows)
    verdict = "exact" if exact else f"max abs {error.max_abs:.4g}, relative {error.relative:.4f}"
    click.echo(f"{same} of {len(found)} tensors exact. Total: {verdict}.")


def _json(difference: Difference) -> dict[str, Any]:
    if difference.error is None:
        return {"name": difference.name, "exact": False, "problem": difference.problem}
    error = difference.error
    return {"name": difference.name, "exact": error.exact, "max_abs": error.max_abs, "relative_rmse": error.relative}
