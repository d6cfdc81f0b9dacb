"""Reading a Hugging Face folder whose quantized modules are a few tensors each.

``P.qweight``, ``P.scales`` and more stand in place of ``P.weight``. Which tensors, and what they mean, a ``ModuleReader``
knows; everything else comes back as it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowbit.errors import CheckpointError
from lowbit.interfaces import Checkpoint, Entry, Importer, Packer, Value
from lowbit.metadata import Metadata
from lowbit.parts import TensorSpec
from lowbit.scheme import Scheme
from lowbit.tensors import PackedSpec, PackedTensor
from lowbit_formats.checkpoint_folder import (
    CONFIG,
    file_names,
    quantization_config,
    read_config,
    resolve_inside,
    side_files,
    without_quantization,
)
from lowbit_formats.module_settings import WEIGHT
from lowbit_formats.shards import ShardSet, WeightFiles, find_weights, no_weights
from lowbit_formats.strict_json import read_object

CONFIG_FILES = frozenset({CONFIG, "quantize_config.json", "quant_config.json", "quantization_config.json"})
"""Files in which GPTQ, AWQ and auto-round say how they quantized; each exporter writes its own."""


class StoredModule:
    """The tensors of one quantized module as files hold them, by suffix."""

    def __init__(self, name: str, specs: Mapping[str, TensorSpec], shards: ShardSet) -> None:
        self.name, self._specs, self._shards = name, specs, shards

    def __contains__(self, suffix: str) -> bool:
        return suffix in self._specs

    def tensor(self, suffix: str) -> str:
        """Return a tensor's name in the files."""
        return f"{self.name}.{suffix}"

    def matrix(self, suffix: str, *dtypes: torch.dtype) -> tuple[int, int]:
        """Return the shape of a 2-D tensor of one of ``dtypes`` (none given: any); CheckpointError when it is none or missing."""
        spec = self.spec(suffix)
        if len(spec.shape) != 2 or (dtypes and spec.dtype not in dtypes):
            wanted = " ".join(filter(None, ("a 2-D", " or ".join(map(_name, dtypes)), "tensor")))
            raise CheckpointError(f"{self.tensor(suffix)} must be {wanted}, got {_described(spec)}")
        return spec.shape[0], spec.shape[1]

    def spec(self, suffix: str) -> TensorSpec:
        """Return dtype and shape of a tensor; raise CheckpointError when it is missing."""
        if suffix not in self._specs:
            present = ", ".join(self._specs)
            raise CheckpointError(f"{self.name} has {present}, but no {suffix}; the checkpoint is incomplete")
        return self._specs[suffix]

    def dtype(self, suffix: str) -> str:
        """Return the name of a tensor's dtype, as schemes write it."""
        return _name(self._specs[suffix].dtype)

    def expect(self, suffix: str, spec: TensorSpec, because: str) -> None:
        """Raise CheckpointError unless the tensor is there and is what the rest of the checkpoint says."""
        found = self._specs.get(suffix)
        if found != spec:
            got = f"is {_described(found)}" if found else "is missing"
            raise CheckpointError(f"{self.tensor(suffix)} {got}, but {because} needs {_described(spec)}")

    def read(self, suffix: str) -> Tensor:
        """Return a tensor."""
        return self._shards.read(self.tensor(suffix))

    def scales(self, suffix: str) -> Tensor:
        """Return a tensor of scales; raise CheckpointError for NaN or infinity."""
        values = self.read(suffix)
        check_finite(self.tensor(suffix), values)
        return values


@dataclass(frozen=True, slots=True)
class PackedModule:
    """A quantized module: what it is, and how its buffers are read."""

    spec: PackedSpec
    buffers: Callable[[], Mapping[str, Tensor]]


class ModuleReader(ABC):
    """Knows the tensors of one format's modules; made for one checkpoint, because it holds what its config says."""

    suffixes: ClassVar[tuple[str, ...]]
    """The tensors that belong to a module; the first is the one by which it is known."""
    telltale: ClassVar[tuple[str, ...]] = ()
    """Suffixes that no other tensor has: without the first of ``suffixes`` beside it, such a tensor is half a module."""

    @abstractmethod
    def open(self, stored: StoredModule) -> PackedModule:
        """Return the module; raise CheckpointError, naming tensor and value, when its tensors contradict the config."""

    def provenance(self) -> Mapping[str, str]:
        """Return what was noticed while opening modules, for the checkpoint's provenance."""
        return {}


class QuantizedCheckpoint(Checkpoint):
    """An open folder; modules are opened at once, because small tensors (zero points, g_idx) decide their schemes."""

    def __init__(self, path: Path, files: WeightFiles, reader: ModuleReader, config: Mapping[str, Any]) -> None:
        self.path = path
        others = side_files(path, CONFIG_FILES)
        self._shards = ShardSet(files)
        try:
            self._modules = {stored.name + WEIGHT: reader.open(stored) for stored in _modules(self._shards, reader)}
            self._check_whole(reader)
            self._check_modules(reader.suffixes)
            self.entries: Mapping[str, Entry] = dict(self._in_file_order(reader.suffixes))
        except BaseException:
            self.close()
            raise
        provenance = {"source": path.resolve().name, **reader.provenance()}
        self.metadata = Metadata(without_quantization(config), others, provenance)

    def read(self, name: str) -> Value:
        """Read one tensor, or all buffers of a module; raises CheckpointError for scales that are NaN or infinite."""
        if name not in self._modules:
            return self._shards.read(name)
        module = self._modules[name]
        return PackedTensor(module.spec, module.buffers())

    def close(self) -> None:
        """Close the files."""
        self._shards.close()

    def _check_whole(self, reader: ModuleReader) -> None:
        """Raise CheckpointError for a tensor that only a module has, where there is no module."""
        for name in self._shards:
            weight = _weight_of(name, reader.telltale)
            if weight != name and weight not in self._modules:
                mark = f"{weight.removesuffix(WEIGHT)}.{reader.suffixes[0]}"
                raise CheckpointError(f"{name} is there, but {mark} is not; the checkpoint is incomplete")

    def _check_modules(self, suffixes: tuple[str, ...]) -> None:
        """Raise CheckpointError without modules, or for one that is plain, too; some formats call their codes ``weight``."""
        if not self._modules:
            raise CheckpointError(
                f"{self.path} says that it is quantized, but has no tensor *.{suffixes[0]}; remove the quantization_config "
                "if its weights are plain"
            )
        twice = self._modules.keys() & self._shards.keys()
        if twice and WEIGHT.removeprefix(".") not in suffixes:
            raise CheckpointError(f"{min(twice)} is there twice, plain and quantized; remove one of them")

    def _in_file_order(self, suffixes: tuple[str, ...]) -> Iterator[tuple[str, Entry]]:
        seen = set()
        for name, tensor in self._shards.items():
            weight = _weight_of(name, suffixes)
            if weight not in self._modules:
                yield name, tensor.spec
            elif weight not in seen:
                seen.add(weight)
                yield weight, self._modules[weight].spec


class FolderImporter(Importer):
    """Reads folders of one ``quant_method``."""

    priority = 5
    methods: ClassVar[tuple[str, ...]]
    """The values of ``quant_method`` that mean this format; the first is assumed for ``own_files`` without one."""
    own_files: ClassVar[tuple[str, ...]] = ()
    """Files that say what config.json leaves out."""

    def why_not(self, path: Path) -> str | None:
        """Refuse what is no folder, and folders of another ``quant_method``."""
        if not path.is_dir():
            return f"{path.name} is no folder"
        try:
            found = self.quantization(path, read_config(path))
        except CheckpointError as error:
            return str(error)
        method = found.get("quant_method") if found else None
        if method in self.methods:
            return None
        return f"{path.name} has quant_method {method!r}, not {self.methods[0]!r}"

    def open(self, path: Path) -> QuantizedCheckpoint:
        """Open a folder; raises CheckpointError, with a sentence, for anything malformed."""
        if reason := self.why_not(path):
            raise CheckpointError(f"format {self.format!r}: {reason}")
        config = read_config(path)
        said, files = self.quantization(path, config), find_weights(path)
        if not files.paths:
            raise CheckpointError(no_weights(path))
        return QuantizedCheckpoint(path, files, self.reader(said or {}, f"the quantization_config of {path}"), config)

    @abstractmethod
    def reader(self, config: Mapping[str, Any], where: str) -> ModuleReader:
        """Return a reader for what a quantization config says; raise CheckpointError, naming ``where``, if it makes no sense."""

    def quantization(self, folder: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return what a folder says of quantization, with its ``quant_method``; None when it says nothing."""
        if found := quantization_config(config):
            return found
        for name in self.own_files:
            if name in file_names(folder):
                document = read_object(resolve_inside(folder, name), unique=False)
                return {**document, "quant_method": document.get("quant_method") or self.methods[0]}
        return None


_EXPONENTS = {torch.float16: 0x7C00, torch.bfloat16: 0x7F80}
"""The bits of an exponent; all ones mean NaN or infinity."""


def check_finite(name: str, values: Tensor) -> None:
    """Raise CheckpointError, naming tensor, value and place, unless every value is finite."""
    if (exponent := _EXPONENTS.get(values.dtype)) and values.numel():
        # numpy, because torch would wake its other threads for some 50 us of work
        bits = values.contiguous().view(torch.int16).numpy()
        if (bits & exponent).max() < exponent:
            return
    finite = torch.isfinite(values if values.dtype.itemsize > 1 else values.float())
    if not bool(finite.all()):
        place = (~finite).nonzero()[0].tolist()
        raise CheckpointError(
            f"{name} holds NaN or infinity ({float(values[tuple(place)])} at {place}), and so would the weight; quantize the "
            "model again"
        )


def packed_spec(packer: Packer, scheme: Scheme, shape: tuple[int, int], name: str) -> PackedSpec:
    """Return a packer's spec; raise CheckpointError, naming the module, for a weight that it refuses."""
    if reason := packer.why_not(scheme, shape):
        raise CheckpointError(f"{name} is a {scheme.summary()} weight of {shape[0]}x{shape[1]}: {reason}")
    return packer.spec(scheme, shape)


def _modules(shards: ShardSet, reader: ModuleReader) -> Iterator[StoredModule]:
    mark = f".{reader.suffixes[0]}"
    for name in shards:
        if name.endswith(mark):
            module = name.removesuffix(mark)
            present = [suffix for suffix in reader.suffixes if f"{module}.{suffix}" in shards]
            specs = {suffix: shards[f"{module}.{suffix}"].spec for suffix in present}
            yield StoredModule(module, specs, shards)


def _weight_of(name: str, suffixes: tuple[str, ...]) -> str:
    """Return the weight that a tensor would belong to, or its own name; a suffix may have dots in it."""
    owners = (name.removesuffix(f".{suffix}") for suffix in suffixes if name.endswith(f".{suffix}"))
    return next((owner + WEIGHT for owner in owners), name)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _described(spec: TensorSpec) -> str:
    return f"{_name(spec.dtype)} {list(spec.shape)}"
