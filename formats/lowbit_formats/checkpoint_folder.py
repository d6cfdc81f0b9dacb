"""What a checkpoint folder holds besides weights: its config and its side files. No path leads out of the folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowbit.errors import CheckpointError
from lowbit.metadata import SideFile
from lowbit_formats.strict_json import read_object

CONFIG = "config.json"
INDEX_SUFFIX = ".index.json"
WEIGHTS_SUFFIX = ".safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
OTHER_WEIGHTS_SUFFIXES = (".gguf", ".h5", ".msgpack", ".onnx", ".tflite")
QUANTIZATION_KEYS = ("quantization_config", "compression_config")


def file_names(folder: Path) -> list[str]:
    """Return the names of what is in a folder, sorted, without folders and dotfiles; raise CheckpointError if unreadable.

    Links are listed wherever they lead, so that a broken one is told and not forgotten.
    """
    try:
        found = [path.name for path in folder.iterdir() if path.is_file() or (path.is_symlink() and not path.is_dir())]
    except OSError as error:
        raise CheckpointError(f"cannot read {folder}: {error.strerror or error}") from error
    return sorted(name for name in found if not name.startswith("."))


def resolve_inside(folder: Path, name: str) -> Path:
    """Return the path of the file ``name`` of ``folder``; raise CheckpointError when it is missing or leads elsewhere.

    The rule: ``name`` is a plain file name, and the file it leads to is a regular file inside ``folder``. One kind of link
    out of the folder is allowed, because huggingface_hub makes every file of its cache such a link: from
    ``snapshots/REVISION`` into ``blobs`` of the same repository.
    """
    if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise CheckpointError(f"{folder}: {name!r} is no plain file name, and lowbit reads nothing outside the folder")
    try:
        root = folder.resolve(strict=True)
        real = (root / name).resolve(strict=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
        raise CheckpointError(
            f"{folder} has no readable file {name!r}; download it, or remove what names it"
        ) from error
    from_cache = root.parent.name == "snapshots" and real.parent == root.parent.parent / "blobs"
    if not (real.is_relative_to(root) or from_cache):
        raise CheckpointError(f"{folder}: {name!r} is a link out of the folder; put the file itself there")
    if not real.is_file():
        raise CheckpointError(f"{folder}: {name!r} is not a regular file")
    return folder / name


def read_config(folder: Path) -> dict[str, Any]:
    """Return ``config.json``; {} when there is none."""
    if CONFIG not in file_names(folder):
        return {}
    return read_object(resolve_inside(folder, CONFIG), unique=False)


def quantization_config(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what a config says of quantization, at its top or in its text_config, as transformers looks for it."""
    text_config = config.get("text_config")
    for place in (config, text_config if isinstance(text_config, dict) else {}):
        for key in QUANTIZATION_KEYS:
            if isinstance(found := place.get(key), dict):
                return found
    return None


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config that says nothing of quantization."""
    kept = {key: value for key, value in config.items() if key not in QUANTIZATION_KEYS}
    if isinstance(text_config := kept.get("text_config"), dict):
        kept["text_config"] = {key: value for key, value in text_config.items() if key not in QUANTIZATION_KEYS}
    return kept


def side_files(folder: Path, own: frozenset[str] = frozenset({CONFIG})) -> tuple[SideFile, ...]:
    """Return every file at the top of the folder that holds no weights, by name; dotfiles and folders are left out.

    Files are carried as paths and read when they are copied. ``own`` are the files that the format writes itself. Raises
    CheckpointError for a link out of the folder.
    """
    weights = (WEIGHTS_SUFFIX, *PICKLE_SUFFIXES, *OTHER_WEIGHTS_SUFFIXES)
    names = [name for name in file_names(folder) if not name.removesuffix(INDEX_SUFFIX).endswith(weights)]
    return tuple(SideFile(name, resolve_inside(folder, name)) for name in names if name not in own)
