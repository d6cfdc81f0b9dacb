"""Models split over several files, as llama.cpp's ``gguf-split`` splits them: how the parts are called and what each says.

A part is ``<stem>-00001-of-0000N.gguf``, counted from 1, a GGUF file of its own with whole tensors. The first has every key
of the model; each has ``split.no`` (u16, counted from 0), ``split.count`` (u16) and ``split.tensors.count`` (i32, of the
whole model). Order of parts is order of tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import Tensor

from lowbit.errors import CheckpointError
from lowbit_formats.checkpoint_folder import WEIGHTS_SUFFIX, file_names
from lowbit_formats.gguf.header import ALIGNMENT, Header, padded, read_header
from lowbit_formats.gguf.keys import Key
from lowbit_formats.gguf.writer import Slot, TensorFile

SUFFIX = ".gguf"
_PART = re.compile(r"(?P<stem>.+)-(?P<part>\d{5})-of-(?P<parts>\d{5})\.gguf")
_NUMBER, _COUNT, _TENSORS = "split.no", "split.count", "split.tensors.count"
_MOST_PARTS = 65535
"""``split.count`` is 16 bits."""


def part_name(stem: str, index: int, count: int) -> str:
    """Return the name of part ``index`` (from 0) of ``count``; a model in one part is ``<stem>.gguf``."""
    return f"{stem}{SUFFIX}" if count == 1 else f"{stem}-{index + 1:05}-of-{count:05}{SUFFIX}"


def part_keys(index: int, count: int, tensors: int) -> list[Key]:
    """Return the keys by which part ``index`` (from 0) of ``count`` is known; none for a model in one part."""
    if count == 1:
        return []
    return [Key(_NUMBER, "u16", index), Key(_COUNT, "u16", count), Key(_TENSORS, "i32", tensors)]


def divided(slots: Iterable[Slot], most_bytes: int) -> list[list[Slot]]:
    """Cut tensors, in their order, into parts of at most ``most_bytes``; a larger tensor has a part to itself.

    Raises CheckpointError for more parts than a file can count.
    """
    parts: list[list[Slot]] = []
    room = 0
    for slot in slots:
        nbytes = padded(slot.nbytes, ALIGNMENT)
        if not parts or nbytes > room:
            parts.append([])
            room = most_bytes
        parts[-1].append(slot)
        room -= nbytes
    if len(parts) > _MOST_PARTS:
        raise CheckpointError(
            f"files of at most {most_bytes:,} bytes would be {len(parts):,}, and GGUF counts to {_MOST_PARTS:,}; allow larger ones"
        )
    return parts


def first_file(folder: Path) -> Path:
    """Return the file to open for the model in a folder; raises CheckpointError unless there is exactly one model."""
    names = file_names(folder)
    if any(name.endswith(WEIGHTS_SUFFIX) for name in names):
        raise CheckpointError(f"{folder.name} holds {WEIGHTS_SUFFIX} files")
    found = [name for name in names if name.endswith(SUFFIX)]
    firsts = [name for name in found if not (part := _PART.fullmatch(name)) or int(part["part"]) == 1]
    if not firsts:
        reason = f"not the first part of {found[0]}" if found else f"no {SUFFIX} file"
        raise CheckpointError(f"{folder.name} holds {reason}")
    if len(firsts) > 1:
        raise CheckpointError(
            f"{folder.name} holds {len(firsts)} {SUFFIX} models ({', '.join(firsts)}); name one of the files"
        )
    return folder / firsts[0]


def read_parts(path: Path) -> list[Header]:
    """Return the headers of a model's files, the first first; raises CheckpointError unless they belong together."""
    first = read_header(path)
    count = first.keys.get(_COUNT, 1)
    if not isinstance(count, int) or not 1 <= count <= _MOST_PARTS:
        raise CheckpointError(f"{path}: {_COUNT} must be 1 to {_MOST_PARTS}, got {count!r}")
    if count == 1:
        return [first]
    found = _PART.fullmatch(path.name)
    if not found or int(found["parts"]) != count or first.keys.get(_NUMBER) != 0 or int(found["part"]) != 1:
        raise CheckpointError(
            f"{path} is a part of a model in {count} files; open the one named ...-00001-of-{count:05}{SUFFIX}"
        )
    parts = [first]
    for index in range(1, count):
        part = path.with_name(part_name(found["stem"], index, count))
        if not part.is_file():
            raise CheckpointError(f"{path} is the first of {count} files and {part.name} is not beside it")
        header = read_header(part)
        if (header.keys.get(_NUMBER), header.keys.get(_COUNT)) != (index, count):
            raise CheckpointError(f"{part} does not say that it is part {index + 1} of {count}; the name is wrong")
        parts.append(header)
    tensors, announced = sum(len(part.tensors) for part in parts), first.keys.get(_TENSORS)
    if announced not in (None, tensors):
        raise CheckpointError(f"{path} announces {announced} tensors and its {count} files hold {tensors}")
    return parts


class ModelFiles:
    """The files of a model whose headers are written, one or several; see ``TensorFile``.

    Args:
        paths: Where the parts go, none of which exists.
        keys: The model's keys, for the first part.
        parts: The tensors of each.
    """

    def __init__(self, paths: Sequence[Path], keys: Iterable[Key], parts: Sequence[Sequence[Slot]]) -> None:
        tensors = sum(map(len, parts))
        self._files = []
        self._file_of: dict[str, TensorFile] = {}
        for index, (path, slots) in enumerate(zip(paths, parts, strict=True)):
            own = [*(keys if index == 0 else ()), *part_keys(index, len(parts), tensors)]
            self._files.append(TensorFile(path, own, slots))
            self._file_of |= dict.fromkeys((slot.name for slot in slots), self._files[-1])

    def put(self, name: str, values: Tensor) -> None:
        """Write a tensor to the part that holds it."""
        self._file_of[name].put(name, values)

    def amend(self, key: str, before_end: int, values: Tensor) -> None:
        """Overwrite elements of an array key; see ``TensorFile.amend``."""
        self._files[0].amend(key, before_end, values)
