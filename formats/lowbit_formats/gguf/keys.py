"""Keys of a GGUF file: reading them with their types checked, and writing them."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import torch

from lowbit.errors import CheckpointError

# kinds of values, by their ids in the file
_KINDS = {"u16": 2, "u32": 4, "i32": 5, "f32": 6, "bool": 7, "string": 8, "array": 9}
_FORMATS = {"u16": "H", "u32": "I", "i32": "i", "f32": "f", "bool": "?"}


@dataclass(frozen=True, slots=True)
class Key:
    """One key to write: ``kind`` is one of u16, u32, i32, f32, bool, string, or an array as in ``string[]``."""

    name: str
    kind: str
    value: Any


def u32(name: str, value: int) -> Key:
    """Return an unsigned integer key."""
    return Key(name, "u32", value)


def f32(name: str, value: float) -> Key:
    """Return a float32 key."""
    return Key(name, "f32", value)


def text(name: str, value: str) -> Key:
    """Return a string key."""
    return Key(name, "string", value)


def flag(name: str, value: bool) -> Key:
    """Return a boolean key."""
    return Key(name, "bool", value)


def texts(name: str, value: Sequence[str]) -> Key:
    """Return an array of strings."""
    return Key(name, "string[]", value)


def encode(keys: Iterable[Key]) -> bytes:
    """Return the bytes of keys, one after the other."""
    return b"".join(encode_string(key.name) + _encode_value(key) for key in keys)


def encode_string(value: str) -> bytes:
    """Return a length-prefixed UTF-8 string; raises UnicodeEncodeError for half a surrogate pair, which JSON allows."""
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def _encode_value(key: Key) -> bytes:
    if not key.kind.endswith("[]"):
        return struct.pack("<I", _KINDS[key.kind]) + _encode_scalar(key.kind, key.value)
    element = key.kind.removesuffix("[]")
    head = struct.pack("<IIQ", _KINDS["array"], _KINDS[element], len(key.value))
    if element == "string":
        return head + b"".join(map(encode_string, key.value))
    return head + struct.pack(f"<{len(key.value)}{_FORMATS[element]}", *key.value)


def _encode_scalar(kind: str, value: Any) -> bytes:
    return encode_string(value) if kind == "string" else struct.pack("<" + _FORMATS[kind], value)


def shortest(value: float) -> float:
    """Return the float with the fewest digits that is the same float32: 1e-05, not 9.999999747378752e-06."""
    single = torch.tensor(value, dtype=torch.float32)
    candidates = (float(f"{value:.{digits}g}") for digits in range(1, 10))
    return next((short for short in candidates if torch.tensor(short, dtype=torch.float32) == single), value)


_MISSING: Any = object()


class Keys:
    """The keys of one file, with typed access. ``name`` is looked up under the architecture unless it has its own prefix.

    Every getter raises CheckpointError when the key is missing and has no default, or holds another type.
    """

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path, self.values = path, values
        self.architecture = ""  # general.architecture has a prefix of its own, so it can be read now
        self.architecture = self.text("general.architecture")

    def __contains__(self, name: str) -> bool:
        return self._full(name) in self.values

    def integer(self, name: str, default: int = _MISSING) -> int:
        """Return an integer from 0 to 2**31."""
        value = self._get(name, default)
        if isinstance(value, list):
            raise CheckpointError(
                f"{self.path}: {self._full(name)} differs between layers, which no importer here reads"
            )
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
            raise self._wrong(name, value, "an integer from 0 to 2**31")
        return value

    def number(self, name: str, default: float = _MISSING) -> float:
        """Return a finite number, with the fewest digits that give the stored float32."""
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self._wrong(name, value, "a finite number")
        return shortest(float(value))

    def boolean(self, name: str, default: bool = _MISSING) -> bool:
        """Return a boolean."""
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self._wrong(name, value, "true or false")
        return value

    @overload
    def text(self, name: str) -> str: ...
    @overload
    def text(self, name: str, default: str) -> str: ...
    @overload
    def text(self, name: str, default: None) -> str | None: ...
    def text(self, name: str, default: str | None = _MISSING) -> str | None:
        """Return a string."""
        value = self._get(name, default)
        if value is not None and not isinstance(value, str):
            raise self._wrong(name, value, "a string")
        return value

    def items(self, name: str, kind: type, default: list[Any] = _MISSING) -> list[Any]:
        """Return an array whose elements are all of ``kind``."""
        value = self._get(name, default)
        if not isinstance(value, list) or not all(type(item) is kind for item in value):
            raise self._wrong(name, value, f"an array of {kind.__name__}")
        return value

    def _get(self, name: str, default: Any) -> Any:
        value = self.values.get(self._full(name), default)
        if value is _MISSING:
            raise CheckpointError(f"{self.path} has no key {self._full(name)}, without which the model cannot be built")
        return value

    def _full(self, name: str) -> str:
        return (
            name if name.startswith(("general.", "tokenizer.", "split.", "lowbit.")) else f"{self.architecture}.{name}"
        )

    def _wrong(self, name: str, value: Any, wanted: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {self._full(name)} must be {wanted}, got {str(value)[:60]}")
