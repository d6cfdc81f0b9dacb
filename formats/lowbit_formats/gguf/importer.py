"""Reading GGUF: a model of llama.cpp as Hugging Face names, config and tokenizer; packed weights stay packed."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from lowbit import memory
from lowbit.errors import CheckpointError
from lowbit.interfaces import Calibration, Checkpoint, Entry, Importer, Value
from lowbit.metadata import Metadata, SideFile
from lowbit.parts import TensorSpec
from lowbit.tensors import PackedSpec, PackedTensor, bit_equal
from lowbit_formats import imatrix
from lowbit_formats.checkpoint_folder import resolve_inside, side_files
from lowbit_formats.gguf import config, model_card, rope, tokenizer_files, vocabulary
from lowbit_formats.gguf.architectures import EXACT_NORMS, Architecture, check_heads, deinterleave, stored_norm
from lowbit_formats.gguf.block_types import DEQUANTIZED, FLOATS, BlockType
from lowbit_formats.gguf.header import MAGIC, Header, TensorInfo
from lowbit_formats.gguf.keys import Keys
from lowbit_formats.gguf.layouts import BY_LAYOUT, BY_TYPE
from lowbit_formats.gguf.parts import first_file, read_parts

_KEPT = "general."
_OWN = "lowbit."


class GgufImporter(Importer):
    """Reads a ``.gguf`` file, a model split over several when the first is opened, or a folder with one such model."""

    format = "gguf"
    priority = 10

    def why_not(self, path: Path) -> str | None:
        """Refuse what does not start with the four bytes ``GGUF``, and folders without exactly one model."""
        try:
            path = first_file(path) if path.is_dir() else path
        except CheckpointError as error:
            return str(error)
        if not path.is_file():
            return f"{path.name} is no file"
        try:
            with path.open("rb") as file:
                start = file.read(4)
        except OSError as error:
            return f"{path.name} cannot be read: {error.strerror or error}"
        return None if start == MAGIC else f"{path.name} starts with {start!r}, not with {MAGIC!r}"

    def open(self, path: Path) -> Checkpoint:
        """Read the header of every part, rename and check all of it; raises CheckpointError.

        The other files of a folder are side files, and stand in place of those that are rebuilt from the keys.
        """
        if path.is_dir():
            first = resolve_inside(path, first_file(path).name)
            return GgufCheckpoint(first, read_parts(first), side_files(path))
        return GgufCheckpoint(path, read_parts(path))

    def calibration(self, path: Path, checkpoint: Checkpoint) -> Mapping[str, Calibration] | None:
        """Read an importance matrix of llama.cpp."""
        return imatrix.calibration(path, checkpoint)


@dataclass(frozen=True, slots=True)
class _Source:
    """Where a tensor comes from: a file's descriptor, its place there, and what its values need on the way."""

    descriptor: int
    info: TensorInfo
    heads: int | None = None
    offset: float = 0.0
    exact: Tensor | None = None
    """What a norm was before the offset was added, if the file says; float32, flat."""


class GgufCheckpoint(Checkpoint):
    """An open GGUF model."""

    def __init__(self, path: Path, parts: list[Header], beside: tuple[SideFile, ...] = ()) -> None:
        self.path = path
        self._descriptors: list[int] = []
        try:
            self._open(parts, beside)
        except BaseException:
            self.close()
            raise

    def _open(self, parts: list[Header], beside: tuple[SideFile, ...]) -> None:
        keys = Keys(self.path, parts[0].keys)
        architecture = config.architecture_of(keys)
        sources = self._sources(parts)
        extra = {name: _floats(sources.pop(name)) for name in rope.TENSORS if name in sources}
        self._by_name = _renamed(keys, architecture, sources)
        self.entries: Mapping[str, Entry] = {name: _entry(self.path, source) for name, source in self._by_name.items()}
        found = _metadata(keys, architecture, self._by_name, extra)
        rebuilt = tuple(file for file in found.side_files if file.name not in {file.name for file in beside})
        self.metadata = replace(found, side_files=(*rebuilt, *beside))

    def _sources(self, parts: list[Header]) -> dict[str, _Source]:
        sources: dict[str, _Source] = {}
        for part in parts:
            descriptor = os.open(part.path, os.O_RDONLY)
            self._descriptors.append(descriptor)
            for info in part.tensors:
                if info.name in sources:
                    raise CheckpointError(f"{self.path}: two parts of the model hold {info.name}")
                sources[info.name] = _Source(descriptor, info)
        return sources

    def read(self, name: str) -> Value:
        """Read one tensor: blocks stay packed, floats keep their dtype, all else becomes float32.

        Raises CheckpointError for blocks whose scale is NaN or infinite: llama.cpp loads them, and answers NaN.
        """
        assert self._descriptors, "the checkpoint is closed"
        source, entry = self._by_name[name], self.entries[name]
        if isinstance(entry, PackedSpec):
            rows, width = entry.buffers["blocks"].shape
            packed = PackedTensor(entry, {"blocks": _raw(source).view(rows, width)})
            if where := BY_LAYOUT[entry.layout].not_finite(packed):
                raise CheckpointError(
                    f"{self.path}: {source.info.name}: {where}; the file is damaged, take another copy"
                )
            if source.heads:
                packed = PackedTensor(entry, {"blocks": deinterleave(packed.buffers["blocks"], source.heads)})
            return packed
        values = _floats(source)
        if source.heads:
            values = deinterleave(values, source.heads)
        return _without_offset(values, source) if source.offset else values

    def close(self) -> None:
        """Close the files."""
        while self._descriptors:
            os.close(self._descriptors.pop())


def _renamed(keys: Keys, architecture: Architecture, sources: Mapping[str, _Source]) -> dict[str, _Source]:
    """Return the sources by Hugging Face name, with what their values need; every name is known and none is missing."""
    blocks = keys.integer("block_count")
    heads = keys.integer("attention.head_count")
    kv_heads = keys.integer("attention.head_count_kv", heads)
    renamed: dict[str, _Source] = {}
    for ggml_name, source in sources.items():
        name = architecture.hf_name(ggml_name, blocks)
        if name is None:
            raise CheckpointError(
                f"{keys.path} holds {ggml_name}, which a {architecture.name} model of {blocks} blocks does not have"
            )
        shared = architecture.heads_of(name, heads, kv_heads)
        if shared is not None:
            check_heads(name, source.info.shape[0], shared)
        renamed[name] = replace(source, heads=shared, offset=architecture.offset_of(name))
    if blocks > len(sources):
        raise CheckpointError(f"{keys.path} claims {blocks:,} blocks and holds {len(sources):,} tensors; it is damaged")
    if missing := [name for name in architecture.required(blocks) if name not in renamed]:
        wanted = architecture.ggml_name(missing[0], blocks)
        raise CheckpointError(f"{keys.path} has no tensor {wanted}, without which the model does not work")
    return _with_exact_norms(keys, renamed)


def _with_exact_norms(keys: Keys, sources: dict[str, _Source]) -> dict[str, _Source]:
    """Hand each norm its part of the key EXACT_NORMS; a key of another length belongs to another model and is ignored."""
    exact = torch.tensor(keys.items(EXACT_NORMS, float, []), dtype=torch.float32)
    norms = {name: math.prod(source.info.shape) for name, source in sources.items() if source.offset}
    if len(exact) != sum(norms.values()):
        return sources
    parts = dict(zip(norms, torch.split(exact, list(norms.values())), strict=True)) if norms else {}
    return {name: replace(source, exact=parts.get(name)) for name, source in sources.items()}


def _without_offset(stored: Tensor, source: _Source) -> Tensor:
    """Return a norm as Hugging Face has it: what the file keeps besides, if it belongs to what is stored, else the rest."""
    stored = stored.to(torch.float32)
    if source.exact is not None:
        exact = source.exact.view(stored.shape)
        if bit_equal(stored_norm(exact, source.offset), stored):
            return exact.clone()
    return stored - source.offset


def _entry(path: Path, source: _Source) -> Entry:
    info = source.info
    if info.type.name in BY_TYPE and len(info.shape) == 2:
        packer = BY_TYPE[info.type.name]
        return packer.spec(packer.scheme, (info.shape[0], info.shape[1]))
    if info.type.name in FLOATS:
        return TensorSpec(torch.float32 if source.offset else FLOATS[info.type.name], info.shape)
    if not _dequantizable(info.type):
        raise CheckpointError(f"{path}: {info.name} is of type {info.type.name}, which is not read here")
    return TensorSpec(torch.float32, info.shape)


def _dequantizable(type: BlockType) -> bool:
    return type.name in BY_TYPE or type.name in DEQUANTIZED


def _metadata(
    keys: Keys, architecture: Architecture, sources: Mapping[str, _Source], extra: Mapping[str, Tensor]
) -> Metadata:
    rows = sources["model.embed_tokens.weight"].info.shape[0]
    model = config.from_keys(keys, architecture, sources.keys(), rows, extra)
    provenance = {
        name: value
        for name, value in keys.values.items()
        if name.startswith(_KEPT) and isinstance(value, str) and not model_card.owns(name)
    }
    provenance.pop("general.architecture")
    provenance |= {
        name.removeprefix(_OWN): value
        for name, value in keys.values.items()
        if name.startswith(_OWN) and isinstance(value, str)
    }
    words = vocabulary.from_keys(keys)
    roles = {f"{role}_token_id": words.roles.get(role) for role in ("bos", "eos", "pad")} if words else {}
    reason = tokenizer_files.why_not(words) if words else "the file holds no vocabulary"
    card = model_card.from_keys(keys)
    files = {} if card is None else {model_card.CARD: card}
    if words is None or reason is not None:
        provenance["tokenizer"] = f"not rebuilt: {reason}"
    else:
        context = model["max_position_embeddings"]
        files |= tokenizer_files.build(words, architecture.name, context, model_card.sampling(keys))
    rebuilt = tuple(SideFile(name, content=content) for name, content in files.items())
    return Metadata({**model, **roles}, rebuilt, provenance)


def _raw(source: _Source) -> Tensor:
    """Read the bytes of a tensor into memory of their own; safe from several threads."""
    info = source.info
    raw = memory.empty((info.nbytes,), torch.uint8)
    view, done = raw.numpy().data, 0
    while done < info.nbytes:
        count = os.preadv(source.descriptor, [view[done:]], info.start + done)
        if count == 0:
            raise CheckpointError(f"{info.name} cannot be read whole; the file became shorter while it was open")
        done += count
    return raw


def _floats(source: _Source) -> Tensor:
    """Read a tensor that is not kept packed: floats as they are, blocks dequantized to float32."""
    info, raw = source.info, _raw(source)
    if info.type.name in FLOATS:
        return raw.view(FLOATS[info.type.name]).view(info.shape)
    if not _dequantizable(info.type):
        raise CheckpointError(f"{info.name} is of type {info.type.name}, which is not read here")
    return _dequantizer(info.type)(raw.view(-1, info.type.row_bytes(info.shape[-1]))).view(info.shape)


def _dequantizer(type: BlockType) -> Callable[[Tensor], Tensor]:
    """Return a function from uint8 rows of blocks to float32 rows of weights, by the gguf package."""
    import gguf  # here, because it is slow to import and few files need it

    def dequantize(rows: Tensor) -> Tensor:
        return torch.from_numpy(gguf.dequantize(rows.numpy(), gguf.GGMLQuantizationType(type.id)))

    return dequantize
