"""Device compilers and the programs that packages announce to them: what ``lowbit kernels`` builds ahead of time.

Two entry-point groups, looked up only by that command: ``lowbit.compilers`` names objects (or modules) that are a ``Compiler``,
``lowbit.programs`` functions from an architecture to a package's programs for it. Kernels work without being announced; announced ones can be built
before they are needed, and are compiled by the tests for every architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol

from lowbit.errors import PluginError


class Built(Protocol):
    """A compiled kernel: its name with settings, architecture, bytes, and seconds of compilation (0: it was there)."""

    @property
    def kernel(self) -> str: ...  # noqa: D102
    @property
    def arch(self) -> str: ...  # noqa: D102
    @property
    def nbytes(self) -> int: ...  # noqa: D102
    @property
    def seconds(self) -> float: ...  # noqa: D102


class Compiler(Protocol):
    """Compiles programs and keeps the results; what it cannot do it raises as a RuntimeError of one sentence."""

    @property
    def folder(self) -> Callable[[], Path]:
        """Where results are kept."""

    @property
    def architectures(self) -> Callable[[], Sequence[str]]:
        """The architectures of the devices at hand."""

    @property
    def check(self) -> Callable[[str], None]:
        """Raises unless an architecture can be compiled for."""

    @property
    def build(self) -> Callable[[Any, str], Built]:
        """Compile one program for an architecture, or find it."""

    @property
    def built(self) -> Callable[[], Sequence[Built]]:
        """Everything that is kept."""

    @property
    def clear(self) -> Callable[[], int]:
        """Remove everything that is kept; return how much it was."""


def compiler() -> Compiler:
    """Return the installed compiler; raise PluginError when there is none."""
    for entry in sorted(entry_points(group="lowbit.compilers"), key=lambda entry: entry.name):
        found: Compiler = _load(entry)
        return found
    raise PluginError('no kernel compiler is installed; reinstall lowbit: pip install --force-reinstall "lowbit[gpu]"')


def programs(arch: str) -> list[Any]:
    """Return every announced program for ``arch``, package by package; each has a ``name`` and is what ``build`` takes."""
    found = []
    for entry in sorted(entry_points(group="lowbit.programs"), key=lambda entry: entry.name):
        found += list(_load(entry)(arch))
    return found


def _load(entry: Any) -> Any:
    try:
        return entry.load()
    except Exception as error:  # whatever a third party's import raises must be told with its name
        raise PluginError(
            f"entry point {entry.name!r} ({entry.value}) failed to load: {error}; reinstall it"
        ) from error
