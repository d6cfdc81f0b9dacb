"""Format ``native``: every layout byte for byte, in safetensors files with a table of contents. SPEC.md describes it.

The files are not named ``model*.safetensors``, on purpose: transformers (5.23, and 4) only warns of a quant_method that it does
not know, and then runs the model with random weights in place of the packed ones. Without a file of that name it stops.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

import lowbit
from lowbit.errors import CheckpointError
from lowbit.hookspecs import hookimpl
from lowbit.interfaces import DEFAULT_SHARD_SIZE, Checkpoint, Entry, Exporter, Importer, Value
from lowbit.metadata import Metadata
from lowbit.tensors import PackedSpec, PackedTensor
from lowbit_formats import native_manifest as manifest
from lowbit_formats.checkpoint_folder import CONFIG, read_config, resolve_inside, side_files, without_quantization
from lowbit_formats.output_folder import announced, check_side_files, copy_side_files, new_folder, write_json
from lowbit_formats.quantized_folder import check_finite
from lowbit_formats.safetensors_files import ShardedWriter
from lowbit_formats.shards import ShardSet, find_weights
from lowbit_formats.strict_json import read_object

STEM = "lowbit"
OWN_FILES = frozenset({CONFIG, manifest.FILE})


class NativeCheckpoint(Checkpoint):
    """An open native folder; no packer is needed to read it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        document = read_object(resolve_inside(path, manifest.FILE))
        files = find_weights(path, STEM)
        if not files.paths:
            raise CheckpointError(
                f"{path} has a {manifest.FILE}, but no {STEM}*.safetensors; copy the whole folder again"
            )
        config, others = without_quantization(read_config(path)), side_files(path, OWN_FILES)
        self._shards = ShardSet(files)
        try:
            stored = {name: tensor.spec for name, tensor in self._shards.items()}
            contents = manifest.parse(document, stored, str(path / manifest.FILE))
        except BaseException:
            self.close()
            raise
        self.entries, self._buffers = contents.entries, contents.buffers
        self.metadata = Metadata(config, others, contents.provenance)

    def read(self, name: str) -> Value:
        """Read one tensor, or all buffers of a packed weight; CheckpointError for scales that are NaN or infinite."""
        return self._value(name, self._shards.read)

    def map(self, name: str) -> Value:
        """Map one tensor, or all buffers of a packed weight; CheckpointError as of ``read``."""
        return self._value(name, self._shards.map)

    def _value(self, name: str, read: Callable[[str], Tensor]) -> Value:
        entry = self.entries[name]
        if not isinstance(entry, PackedSpec):
            return read(name)
        buffers = {buffer: read(stored) for buffer, stored in self._buffers[name].items()}
        for buffer, values in buffers.items():
            if values.is_floating_point():
                check_finite(self._buffers[name][buffer], values)
        return PackedTensor(entry, buffers)

    def close(self) -> None:
        """Close the files."""
        self._shards.close()


class NativeImporter(Importer):
    """Reads a folder with a ``lowbit.json``."""

    format = "native"
    priority = 10

    def why_not(self, path: Path) -> str | None:
        """Refuse what has no ``lowbit.json``."""
        return None if (path / manifest.FILE).is_file() else f"{path.name} is no folder with a {manifest.FILE}"

    def open(self, path: Path) -> NativeCheckpoint:
        """Open a folder; raises CheckpointError, with a sentence, for anything malformed."""
        return NativeCheckpoint(path)


class NativeExporter(Exporter):
    """Writes any packed weight as its buffers, and any plain tensor as it is."""

    format = "native"
    layouts = None

    def check(self, entries: Mapping[str, Entry], metadata: Metadata) -> None:
        """Refuse names that would meet in the files, dtypes that these cannot hold, and side files outside the folder."""
        manifest.stored_specs(entries)
        check_side_files(metadata.side_files, STEM, OWN_FILES)

    def write(
        self,
        path: Path,
        entries: Mapping[str, Entry],
        stream: Iterable[tuple[str, Value]],
        metadata: Metadata,
        shard_size: int = DEFAULT_SHARD_SIZE,
    ) -> None:
        """Write a folder; see ``Exporter.write``. The buffers of one weight stay in one file."""
        self.check(entries, metadata)
        groups = manifest.stored_specs(entries)
        with new_folder(path) as folder:
            write_json(folder, CONFIG, _config(metadata.config, entries))
            write_json(folder, manifest.FILE, manifest.build(entries, metadata.provenance))
            copy_side_files(folder, metadata.side_files)
            with ShardedWriter(folder, STEM, groups.values(), shard_size) as shards:
                for name, value in announced(entries, stream):
                    if isinstance(value, PackedTensor):
                        for buffer, stored in manifest.stored_names(name, value.spec).items():
                            shards.write(stored, value.buffers[buffer])
                    else:
                        shards.write(name, value)
                shards.finish()


def _config(config: Mapping[str, Any], entries: Mapping[str, Entry]) -> dict[str, Any]:
    """Return the config with a quantization_config that says who reads the folder; {} stays {}."""
    if not config:
        return {}
    layouts = sorted({entry.layout for entry in entries.values() if isinstance(entry, PackedSpec)})
    said = {
        "quant_method": "lowbit",
        "version": manifest.VERSION,
        "lowbit_version": lowbit.__version__,
        "layouts": layouts,
        "readme": "lowbit.json describes the weights; `lowbit convert THIS OUT --format hf` makes plain ones of them",
    }
    return {**without_quantization(config), "quantization_config": said}


@hookimpl
def lowbit_register_importers(register: Callable[[Importer], None]) -> None:
    """Register the importer."""
    register(NativeImporter())


@hookimpl
def lowbit_register_exporters(register: Callable[[Exporter], None]) -> None:
    """Register the exporter."""
    register(NativeExporter())
