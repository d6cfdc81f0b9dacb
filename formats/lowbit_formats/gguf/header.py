"""Reading the header of a GGUF file: nothing in it is believed before it was checked against the size of the file.

    "GGUF" | u32 version | u64 tensors | u64 keys | keys | tensor infos | padding | data
    key          string | u32 kind | value;   an array value is u32 kind | u64 count | elements
    tensor info  string | u32 dimensions | u64 lengths, innermost first | u32 type | u64 offset into data
    string       u64 bytes | UTF-8

All numbers are little endian. Offsets follow one another with no gap, each tensor padded to ``general.alignment``; that is
what ggml's own loader (gguf.cpp) demands.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowbit.errors import CheckpointError
from lowbit_formats.gguf.block_types import BY_ID, BlockType

MAGIC = b"GGUF"
VERSIONS = (2, 3)  # 3 adds big-endian files to 2; 1 had 32-bit counts
ALIGNMENT = 32
NAME_BYTES = 63  # ggml keeps names in 64 bytes, the last of which is NUL
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_SMALLEST_KEY = 8 + 4 + 1
_SMALLEST_INFO = 8 + 4 + 8 + 4 + 8


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor: ``shape`` outermost first (as torch has it), ``start`` its first byte in the file."""

    name: str
    type: BlockType
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """What a GGUF file says before its data."""

    path: Path
    keys: Mapping[str, Any]
    tensors: tuple[TensorInfo, ...]


def read_header(path: Path) -> Header:
    """Read and check the header of ``path``; raises CheckpointError for anything malformed, and reads no data."""
    size = path.stat().st_size
    if size < 24:
        raise CheckpointError(f"{path} is truncated: a GGUF header takes 24 bytes, the file has {size}")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _parse(path, _Cursor(path, data, size))


def padded(nbytes: int, alignment: int) -> int:
    """Round up to a multiple of ``alignment``."""
    return -(-nbytes // alignment) * alignment


class _Cursor:
    """A position in a mapped file; every step checks that the bytes are there."""

    def __init__(self, path: Path, data: mmap.mmap, size: int) -> None:
        self.path, self.data, self.size, self.position = path, data, size, 0

    def need(self, count: int, what: str) -> int:
        """Step over ``count`` bytes and return where they start."""
        start = self.position
        if count > self.size - start:
            raise CheckpointError(
                f"{self.path} is truncated: {what} needs {count:,} bytes at {start:,}, and the file has {self.size:,}"
            )
        self.position = start + count
        return start

    def number(self, code: str, what: str) -> Any:
        layout = struct.Struct("<" + code)
        return layout.unpack_from(self.data, self.need(layout.size, what))[0]

    def count(self, smallest: int, what: str) -> int:
        """Read a count of things that take at least ``smallest`` bytes each; they must fit in the rest of the file."""
        count = int(self.number("Q", f"the number of {what}"))
        if count * smallest > self.size - self.position:
            raise CheckpointError(
                f"{self.path} claims {count:,} {what}, which do not fit in its {self.size:,} bytes; the file is damaged"
            )
        return count

    def string(self, what: str) -> str:
        length = self.number("Q", what)
        start = self.need(length, what)
        try:
            return self.data[start : start + length].decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.path}: {what} at byte {start:,} is not UTF-8 ({error.reason})") from None


def _parse(path: Path, cursor: _Cursor) -> Header:
    _check_start(cursor)
    tensors = cursor.count(_SMALLEST_INFO, "tensors")
    keys = _keys(cursor, cursor.count(_SMALLEST_KEY, "keys"))
    alignment = keys.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise CheckpointError(f"{path}: general.alignment must be a power of two, got {alignment!r}")
    raw = [_info(cursor) for _ in range(tensors)]
    return Header(path, keys, _placed(cursor, raw, alignment))


def _check_start(cursor: _Cursor) -> None:
    magic = cursor.data[cursor.need(4, "the magic") : 4]
    if magic != MAGIC:
        raise CheckpointError(f"{cursor.path} is no GGUF file: it starts with {magic!r}, not with {MAGIC!r}")
    version = cursor.number("I", "the version")
    if version in VERSIONS:
        return
    if int.from_bytes(version.to_bytes(4, "big"), "little") in VERSIONS:
        raise CheckpointError(f"{cursor.path} is a big-endian GGUF file; convert it with gguf_convert_endian.py first")
    raise CheckpointError(
        f"{cursor.path} is GGUF version {version}, this lowbit reads versions 2 and 3; convert the model again"
    )


def _keys(cursor: _Cursor, count: int) -> dict[str, Any]:
    keys: dict[str, Any] = {}
    for index in range(count):
        name = cursor.string(f"the name of key {index}")
        if name in keys or not name or not name.isprintable():
            wrong = "a second" if name in keys else "named"
            raise CheckpointError(f"{cursor.path}: key {index} is {wrong} {name[:80]!r}; the file is damaged")
        keys[name] = _value(cursor, cursor.number("I", f"the kind of {name}"), name)
    return keys


def _value(cursor: _Cursor, kind: int, name: str) -> Any:
    if kind == _STRING:
        return cursor.string(name)
    if kind in _SCALARS:
        return cursor.number(_SCALARS[kind], name)
    if kind != _ARRAY:
        raise CheckpointError(f"{cursor.path}: {name} is of kind {kind}, which GGUF does not have")
    element = cursor.number("I", f"the kind of {name}")
    if element == _STRING:
        return [cursor.string(name) for _ in range(cursor.count(8, f"elements of {name}"))]
    if element not in _SCALARS:
        raise CheckpointError(f"{cursor.path}: {name} is an array of kind {element}, which ggml does not read")
    width = struct.calcsize("<" + _SCALARS[element])
    length = cursor.count(width, f"elements of {name}")
    start = cursor.need(length * width, name)
    return list(struct.unpack_from(f"<{length}{_SCALARS[element]}", cursor.data, start))


def _info(cursor: _Cursor) -> tuple[str, BlockType, tuple[int, ...], int]:
    name = cursor.string("a tensor's name")
    if not 0 < len(name.encode()) <= NAME_BYTES or not name.isprintable():
        raise CheckpointError(
            f"{cursor.path}: a tensor's name has 1 to {NAME_BYTES} printable bytes, got {name[:80]!r}"
        )
    dimensions = cursor.number("I", f"the dimensions of {name}")
    if not 1 <= dimensions <= 4:
        raise CheckpointError(f"{cursor.path}: {name} has {dimensions} dimensions, a GGUF tensor has 1 to 4")
    lengths = tuple(cursor.number("Q", f"the shape of {name}") for _ in range(dimensions))
    type_id = cursor.number("I", f"the type of {name}")
    if type_id not in BY_ID:
        raise CheckpointError(f"{cursor.path}: {name} is of ggml type {type_id}, which this lowbit does not know")
    type = BY_ID[type_id]
    if not all(lengths):
        raise CheckpointError(f"{cursor.path}: {name} is empty, its lengths are {lengths}")
    if lengths[0] % type.weights:
        raise CheckpointError(
            f"{cursor.path}: rows of {name} have {lengths[0]:,} weights, no multiple of a {type.name} block's {type.weights}"
        )
    return name, type, lengths[::-1], cursor.number("Q", f"the offset of {name}")


def _placed(
    cursor: _Cursor, raw: list[tuple[str, BlockType, tuple[int, ...], int]], alignment: int
) -> tuple[TensorInfo, ...]:
    """Check names, offsets and sizes against each other and against the file."""
    base = padded(cursor.position, alignment)
    tensors: dict[str, TensorInfo] = {}
    expected = 0
    for name, type, shape, offset in raw:
        if name in tensors:
            raise CheckpointError(f"{cursor.path} holds two tensors named {name}; the file is damaged")
        if offset != expected:
            raise CheckpointError(
                f"{cursor.path}: {name} has offset {offset:,}, expected {expected:,}; the file is damaged, or its block sizes "
                f"come from another version of ggml"
            )
        nbytes = math.prod(shape) // type.weights * type.nbytes
        if base + offset + nbytes > cursor.size:
            raise CheckpointError(
                f"{cursor.path} is truncated: {name} ends at byte {base + offset + nbytes:,}, and the file has "
                f"{cursor.size:,}; download or copy it again"
            )
        tensors[name] = TensorInfo(name, type, shape, base + offset, nbytes)
        expected = padded(offset + nbytes, alignment)
    return tuple(tensors.values())
