"""Writing a checkpoint folder: complete or not at all, side files inside it, and only the values that were announced."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from lowbit.errors import CheckpointError, OutputError
from lowbit.interfaces import Entry, Value
from lowbit.metadata import SideFile
from lowbit.parts import TensorSpec
from lowbit.staging import staged
from lowbit.tensors import PackedTensor
from lowbit_formats.checkpoint_folder import CONFIG
from lowbit_formats.strict_json import dump


@contextmanager
def new_folder(destination: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes ``destination`` when the block ends well; see ``lowbit.staging.staged``."""
    with staged(destination) as folder:
        folder.mkdir()
        yield folder


def write_json(folder: Path, name: str, document: Mapping[str, Any]) -> None:
    """Write a JSON document; an empty one is not written."""
    if document:
        (folder / name).write_bytes(dump(document))


def check_side_files(files: Iterable[SideFile], stem: str, own: frozenset[str] = frozenset({CONFIG})) -> None:
    """Raise CheckpointError for a side file that would land outside the folder, on another, or on the format's own files.

    ``own`` and every name that begins with ``stem`` and ends like weights or their index belong to the format.
    """
    taken: set[PurePosixPath] = set()
    for file in files:
        path = PurePosixPath(file.name)
        parts = path.parts
        if path.is_absolute() or not parts or ".." in parts or "\\" in file.name or "\0" in file.name:
            raise CheckpointError(f"side file {file.name!r} is no relative path inside the checkpoint; rename it")
        weights = file.name.startswith(stem) and file.name.endswith((".safetensors", ".safetensors.index.json"))
        if path in taken or file.name in own or weights:
            raise CheckpointError(f"side file {file.name!r} would overwrite another file of the checkpoint; rename it")
        taken.add(path)


def copy_side_files(folder: Path, files: Iterable[SideFile]) -> None:
    """Copy side files into ``folder``; raises OutputError, naming the file, when one cannot be read."""
    for file in files:
        target = folder / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.content is not None:
            target.write_bytes(file.content)
        else:
            assert file.path is not None
            _copy(file.path, target)


def _copy(source: Path, target: Path) -> None:
    try:
        opened = source.open("rb")
    except OSError as error:
        raise OutputError(f"cannot read the side file {source}: {error.strerror or error}") from error
    with opened, target.open("xb") as written:
        shutil.copyfileobj(opened, written, 1 << 20)


def announced(entries: Mapping[str, Entry], stream: Iterable[tuple[str, Value]]) -> Iterator[tuple[str, Value]]:
    """Yield the values of ``stream``; raise OutputError unless they are those of ``entries``, all of them and in order."""
    expected = iter(entries.items())
    for name, value in stream:
        wanted, entry = next(expected, ("nothing", None))
        if name != wanted or entry is None:
            raise OutputError(f"tensor {name!r} came where {wanted!r} was announced")
        found = value.spec if isinstance(value, PackedTensor) else TensorSpec.of(value)
        if found != entry:
            raise OutputError(f"tensor {name!r} was announced as {entry}, but came as {found}")
        yield name, value
        del value  # so that the next one is made while nothing here holds this one
    if missing := [name for name, _ in expected]:
        raise OutputError(f"{len(missing)} announced tensors never came, the first is {missing[0]!r}")
