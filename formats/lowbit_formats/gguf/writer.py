"""Writing a GGUF file: the header first, from what is known of the tensors, then each tensor where the header says."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lowbit.tensors import raw_bytes
from lowbit_formats.gguf.block_types import BlockType
from lowbit_formats.gguf.header import ALIGNMENT, MAGIC, padded
from lowbit_formats.gguf.keys import Key, encode, encode_string

_VERSION = 3


@dataclass(frozen=True, slots=True)
class Slot:
    """A tensor to come: ggml's name, its type, and its shape, outermost first."""

    name: str
    type: BlockType
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        rows = 1
        for length in self.shape[:-1]:
            rows *= length
        return rows * self.type.row_bytes(self.shape[-1])


class TensorFile:
    """A new file whose header is written; ``put`` fills in one tensor, in any order.

    The file is closed between the calls, so that a model may have more parts than a process may have open files.
    """

    def __init__(self, path: Path, keys: Iterable[Key], slots: Sequence[Slot]) -> None:
        self._path = path
        encoded = {key.name: encode([key]) for key in keys}
        head = MAGIC + struct.pack("<IQQ", _VERSION, len(slots), len(encoded))
        self._key_ends: dict[str, int] = {}
        end = len(head)
        for name, raw in encoded.items():
            end += len(raw)
            self._key_ends[name] = end
        head += b"".join(encoded.values())
        infos, offset = [], 0
        self._places: dict[str, tuple[int, int]] = {}
        for slot in slots:
            lengths = slot.shape[::-1]
            layout = f"<I{len(lengths)}QIQ"
            infos.append(encode_string(slot.name) + struct.pack(layout, len(lengths), *lengths, slot.type.id, offset))
            self._places[slot.name] = offset, slot.nbytes
            offset = padded(offset + slot.nbytes, ALIGNMENT)
        head += b"".join(infos)
        self._start = padded(len(head), ALIGNMENT)
        with path.open("xb") as file:
            file.write(head)
            file.truncate(self._start + offset)  # what no tensor covers reads as zeros

    def put(self, name: str, values: Tensor) -> None:
        """Write the bytes of ``values``, which fill the slot exactly."""
        offset, nbytes = self._places[name]
        raw = raw_bytes(values)
        assert len(raw) == nbytes
        self._write(self._start + offset, raw)

    def amend(self, key: str, before_end: int, values: Tensor) -> None:
        """Overwrite elements of an array key that was written with a placeholder, ``before_end`` bytes from its end."""
        self._write(self._key_ends[key] - before_end, raw_bytes(values))

    def _write(self, position: int, raw: Tensor) -> None:
        with self._path.open("r+b") as file:
            file.seek(position)
            file.write(raw.numpy().data)
