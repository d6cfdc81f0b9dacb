"""The weight files of a checkpoint folder: found by transformers' rules, read as one mapping."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from lowbit.errors import CheckpointError
from lowbit_formats.checkpoint_folder import INDEX_SUFFIX, PICKLE_SUFFIXES, WEIGHTS_SUFFIX, file_names, resolve_inside
from lowbit_formats.safetensors_files import SafetensorsReader
from lowbit_formats.safetensors_header import StoredTensor
from lowbit_formats.strict_json import read_object


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """Safetensors files in the order of their names, and the file in which an index places each tensor, if there is one."""

    paths: tuple[Path, ...]
    places: Mapping[str, str] = field(default_factory=dict)


class ShardSet(Mapping[str, StoredTensor]):
    """The tensors of several safetensors files as one mapping, file by file and in the order of their bytes.

    Raises CheckpointError when a file is malformed, two files hold a tensor of the same name, or a tensor is not in the file
    in which the index places it. A tensor that the index forgets is there all the same.
    """

    def __init__(self, files: WeightFiles) -> None:
        self._tensors: dict[str, StoredTensor] = {}
        self._reader_of: dict[str, SafetensorsReader] = {}
        with ExitStack() as opened:
            for path in files.paths:
                self._add(opened.enter_context(SafetensorsReader(path)))
            self._check_places(files.places)
            self._opened = opened.pop_all()

    def read(self, name: str) -> Tensor:
        """Return one tensor."""
        return self._reader_of[name].read(name)

    def map(self, name: str) -> Tensor:
        """Return one tensor, mapped into memory where it is large."""
        return self._reader_of[name].map(name)

    def close(self) -> None:
        """Close the files."""
        self._opened.close()

    def path_of(self, name: str) -> Path:
        """Return the file that holds a tensor."""
        return self._reader_of[name].path

    def __getitem__(self, name: str) -> StoredTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def _add(self, reader: SafetensorsReader) -> None:
        for name, tensor in reader.tensors.items():
            if name in self._tensors:
                raise CheckpointError(
                    f"tensor {name!r} is in both {self.path_of(name)} and {reader.path.name}; remove the file that does not "
                    "belong to the checkpoint"
                )
            self._tensors[name] = tensor
            self._reader_of[name] = reader

    def _check_places(self, places: Mapping[str, str]) -> None:
        for name, file in places.items():
            if name not in self or self.path_of(name).name != file:
                raise CheckpointError(
                    f"the index places tensor {name!r} in {file}, which does not hold it; download both again"
                )


def find_weights(folder: Path, stem: str | None = None) -> WeightFiles:
    """Return the weight files of a folder; there may be none.

    transformers' order: ``model.safetensors`` alone, else the files of ``model.safetensors.index.json``, else those of the
    one other index, else every ``*.safetensors``. With ``stem`` (in place of ``model``) only the first two count. Other
    weights beside the chosen ones (Mistral's ``consolidated.safetensors``) are a second copy, and left alone.

    Raises CheckpointError for an index that leads out of the folder, names missing files, or is one of several.
    """
    names = file_names(folder)
    single = f"{stem or 'model'}{WEIGHTS_SUFFIX}"
    if single in names:
        return WeightFiles((resolve_inside(folder, single),))
    if single + INDEX_SUFFIX in names:
        return _indexed(folder, single + INDEX_SUFFIX)
    if stem is not None:
        return WeightFiles(())
    indexes = [name for name in names if name.endswith(WEIGHTS_SUFFIX + INDEX_SUFFIX)]
    if len(indexes) > 1:
        raise CheckpointError(
            f"{folder} holds several checkpoints ({', '.join(indexes)}); keep one of them in a folder"
        )
    if indexes:
        return _indexed(folder, indexes[0])
    return WeightFiles(tuple(resolve_inside(folder, name) for name in names if name.endswith(WEIGHTS_SUFFIX)))


def no_weights(folder: Path) -> str:
    """Return the sentence for a folder without safetensors files."""
    pickles = [name for name in file_names(folder) if name.endswith(PICKLE_SUFFIXES)]
    if pickles:
        return (
            f"{folder} holds pickled weights only ({pickles[0]}), and lowbit never unpickles, because a pickle can run any "
            "code; take the model's safetensors branch, or convert it in a sandbox with transformers: "
            "from_pretrained(...).save_pretrained(..., safe_serialization=True)"
        )
    return f"{folder} holds no .safetensors file; give the folder that holds a model's weights"


def _indexed(folder: Path, index: str) -> WeightFiles:
    places = read_object(resolve_inside(folder, index)).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise CheckpointError(f"{folder / index} has no weight_map from tensor names to file names")
    if not places:
        raise CheckpointError(f"{folder / index} names no weight file")
    return WeightFiles(tuple(resolve_inside(folder, file) for file in sorted(set(places.values()))), places)
