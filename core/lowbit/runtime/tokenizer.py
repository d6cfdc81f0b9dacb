"""``lowbit.load_tokenizer``: the tokenizer of a checkpoint, from its side files."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path, PurePosixPath
from typing import Any

from lowbit.errors import CheckpointError
from lowbit.metadata import Metadata
from lowbit.plugins import installed
from lowbit.registry import Registry
from lowbit.runtime.extras import need_transformers, quiet


def load_tokenizer(path: str | Path, *, registry: Registry | None = None) -> Any:
    """Return transformers' tokenizer of a checkpoint of any installed format; a GGUF file holds one too.

    Raises CheckpointError when there is none, OptionError when transformers is not installed.
    """
    need_transformers("lowbit.load_tokenizer")
    with (registry or installed()).open(Path(path)) as checkpoint, tempfile.TemporaryDirectory() as folder:
        _write(checkpoint.metadata, Path(folder))
        return _tokenizer(Path(folder), Path(path))


def _write(metadata: Metadata, folder: Path) -> None:
    """Write the config and the plain side files; a tokenizer is a few of them, and it never looks outside."""
    (folder / "config.json").write_text(json.dumps(dict(metadata.config)), encoding="utf-8")
    for file in metadata.side_files:
        name = PurePosixPath(file.name)
        if len(name.parts) == 1 and name.suffix in (".json", ".txt", ".jinja", ".model") and name.name != "config.json":
            (folder / name.name).write_bytes(file.read())


def _tokenizer(folder: Path, path: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        with quiet():
            return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).replace(str(folder), path.name).split())
        raise CheckpointError(f"{path} has no tokenizer that transformers can load: {reason}") from error
