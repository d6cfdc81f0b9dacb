"""What is known of each compiled kernel: a small JSON file beside the cache, whose own entries bear no names."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

FOLDER = "records"


@dataclass(frozen=True, slots=True)
class BuiltKernel:
    """A compiled kernel.

    Attributes:
        kernel: The program's name with its settings.
        arch: What it was compiled for, such as ``sm_90a``.
        nbytes: Bytes of the cubin.
        seconds: How long the compiler took; 0 when it came from the cache.
    """

    kernel: str
    arch: str
    nbytes: int
    seconds: float


def write_record(cache: Path, built: BuiltKernel, key: bytes) -> None:
    """Keep a record of ``built``, whose entry in the cache is ``key``; the last of several writers wins."""
    name = hashlib.sha256(f"{built.kernel} {built.arch}".encode()).hexdigest()[:32]
    folder = cache / FOLDER
    folder.mkdir(exist_ok=True)
    temporary = folder / f".{name}.{os.getpid()}"
    temporary.write_text(json.dumps({**asdict(built), "key": key.hex()}))
    temporary.replace(folder / f"{name}.json")


def read_records(cache: Path) -> Iterator[tuple[BuiltKernel, bytes]]:
    """Yield every record and its key in the cache; a damaged one is left out."""
    for path in sorted((cache / FOLDER).glob("*.json")):
        if found := _read(path):
            yield found


def _read(path: Path) -> tuple[BuiltKernel, bytes] | None:
    try:
        document = json.loads(path.read_text())
        key = bytes.fromhex(document.pop("key"))
        return BuiltKernel(**document), key
    except (OSError, ValueError, TypeError, KeyError):
        return None


def clear_records(cache: Path) -> None:
    """Remove every record."""
    for path in (cache / FOLDER).glob("*"):
        path.unlink(missing_ok=True)
