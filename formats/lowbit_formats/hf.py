"""Format ``hf``: Hugging Face folders of plain safetensors, and single ``.safetensors`` files.

Read: float weights as they are, float8 weights with their scales as bfloat16 (``fp8``). Written: what transformers'
``save_pretrained`` would write, so that any other tool can read a result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lowbit.errors import CheckpointError, NoRouteError
from lowbit.hookspecs import hookimpl
from lowbit.interfaces import DEFAULT_SHARD_SIZE, Checkpoint, Entry, Exporter, Importer, Value
from lowbit.loaders import LoaderRule
from lowbit.metadata import Metadata
from lowbit.parts import TensorSpec
from lowbit.tensors import PackedSpec
from lowbit_formats.checkpoint_folder import (
    CONFIG,
    WEIGHTS_SUFFIX,
    quantization_config,
    read_config,
    side_files,
    without_quantization,
)
from lowbit_formats.fp8 import DEFAULT_BLOCK, find_fp8, scale_names
from lowbit_formats.loader_table import loader_rules
from lowbit_formats.output_folder import announced, check_side_files, copy_side_files, new_folder, write_json
from lowbit_formats.safetensors_files import ShardedWriter
from lowbit_formats.safetensors_header import are_sizes, why_not_storable
from lowbit_formats.shards import ShardSet, WeightFiles, find_weights, no_weights

STEM = "model"
FP8_METHODS = ("fp8", "fbgemm_fp8")
"""quant_methods that mean float8 weights with scales beside them."""


class HfCheckpoint(Checkpoint):
    """An open folder or file; ``read`` returns bfloat16 for a float8 weight."""

    def __init__(self, path: Path, files: WeightFiles, config: Mapping[str, Any], metadata: Metadata) -> None:
        self.path, self.metadata = path, metadata
        block = _block_size(config, path)
        self._shards = ShardSet(files)
        try:
            specs = {name: tensor.spec for name, tensor in self._shards.items()}
            self._fp8 = find_fp8(specs, block)
        except BaseException:
            self.close()
            raise
        dropped = scale_names(self._fp8)
        decoded = {name: weight.decoded for name, weight in self._fp8.items()}
        self.entries: Mapping[str, Entry] = {
            name: decoded.get(name, spec) for name, spec in specs.items() if name not in dropped
        }

    def read(self, name: str) -> Tensor:
        """Read one tensor; raises CheckpointError when the file became shorter."""
        stored = self._shards.read(name)
        if name not in self._fp8:
            return stored
        weight = self._fp8[name]
        return weight.decode(stored, self._shards.read(weight.scale) if weight.scale else None)

    def close(self) -> None:
        """Close the files."""
        self._shards.close()


class HfImporter(Importer):
    """Reads a folder with ``config.json`` (or without) and ``*.safetensors``, or one such file."""

    format = "hf"

    def why_not(self, path: Path) -> str | None:
        """Refuse what has no safetensors, and weights that are quantized in a way of another format."""
        if not path.is_dir():
            return None if path.suffix == WEIGHTS_SUFFIX else f"{path.name} is no folder and no .safetensors file"
        try:
            if not find_weights(path).paths:
                return no_weights(path)
            return _why_not_method(path, read_config(path))
        except CheckpointError:
            return None  # it looks like this format, but is broken: open says how

    def open(self, path: Path) -> HfCheckpoint:
        """Open a folder or a file; raises CheckpointError, with a sentence, for anything malformed."""
        if not path.is_dir():
            return HfCheckpoint(path, WeightFiles((path,)), {}, Metadata(provenance={"source": path.name}))
        files, config = find_weights(path), read_config(path)
        if not files.paths:
            raise CheckpointError(no_weights(path))
        if reason := _why_not_method(path, config):
            raise CheckpointError(reason)
        source = {"source": path.resolve().name}
        return HfCheckpoint(path, files, config, Metadata(without_quantization(config), side_files(path), source))


class HfExporter(Exporter):
    """Writes ``model*.safetensors``, ``config.json`` and the side files; packed weights come here dequantized."""

    format = "hf"
    layouts = ()

    def loaders(self) -> Sequence[LoaderRule]:
        """Return the programs that load plain folders."""
        return loader_rules(self.format)

    def check(self, entries: Mapping[str, Entry], metadata: Metadata) -> None:
        """Refuse packed weights, dtypes that safetensors files cannot hold, and side files that would land elsewhere."""
        for name, entry in entries.items():
            if isinstance(entry, PackedSpec):
                raise NoRouteError(
                    f"format 'hf' holds plain weights, but {name} is packed as {entry.layout!r}",
                    {},
                    "dequantize it first, or choose the format 'native'",
                )
            if reason := why_not_storable(name, entry):
                raise CheckpointError(reason)
        check_side_files(metadata.side_files, STEM)

    def write(
        self,
        path: Path,
        entries: Mapping[str, Entry],
        stream: Iterable[tuple[str, Value]],
        metadata: Metadata,
        shard_size: int = DEFAULT_SHARD_SIZE,
    ) -> None:
        """Write a folder; see ``Exporter.write``."""
        self.check(entries, metadata)
        specs = {name: entry for name, entry in entries.items() if isinstance(entry, TensorSpec)}
        with new_folder(path) as folder:
            write_json(folder, CONFIG, with_dtype(without_quantization(metadata.config), specs))
            copy_side_files(folder, metadata.side_files)
            groups = ({name: spec} for name, spec in specs.items())
            with ShardedWriter(folder, STEM, groups, shard_size) as shards:
                for name, value in announced(entries, stream):
                    assert isinstance(value, Tensor)
                    shards.write(name, value)
                shards.finish()


def with_dtype(config: Mapping[str, Any], specs: Mapping[str, TensorSpec]) -> dict[str, Any]:
    """Return the config with the dtype of the 2-D float weights, when they have one dtype, wherever it names a dtype.

    transformers before 5 says ``torch_dtype``, since then ``dtype``; configs of multimodal models repeat it in ``*_config``.
    """
    dtypes = {spec.dtype for spec in specs.values() if len(spec.shape) == 2 and spec.dtype.is_floating_point}
    return _replace_dtype(config, str(dtypes.pop()).removeprefix("torch.")) if len(dtypes) == 1 else dict(config)


def _replace_dtype(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    def value_of(key: str, value: Any) -> Any:
        if key in ("dtype", "torch_dtype"):
            return name
        return _replace_dtype(value, name) if key.endswith("_config") and isinstance(value, dict) else value

    return {key: value_of(key, value) for key, value in config.items()}


def _why_not_method(folder: Path, config: Mapping[str, Any]) -> str | None:
    method = (quantization_config(config) or {"quant_method": "fp8"}).get("quant_method")
    if method in FP8_METHODS:
        return None
    if method == "lowbit":
        return f"{folder} was written by lowbit, but its lowbit.json is missing; copy the whole folder again"
    return (
        f"{folder} is quantized with quant_method {method!r}, and 'hf' reads plain and fp8 weights only; this takes an import "
        f"format {method!r} (`lowbit plugins` lists those installed)"
    )


def _block_size(config: Mapping[str, Any], path: Path) -> tuple[int, int]:
    block = (quantization_config(config) or {}).get("weight_block_size")
    if block is None:
        return DEFAULT_BLOCK
    if not are_sizes(block) or len(block) != 2 or 0 in block:
        raise CheckpointError(f"{path}: weight_block_size must be two positive integers, got {block!r}")
    return block[0], block[1]


@hookimpl
def lowbit_register_importers(register: Callable[[Importer], None]) -> None:
    """Register the importer."""
    register(HfImporter())


@hookimpl
def lowbit_register_exporters(register: Callable[[Exporter], None]) -> None:
    """Register the exporter."""
    register(HfExporter())
