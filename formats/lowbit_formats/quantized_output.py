"""Writing a Hugging Face folder whose quantized modules are a few tensors each, with a quantization_config that says so."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from lowbit.errors import CheckpointError, NoRouteError
from lowbit.interfaces import DEFAULT_SHARD_SIZE, Entry, Exporter, Value
from lowbit.loaders import LoaderRule
from lowbit.metadata import Metadata
from lowbit.parts import TensorSpec
from lowbit.tensors import PackedSpec, PackedTensor
from lowbit_formats.checkpoint_folder import CONFIG, without_quantization
from lowbit_formats.hf import with_dtype
from lowbit_formats.loader_table import loader_rules
from lowbit_formats.module_settings import KEPT, WEIGHT, module_name
from lowbit_formats.output_folder import announced, check_side_files, copy_side_files, new_folder, write_json
from lowbit_formats.safetensors_files import ShardedWriter
from lowbit_formats.safetensors_header import why_not_storable

STEM = "model"
EMBEDDINGS = ("*embed*", "*wte.weight", "*wpe.weight")
"""Names of weights that are looked up, not multiplied by."""


class FolderExporter(Exporter):
    """Writes ``model*.safetensors``, ``config.json`` with a quantization_config, and the side files."""

    quantizers = ("autoround",)
    config_copy: ClassVar[str | None] = None
    """A second file for the quantization_config, where loaders look for one."""

    @abstractmethod
    def quantization_config(self, packed: Mapping[str, PackedSpec], plain: Collection[str]) -> dict[str, Any]:
        """Return the quantization_config for packed modules and for the 2-D modules that stay plain, by module name.

        Raises NoRouteError for modules that one file cannot hold together.
        """

    def for_model(self, config: Mapping[str, Any], model: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the quantization_config completed with what the model's own config says; the default adds nothing."""
        return config

    def document(self, model: Mapping[str, Any], config: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return ``config.json`` from the model's own config and the quantization_config."""
        return {**model, "quantization_config": config}

    def tensor_specs(self, spec: PackedSpec) -> Mapping[str, TensorSpec]:
        """Return the tensors of a module by suffix, before there is data; the default has those of ``stored``."""
        return {suffix: found for suffix, found in spec.buffers.items() if suffix not in self.derived()}

    def stored(self, packed: PackedTensor, config: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """Return the tensors of a module by suffix, under the quantization_config; the default stores every buffer."""
        return packed.buffers

    def derived(self) -> frozenset[str]:
        """Return the buffers that ``stored`` leaves out, because a reader can make them."""
        return frozenset()

    def kept(self, packed: PackedTensor) -> Sequence[str]:
        """Name what a reader could not tell from the tensors: an integer zero that happens to be the midpoint everywhere."""
        return ()

    def packs(self, name: str) -> bool:
        """Refuse embeddings: loaders of these formats quantize linear layers only."""
        return not any(fnmatchcase(name, pattern) for pattern in EMBEDDINGS)

    def loaders(self) -> Sequence[LoaderRule]:
        """Return the rules of the programs that load this format."""
        return loader_rules(self.format)

    def model_config(self, entries: Mapping[str, Entry], metadata: Metadata) -> Mapping[str, Any]:
        """Return the model's own config with the dtype of the scales, where they have one."""
        return with_dtype(without_quantization(metadata.config), _scales(entries))

    def check(self, entries: Mapping[str, Entry], metadata: Metadata) -> None:
        """Refuse names that would meet in the files, dtypes that these cannot hold, and what ``quantization_config`` refuses."""
        packed, plain = _modules(entries)
        if not packed:
            question = f"format {self.format!r} holds quantized weights, and no weight is quantized"
            raise NoRouteError(question, {}, "give --quantizer, or choose the format 'hf'")
        self.quantization_config(packed, plain)
        self._groups(entries)
        check_side_files(metadata.side_files, STEM, self._own_files())

    def write(
        self,
        path: Path,
        entries: Mapping[str, Entry],
        stream: Iterable[tuple[str, Value]],
        metadata: Metadata,
        shard_size: int = DEFAULT_SHARD_SIZE,
    ) -> None:
        """Write a folder; see ``Exporter.write``. The tensors of one module stay in one file."""
        self.check(entries, metadata)
        model = self.model_config(entries, metadata)
        config = self.for_model(self.quantization_config(*_modules(entries)), model)
        kept: dict[str, list[str]] = {}
        with new_folder(path) as folder:
            copy_side_files(folder, metadata.side_files)
            with ShardedWriter(folder, STEM, self._groups(entries), shard_size) as shards:
                for name, value in announced(entries, stream):
                    if not isinstance(value, PackedTensor):
                        shards.write(name, value)
                        continue
                    for suffix, tensor in self.stored(value, config).items():
                        shards.write(f"{module_name(name)}.{suffix}", tensor)
                    if reasons := self.kept(value):
                        kept[module_name(name)] = list(reasons)
                shards.finish()
            said = {**config, KEPT: kept} if kept else config
            write_json(folder, CONFIG, self.document(model, said))
            if self.config_copy:
                write_json(folder, self.config_copy, said)

    def _groups(self, entries: Mapping[str, Entry]) -> list[dict[str, TensorSpec]]:
        """Return the tensors of the files, those of a module together; raise CheckpointError for one that cannot be there."""
        groups: list[dict[str, TensorSpec]] = []
        names: set[str] = set()
        for name, entry in entries.items():
            group = self._tensors(name, entry)
            if twice := names & group.keys():
                raise CheckpointError(f"{min(twice)} would be in the files twice, once for {name}; rename one of them")
            for tensor, spec in group.items():
                if reason := why_not_storable(tensor, spec):
                    raise CheckpointError(reason)
            names |= group.keys()
            groups.append(group)
        return groups

    def _tensors(self, name: str, entry: Entry) -> dict[str, TensorSpec]:
        if not isinstance(entry, PackedSpec):
            return {name: entry}
        if entry.layout not in (self.layouts or ()):
            known = ", ".join(self.layouts or ())
            question = f"format {self.format!r} stores the layouts {known}, and {name} is packed as {entry.layout!r}"
            raise NoRouteError(question, {}, "choose the format 'native'")
        if not name.endswith(WEIGHT):
            raise CheckpointError(
                f"{name} is quantized, and format {self.format!r} quantizes names that end in {WEIGHT}"
            )
        return {f"{module_name(name)}.{suffix}": spec for suffix, spec in self.tensor_specs(entry).items()}

    def _own_files(self) -> frozenset[str]:
        return frozenset({CONFIG, self.config_copy} - {None})  # type: ignore[arg-type]  # mypy keeps the None


def uniform(format: str, packed: Mapping[str, PackedSpec], what: Mapping[str, object], elsewhere: str) -> None:
    """Raise NoRouteError unless ``what`` (one value for each module) is the same for all of them."""
    counts = Counter(what.values())
    if len(counts) > 1:
        usual = counts.most_common(1)[0][0]
        odd = next(name for name in packed if what[name] != usual)
        question = f"format {format!r} has one setting for all weights: {odd} has {what[odd]}, most have {usual}"
        raise NoRouteError(question, {}, elsewhere)


def _scales(entries: Mapping[str, Entry]) -> dict[str, TensorSpec]:
    """Return the scales of every packed weight, whose dtype the model's is to be.

    Loaders cast scales to the model's dtype (vLLM 0.33), and bfloat16 keeps one float16 scale in seven.
    """
    packed = {name: entry for name, entry in entries.items() if isinstance(entry, PackedSpec)}
    return {
        f"{name}.{buffer}": spec
        for name, entry in packed.items()
        for buffer, spec in entry.buffers.items()
        if spec.dtype.is_floating_point
    }


def _modules(entries: Mapping[str, Entry]) -> tuple[dict[str, PackedSpec], list[str]]:
    """Return the packed modules, and the names of plain 2-D ones."""
    packed = {module_name(name): entry for name, entry in entries.items() if isinstance(entry, PackedSpec)}
    plain = [
        module_name(name)
        for name, entry in entries.items()
        if isinstance(entry, TensorSpec) and len(entry.shape) == 2 and name.endswith(WEIGHT)
    ]
    return packed, plain
