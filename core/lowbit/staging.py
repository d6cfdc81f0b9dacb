"""Outputs that appear complete or not at all: write beside the destination, then rename."""

from __future__ import annotations

import errno
import glob
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lowbit.errors import OutputError

_PARTIAL = re.compile(r"\.(.+)\.[0-9a-f]{8}\.partial")


@contextmanager
def staged(destination: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a path beside ``destination`` to write a file or a folder to; rename it into place when the block ends well.

    When the block raises (Ctrl-C too) everything written is removed and ``destination`` is as it was. Raises OutputError
    when the destination exists and ``overwrite`` is false, its parent is missing, or the disk is full.
    """
    check_destination(destination, overwrite)
    with scratch(destination) as temporary:
        yield temporary
        _replace(temporary, destination)


@contextmanager
def scratch(destination: Path) -> Iterator[Path]:
    """Yield a path beside ``destination`` to write to; what is left of it at the end is removed. Raises OutputError."""
    temporary = destination.parent / f".{destination.name}.{uuid.uuid4().hex[:8]}.partial"
    try:
        yield temporary
    except OSError as error:
        raise write_error(destination, error) from error
    finally:
        remove(temporary)


def sweep(destination: Path) -> None:
    """Remove the empty folders that killed processes left beside ``destination``; one that holds anything stays."""
    for left in destination.parent.glob(f".{glob.escape(destination.name)}.*.partial"):
        if left.is_dir() and not left.is_symlink() and _PARTIAL.fullmatch(left.name):
            with suppress(OSError):
                left.rmdir()


def check_destination(destination: Path, overwrite: bool) -> None:
    """Raise OutputError unless ``destination`` can be created or, with ``overwrite``, replaced."""
    if not destination.parent.is_dir():
        raise OutputError(f"the folder {destination.parent} does not exist; create it first")
    if (destination.exists() or destination.is_symlink()) and not overwrite:
        raise OutputError(f"{destination} exists; give --overwrite to replace it")
    if not os.access(destination.parent, os.W_OK):
        raise OutputError(f"the folder {destination.parent} is not writable; choose another destination")


def remove(path: Path) -> None:
    """Remove a file or a folder if it is there; a link is removed, never followed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_error(destination: Path, error: OSError) -> OutputError:
    """Return the sentence for an operating-system error while writing; it names the final place, not the temporary."""
    destination = final_place(destination)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(f"the disk is full; {destination} was not written, free some space or choose another disk")
    return OutputError(f"cannot write {destination}: {error.strerror or error}")


def final_place(path: Path) -> Path:
    """Return the destination that a temporary path of ``staged`` stands for (``staged`` may be nested)."""
    while match := _PARTIAL.fullmatch(path.name):
        path = path.with_name(match[1])
    return path


def _replace(temporary: Path, destination: Path) -> None:
    """Rename into place; where a rename cannot replace (a folder is involved), the old steps aside first."""
    if not (destination.exists() or destination.is_symlink()) or not (destination.is_dir() or temporary.is_dir()):
        temporary.replace(destination)
        return
    aside = temporary.with_suffix(".replaced")
    destination.replace(aside)
    try:
        temporary.replace(destination)
    except BaseException:  # Ctrl-C, too, between the two renames
        aside.replace(destination)
        raise
    remove(aside)
