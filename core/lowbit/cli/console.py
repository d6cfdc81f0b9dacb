"""What the commands share for showing things: sizes, tables, one progress bar, JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import click

if TYPE_CHECKING:
    from rich.console import Console

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON document on stdout and nothing else."
)


class Advance(Protocol):
    """Called when ``nbytes`` more of the work are done; ``what`` is what is being worked on."""

    def __call__(self, nbytes: int, what: str) -> None:
        """Advance the bar."""


def print_json(document: Any) -> None:
    """Print a JSON document on stdout."""
    click.echo(json.dumps(document, indent=1, ensure_ascii=False))


def console(stderr: bool = False) -> Console:
    """Return a rich console; redirected output is wide enough for a table, so that nothing is cut."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else 160, highlight=False)


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    footer: Sequence[str] = (),
    to: Console | None = None,
) -> None:
    """Print a table; columns whose header starts with ``>`` are right-aligned, an empty title is left out."""
    from rich import box
    from rich.table import Table

    table = Table(
        title=title or None, title_justify="left", box=box.SIMPLE_HEAD, show_footer=bool(footer), pad_edge=False
    )
    for index, column in enumerate(columns):
        justify = "right" if column.startswith(">") else "left"
        table.add_column(
            column.removeprefix(">"),
            justify=justify,  # type: ignore[arg-type]  # the literal type is rich's
            footer=footer[index] if footer else "",
            overflow="fold",
        )
    for row in rows:
        table.add_row(*row)
    (to or console()).print(table)


def human_bytes(count: int) -> str:
    """Return a size such as ``98.4 MB`` (decimal units, as disks and model pages count)."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} TB"


def human_count(count: int) -> str:
    """Return a count such as ``134.5M``."""
    for factor, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= factor:
            return f"{count / factor:.1f}{unit}"
    return str(count)


@contextmanager
def progress_bar(total: int, quiet: bool) -> Iterator[Advance]:
    """Yield a function that advances one bar over ``total`` bytes, on stderr; silent when quiet or not a terminal."""
    if quiet or not sys.stderr.isatty():
        yield lambda nbytes, what: None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        BarColumn(bar_width=30),
        TextColumn("{task.percentage:>3.0f}%"),
        DownloadColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=total)
        yield lambda nbytes, what: progress.update(task, advance=nbytes, description=what)
