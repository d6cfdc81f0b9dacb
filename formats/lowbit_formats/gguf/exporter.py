"""Writing GGUF: what llama.cpp loads, keys and tokenizer included, one tensor at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from lowbit.errors import CheckpointError, WeightError
from lowbit.interfaces import DEFAULT_SHARD_SIZE, Calibration, Checkpoint, Entry, Exporter, Value
from lowbit.loaders import LoaderRule
from lowbit.metadata import Metadata
from lowbit.parts import TensorSpec
from lowbit.scheme import Scheme
from lowbit.staging import final_place, staged
from lowbit.tensors import PackedSpec, PackedTensor
from lowbit_formats import gguf_mixes, imatrix
from lowbit_formats.gguf import config, model_card, rope, tokenizer_json, vocabulary
from lowbit_formats.gguf.architectures import (
    BY_MODEL_TYPE,
    EXACT_NORMS,
    Architecture,
    check_heads,
    interleave,
    stored_norm,
)
from lowbit_formats.gguf.block_types import FILE_TYPES, FLOAT_TYPES, FLOATS, TYPES
from lowbit_formats.gguf.keys import Key, encode, text, u32
from lowbit_formats.gguf.layouts import BY_LAYOUT, BY_TYPE
from lowbit_formats.gguf.parts import SUFFIX, ModelFiles, divided, part_name
from lowbit_formats.gguf.writer import Slot
from lowbit_formats.loader_table import loader_rules
from lowbit_formats.output_folder import announced, check_side_files, copy_side_files

# TQ1_0 and TQ2_0 hold one scheme: TQ2_0, which computes faster, takes 2.06 bits a weight where TQ1_0 takes 1.69.
_PREFERRED: tuple[str, ...] = (
    "Q8_0",
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q2_0",
    "Q1_0",
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
)
_PREFERRED += ("TQ2_0", "TQ1_0", "MXFP4", "IQ4_NL")
_TOLD: tuple[str, ...] = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
_TOLD += ("vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json")
_TOLD += (model_card.CARD, model_card.GENERATION)
_QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION


@dataclass(frozen=True, slots=True)
class _Plan:
    """Everything that a file needs before its data."""

    architecture: Architecture
    names: Mapping[str, str]
    heads: Mapping[str, int]
    slots: tuple[Slot, ...]
    extra: Mapping[str, Tensor]
    keys: tuple[Key, ...]
    norms: Mapping[str, int]
    """Where each norm is in the key EXACT_NORMS: bytes from its end."""


class GgufExporter(Exporter):
    """Writes one ``.gguf`` file of any size or, where the destination has another name, a folder.

    A folder holds files of at most ``shard_size`` bytes of tensors, named as llama.cpp splits models, and the side files, for
    which a single file has no place. Norms, biases and everything else of one dimension is stored as float32; other floats keep their dtype.
    """

    format = "gguf"
    layouts = tuple(BY_TYPE[name].layout for name in _PREFERRED)
    suffix = calibration_suffix = SUFFIX
    quantizers = ("ggml",)

    def variants(self) -> Mapping[str, Scheme]:
        """Return the schemes of ``gguf:q8_0``, ``gguf:q4_0`` and so on: of every type with blocks."""
        return {name.lower(): BY_TYPE[name].scheme for name in _PREFERRED}

    def mixes(self) -> Sequence[str]:
        """Return the file types of llama.cpp: ``gguf:q4_k_m`` gives each tensor the type that llama-quantize would."""
        return gguf_mixes.NAMES

    def mix(
        self, name: str, entries: Mapping[str, Entry], metadata: Metadata, calibrated: bool = False
    ) -> Mapping[str, Scheme]:
        """Return the scheme of every tensor that the file type quantizes."""
        return gguf_mixes.mix(name, entries, metadata, calibrated)

    def preferred(self, variant: str) -> Sequence[str]:
        """Return the variant's own layout: TQ1_0 and TQ2_0 hold one scheme, and each name means its own bytes."""
        return [BY_TYPE[variant.upper()].layout] if variant.upper() in BY_TYPE else []

    def why_no_variant(self, name: str) -> str | None:
        """Say what is missing for the other types and file types of llama.cpp."""
        return gguf_mixes.why_not(name)

    def loaders(self) -> Sequence[LoaderRule]:
        """Return what llama.cpp and others load."""
        return loader_rules(self.format)

    def plain(self, name: str, spec: TensorSpec) -> TensorSpec:
        """Store one-dimensional floats as float32: ggml's kernels read them so."""
        if len(spec.shape) == 1 and spec.dtype in FLOAT_TYPES:
            return TensorSpec(torch.float32, spec.shape)
        return spec

    def write_calibration(
        self, path: Path, measured: Mapping[str, Calibration], checkpoint: Checkpoint, tokens: int, source: str = ""
    ) -> None:
        """Write llama.cpp's importance matrix; see ``imatrix.write_calibration``."""
        imatrix.write_calibration(path, measured, checkpoint, tokens, source)

    def check(self, entries: Mapping[str, Entry], metadata: Metadata) -> None:
        """Raise CheckpointError, naming what is wrong, for a model, tensor or tokenizer that GGUF cannot tell."""
        _plan(entries, metadata)

    def write(
        self,
        path: Path,
        entries: Mapping[str, Entry],
        stream: Iterable[tuple[str, Value]],
        metadata: Metadata,
        shard_size: int = DEFAULT_SHARD_SIZE,
    ) -> None:
        """Write the file; raises what ``check`` raises, WeightError for scales that are not finite, OutputError."""
        plan, final = _plan(entries, metadata), final_place(path)
        single = final.suffix == SUFFIX
        parts = [list(plan.slots)] if single else divided(plan.slots, shard_size)
        if not single:
            check_side_files(metadata.side_files, final.name, own=frozenset())
        with staged(path) as temporary:
            if not single:
                temporary.mkdir()
                copy_side_files(temporary, metadata.side_files)
            names = [part_name(final.name, index, len(parts)) for index in range(len(parts))]
            target = ModelFiles([temporary] if single else [temporary / name for name in names], plan.keys, parts)
            for name, values in plan.extra.items():
                target.put(name, values)
            for name, value in announced(entries, stream):
                target.put(plan.names[name], _stored(plan, name, value))
                if name in plan.norms:
                    assert isinstance(value, Tensor)
                    target.amend(EXACT_NORMS, plan.norms[name], value)

    def left_out(self, destination: Path, metadata: Metadata) -> Sequence[str]:
        """Return the side files that a single file has no place for; the fields of a model card are in its keys."""
        if destination.suffix != SUFFIX:
            return ()
        return [file.name for file in metadata.side_files if file.name not in _TOLD]


def _plan(entries: Mapping[str, Entry], metadata: Metadata) -> _Plan:
    if reason := config.why_not(metadata.config):
        raise CheckpointError(f"GGUF cannot hold this model: it is {reason}")
    model = metadata.config
    architecture, blocks = BY_MODEL_TYPE[model["model_type"]], model["num_hidden_layers"]
    names = _names(architecture, blocks, entries)
    _check_whole(architecture, blocks, entries, model)
    heads = {}
    kv_heads = model.get("num_key_value_heads") or model["num_attention_heads"]
    for name, entry in entries.items():
        if (count := architecture.heads_of(name, model["num_attention_heads"], kv_heads)) is not None:
            check_heads(name, entry.shape[0], count)
            heads[name] = count
    extra = rope.to_tensors(rope.parameters_of(model), config.head_dim_in(model))
    slots = [_slot(names[name], name, entry) for name, entry in entries.items()]
    slots += [Slot(name, TYPES["F32"], tuple(values.shape)) for name, values in extra.items()]
    keys = _keys(architecture, slots, metadata, gguf_mixes.file_type(entries, metadata))
    norms = _norm_places(architecture, entries)
    if norms:
        keys.append(Key(EXACT_NORMS, "f32[]", [0.0] * (max(norms.values()) // 4)))
    return _Plan(architecture, names, heads, tuple(slots), extra, tuple(keys), norms)


def _norm_places(architecture: Architecture, entries: Mapping[str, Entry]) -> dict[str, int]:
    """Return where the float32 values of each norm start in the key EXACT_NORMS: bytes from its end."""
    sizes = {name: 4 * prod(entry.shape) for name, entry in entries.items() if architecture.offset_of(name)}
    return dict(zip(reversed(sizes), accumulate(reversed(sizes.values())), strict=True))


def _names(architecture: Architecture, blocks: int, entries: Mapping[str, Entry]) -> dict[str, str]:
    names = {}
    for name in entries:
        ggml_name = architecture.ggml_name(name, blocks)
        if ggml_name is None:
            raise CheckpointError(
                f"GGUF has no name for the tensor {name} of a {architecture.name} model of {blocks} blocks; llama.cpp refuses "
                f"files with tensors that it does not know"
            )
        names[name] = ggml_name
    return names


def _check_whole(
    architecture: Architecture, blocks: int, entries: Mapping[str, Entry], model: Mapping[str, object]
) -> None:
    needed = architecture.required(blocks)
    if not model.get("tie_word_embeddings", architecture.name == "gemma3"):
        needed.append("lm_head.weight")
    if missing := [name for name in needed if name not in entries]:
        raise CheckpointError(f"the model has no {missing[0]}, without which llama.cpp does not load it")
    rows = entries["model.embed_tokens.weight"].shape[0]
    if rows != model["vocab_size"]:
        raise CheckpointError(f"vocab_size is {model['vocab_size']} and model.embed_tokens.weight has {rows} rows")


def _slot(ggml_name: str, name: str, entry: Entry) -> Slot:
    if isinstance(entry, PackedSpec):
        if entry.layout not in BY_LAYOUT:
            raise CheckpointError(f"{name} has layout {entry.layout!r}, which GGUF does not store")
        return Slot(ggml_name, BY_LAYOUT[entry.layout].type, entry.shape)
    if entry.dtype not in FLOAT_TYPES or not 1 <= len(entry.shape) <= 2:
        raise CheckpointError(
            f"{name} is {entry.dtype} of shape {entry.shape}; GGUF export writes float32, float16 and bfloat16 matrices and "
            f"vectors"
        )
    if len(entry.shape) == 1 and entry.dtype != torch.float32:
        raise CheckpointError(
            f"{name} is a vector of {entry.dtype}; GGUF keeps vectors as float32, so convert it first"
        )
    return Slot(ggml_name, FLOAT_TYPES[entry.dtype], entry.shape)


def _keys(architecture: Architecture, slots: Iterable[Slot], metadata: Metadata, file_type: int | None) -> list[Key]:
    weights: Counter[str] = Counter()
    for slot in slots:
        if len(slot.shape) == 2:
            weights[slot.type.name] += prod(slot.shape)
    keys = [
        text("general.architecture", architecture.name),
        text("general.type", "model"),
        *model_card.to_keys(metadata),
    ]
    own = {key.name for key in keys}
    for name, value in metadata.provenance.items():
        full = name if name.startswith("general.") else f"lowbit.{name}"
        if full not in own:
            keys.append(text(full, value))
    keys += config.to_keys(metadata.config)
    mostly = FILE_TYPES[weights.most_common(1)[0][0]]
    keys.append(u32("general.file_type", mostly if file_type is None else file_type))
    if any(name not in FLOATS for name in weights):
        keys.append(u32("general.quantization_version", _QUANTIZATION_VERSION))
    keys += vocabulary.to_keys(tokenizer_json.read(metadata))
    try:
        encode(keys)
    except UnicodeEncodeError as error:
        raise CheckpointError(f"the tokenizer or the metadata holds {error.object[:40]!r}, which is no text") from None
    return keys


def _stored(plan: _Plan, name: str, value: Value) -> Tensor:
    """Return a value as the file holds it."""
    heads = plan.heads.get(name)
    if isinstance(value, PackedTensor):
        if where := BY_LAYOUT[value.layout].not_finite(value):
            raise WeightError(f"{name}: {where}, and llama.cpp would compute with it; quantize the weight again")
        blocks = value.buffers["blocks"]
        return interleave(blocks, heads) if heads else blocks
    if heads:
        value = interleave(value, heads)
    offset = plan.architecture.offset_of(name)
    return stored_norm(value, offset) if offset else value
