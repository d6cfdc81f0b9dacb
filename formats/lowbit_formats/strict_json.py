"""Reading JSON documents that came with a checkpoint: every way to be wrong is one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lowbit.errors import CheckpointError


def parse_object(text: bytes, source: str, unique: bool = True) -> dict[str, Any]:
    """Return the JSON object in ``text``; ``source`` names it in errors.

    Raises CheckpointError for anything but an object in UTF-8 and, with ``unique``, for a key that occurs twice: where bytes
    are found through the document, two readers that pick different ones would read different weights.
    """

    def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        document = dict(pairs)
        if len(document) < len(pairs):
            keys = [key for key, _ in pairs]
            raise CheckpointError(f"{source}: {next(key for key in keys if keys.count(key) > 1)!r} occurs twice")
        return document

    try:
        document = json.loads(text.decode("utf-8"), object_pairs_hook=unique_keys if unique else None)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source} is no valid JSON ({error}); download the file again") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{source} must hold a JSON object, got {type(document).__name__}")
    return document


def read_object(path: Path, unique: bool = True) -> dict[str, Any]:
    """Return the JSON object in a file; raises CheckpointError as ``parse_object`` does, or when it cannot be read."""
    try:
        return parse_object(path.read_bytes(), str(path), unique)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error


def dump(document: Any) -> bytes:
    """Return a JSON document as people read it: indented, UTF-8, one newline at the end."""
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()
