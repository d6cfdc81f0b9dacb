"""Writing a model with packed layers: always a native folder."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import OutputError
from lowbit.interfaces import Entry, Value
from lowbit.metadata import Metadata, SideFile
from lowbit.parts import TensorSpec
from lowbit.plugins import installed
from lowbit.registry import Registry
from lowbit.runtime.packed_module import PackedModule
from lowbit.staging import check_destination, scratch, staged

FORMAT = "native"


def save(model: Any, path: str | Path, *, overwrite: bool = False, registry: Registry | None = None) -> None:
    """Write a transformers model as a native folder: packed weights byte for byte, the rest as it is.

    Raises OutputError when the destination exists (unless ``overwrite``), CheckpointError when packed weights were given up at
    load (``keep_packed=False``).
    """
    destination = Path(path)
    check_destination(destination, overwrite)
    with staged(destination, overwrite) as temporary:
        _write(model, temporary, registry or installed())


def native_save(model: Any) -> None:
    """Let ``model.save_pretrained`` write a native folder.

    What transformers would write (``model.safetensors`` and a quant_method that it may not know at the next load) would be
    loaded, without lowbit, as a model of random weights.
    """

    def save_pretrained(save_directory: str | Path, **options: Any) -> None:
        """Write a native folder into ``save_directory``; other files there stay. See ``lowbit.runtime.save.save``."""
        refused = {"state_dict", "push_to_hub", "variant"} & {key for key, value in options.items() if value}
        if refused:
            raise OutputError(f"a lowbit model is saved as a native folder, which has no {min(refused)}; leave it out")
        folder = Path(save_directory)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with scratch(folder) as temporary:
            _write(model, temporary, installed())
            folder.mkdir(exist_ok=True)
            _move(temporary, folder)

    model.save_pretrained = save_pretrained


def _move(source: Path, folder: Path) -> None:
    """Move the files of a folder into another, where weights of an earlier save, in more or fewer shards, have to go."""
    files = {file.name: file for file in source.iterdir()}
    stems = {stem for name in files if (stem := _stem(name))}
    for file in list(folder.iterdir()):
        if file.name not in files and _stem(file.name) in stems:
            file.unlink()
    for name, file in files.items():
        file.replace(folder / name)


def _stem(name: str) -> str | None:
    """Return what the names of the shards of one checkpoint and of their index begin with; None for other files."""
    found = re.fullmatch(r"(.+?)(-\d+-of-\d+)?\.safetensors(\.index\.json)?", name)
    return found[1] if found else None


def _write(model: Any, folder: Path, registry: Registry) -> None:
    values = dict(_values(model))
    entries: dict[str, Entry] = {
        name: TensorSpec.of(value) if isinstance(value, Tensor) else value.spec for name, value in values.items()
    }
    config = model.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "transformers_weights"):
        config.pop(key, None)
    config["architectures"] = [type(model).__name__]
    metadata = Metadata(
        json.loads(json.dumps(config, default=str)), _side_files(model), {"source": "a model in memory"}
    )
    registry.exporters[FORMAT].write(folder, entries, iter(values.items()), metadata)


def _side_files(model: Any) -> tuple[SideFile, ...]:
    generation = getattr(model, "generation_config", None)
    if generation is None:
        return ()
    return (SideFile("generation_config.json", content=generation.to_json_string().encode()),)


def _values(model: Any) -> Iterator[tuple[str, Value]]:
    """Yield packed weights under the name of the weight, then everything else under the names that checkpoints use."""
    from transformers.core_model_loading import revert_weight_conversion

    layers = {path: module for path, module in model.named_modules() if isinstance(module, PackedModule)}
    skipped = {f"{path}.{buffer}" for path, layer in layers.items() for buffer in layer.spec.buffers}
    layers = {path: layer for path, layer in layers.items() if not getattr(layer, "tied", "")}
    names = {
        f"{path}.weight": torch.empty(0) for path in layers
    }  # transformers renames tensors, so names travel as such
    renamed = {id(stand_in): name for name, stand_in in revert_weight_conversion(model, names).items()}
    for (name, stand_in), layer in zip(names.items(), layers.values(), strict=True):
        yield renamed.get(id(stand_in), name), layer.packed
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    plain = {name: value for name, value in model.state_dict().items() if name not in skipped and name not in tied}
    for name, value in revert_weight_conversion(model, plain).items():
        yield name, value.detach().cpu().contiguous()
