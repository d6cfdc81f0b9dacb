"""Statistics in a file: what ``--statistics FILE`` keeps of one calibration for the next.

A safetensors file with ``NAME.importance`` float32 (in,) and ``NAME.hessian`` float32 (in, in) for each weight; the metadata say
``format`` = ``lowbit-statistics``, the ``tokens`` that were measured, and the ``dataset``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lowbit.errors import CheckpointError
from lowbit.interfaces import Calibration, Checkpoint
from lowbit.recipe import is_matrix
from lowbit.staging import staged
from lowbit.tensors import raw_bytes

FORMAT = "lowbit-statistics"
KINDS = ("importance", "hessian")


class StatisticsFile(Mapping[str, Calibration]):
    """The calibration of every weight in a file; the system maps it, so what is not looked at is not read.

    Raises CheckpointError for a file that is something else, or was measured on another model than ``checkpoint``.
    """

    def __init__(self, path: Path, checkpoint: Checkpoint) -> None:
        try:
            file: Any = safe_open(str(path), "pt")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read as statistics: {error}") from error
        if (file.metadata() or {}).get("format") != FORMAT:
            raise CheckpointError(
                f"{path} holds no statistics; --statistics takes a file that lowbit wrote, or a new name"
            )
        self.path, self._file = path, file
        self._kinds = self._check(checkpoint)

    def __getitem__(self, name: str) -> Calibration:
        kinds = self._kinds[name]
        return Calibration(**{kind: self._file.get_tensor(f"{name}.{kind}") for kind in kinds})

    def __iter__(self) -> Iterator[str]:
        return iter(self._kinds)

    def __len__(self) -> int:
        return len(self._kinds)

    def beside(self, importance: Mapping[str, Calibration]) -> dict[str, Calibration]:
        """Return the calibration of every weight, with the importance of another file where that has one."""
        return {
            name: replace(self.get(name, Calibration()), importance=importance[name].importance)
            if name in importance
            else self[name]
            for name in {**dict.fromkeys(self), **dict.fromkeys(importance)}
        }

    def _check(self, checkpoint: Checkpoint) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for key in self._file.keys():  # noqa: SIM118  # no dict
            name, _, kind = key.rpartition(".")
            entry, shape = checkpoint.entries.get(name), tuple(self._file.get_slice(key).get_shape())
            if entry is None or not is_matrix(entry) or kind not in KINDS:
                raise CheckpointError(
                    f"{self.path} knows {key}, and {checkpoint.path.name} does not; it is another model's"
                )
            columns = entry.shape[1]
            if shape != ((columns,) if kind == "importance" else (columns, columns)):
                raise CheckpointError(f"{self.path}: {key} has shape {shape}, and {name} has {columns} columns")
            found.setdefault(name, []).append(kind)
        return found


def write_statistics(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], Tensor],
    tokens: int,
    dataset: str,
) -> None:
    """Write a statistics file one tensor at a time; ``shapes`` and ``read`` go by ``NAME.importance`` and ``NAME.hessian``."""
    header: dict[str, object] = {"__metadata__": {"format": FORMAT, "tokens": str(tokens), "dataset": dataset}}
    offset = 0
    for key, shape in shapes.items():
        size = 4
        for length in shape:
            size *= length
        header[key] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with staged(path) as temporary, temporary.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key in shapes:
            file.write(raw_bytes(read(key).float()).numpy().data)
