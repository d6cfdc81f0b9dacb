"""Format ``gptq``: folders of AutoGPTQ and GPTQModel, in and out. SPEC_safetensors.md has the bytes, ``gptq_layout`` packs them.

Written: version 1 (``checkpoint_format: gptq``) when every weight is symmetric, version 2 otherwise; always with g_idx. A file
has one version; a symmetric module's zeros are a constant, written as the file's version has it, and both versions read back
as the layout ``gptq``. Modules of other settings go into ``dynamic``, which GPTQModel, vLLM and SGLang honour and transformers
does not; modules left plain go there too, and into ``modules_in_block_to_quantize`` where that can say it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

import lowbit
from lowbit.errors import CheckpointError
from lowbit.hookspecs import hookimpl
from lowbit.interfaces import Exporter, Importer, Kernel, Packer
from lowbit.kernels import ReferenceKernel
from lowbit.parts import TensorSpec, torch_dtype
from lowbit.scheme import Grid, ScaleFormat, Scheme, Zero
from lowbit.tensors import PackedSpec, PackedTensor
from lowbit_formats.affine_rules import is_sequential, sequential_index
from lowbit_formats.gptq_layout import PACKERS, GptqPacker, GptqV2Packer, symmetric_zeros
from lowbit_formats.gptq_zeros import WORD_WRITERS, ZeroReader, version_of
from lowbit_formats.int_words import only_code, word_count
from lowbit_formats.module_settings import (
    Setting,
    by_setting,
    is_in_block,
    matcher,
    patterns,
    read_kept,
    read_setting,
    with_fused,
)
from lowbit_formats.quantized_folder import FolderImporter, ModuleReader, PackedModule, StoredModule, packed_spec
from lowbit_formats.quantized_output import FolderExporter

BITS = (2, 3, 4, 8)
KEYS = {"bits": ("bits",), "group_size": ("group_size",), "symmetric": ("sym",), "act_order": ("desc_act",)}


class GptqReader(ModuleReader):
    """Reads modules of qweight, qzeros, scales and perhaps g_idx."""

    suffixes = ("qweight", "qzeros", "scales", "g_idx")

    def __init__(
        self, setting: Callable[[str], Setting], zeros: ZeroReader, kept: Mapping[str, frozenset[str]]
    ) -> None:
        self._setting, self._zeros, self._kept = setting, zeros, kept

    def open(self, stored: StoredModule) -> PackedModule:
        """Read the shapes, the zero points and g_idx, which together are the scheme."""
        setting = self._setting(stored.name)
        scheme, shape = _shape(stored, setting)
        kept = self._kept.get(stored.name, frozenset())
        words = stored.read("qzeros")
        zero = self._zeros.kind(words, setting.bits, shape[0], setting.symmetric, stored.tensor("qzeros"))
        scheme = replace(
            scheme,
            zero=Zero.INTEGER if "zeros" in kept else zero,
            permutation="permutation" in kept or _is_permuted(stored, setting, scheme.groups(shape)),
        )
        packer = GptqPacker() if scheme.symmetric else GptqV2Packer()
        spec = packed_spec(packer, scheme, shape, stored.name)
        return PackedModule(spec, partial(self._buffers, stored, spec))

    def provenance(self) -> Mapping[str, str]:
        """Say where the label of the zeros' version is wrong."""
        found = self._zeros.found()
        return {"gptq_zeros": found} if found else {}

    def _buffers(self, stored: StoredModule, spec: PackedSpec) -> dict[str, Tensor]:
        scheme, shape = spec.scheme, spec.shape
        if scheme.symmetric:
            zeros = symmetric_zeros(scheme, shape, version=1)
        else:
            zeros = self._zeros.stored(stored.read("qzeros"), scheme.bits, shape[0])
        sequential = not scheme.permutation or "g_idx" not in stored
        return {
            "qweight": stored.read("qweight"),
            "qzeros": zeros,
            "scales": stored.scales("scales"),
            "g_idx": sequential_index(shape[1], scheme.group_size) if sequential else stored.read("g_idx"),
        }


class GptqImporter(FolderImporter):
    """Reads a folder whose config.json, or quantize_config.json, says ``quant_method: gptq``."""

    format = "gptq"
    methods = ("gptq",)
    own_files = ("quantize_config.json",)

    def reader(self, config: Mapping[str, Any], where: str) -> GptqReader:
        """Return the reader for a quantization_config."""
        base, overrides = read_setting(config, where, KEYS), _overrides(config, where)

        def setting(name: str) -> Setting:
            override = next((override for override in overrides if override.matches(name)), None)
            if override is None:
                return base
            if override.setting is None:
                raise CheckpointError(f"{name} is quantized, but {where} leaves it out by dynamic {override.key!r}")
            return override.setting

        label = config.get("checkpoint_format") or config.get("format")
        zeros = ZeroReader(version_of(label, where), _writer(config))
        return GptqReader(setting, zeros, read_kept(config, where))


class GptqExporter(FolderExporter):
    """Writes a folder that AutoGPTQ, GPTQModel, vLLM, SGLang and transformers know; see the table of loaders."""

    format = "gptq"
    layouts = ("gptq", "gptq_v2")
    config_copy: ClassVar[str | None] = "quantize_config.json"

    def why_not(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """Refuse widths that no loader of GPTQ files knows."""
        if scheme.grid is Grid.AFFINE and scheme.bits not in BITS:
            return f"GPTQ files have 2, 3, 4 or 8 bits, not {scheme.bits}; the format 'compressed-tensors' has 2 to 8"
        return None

    def why_no_variant(self, name: str) -> str | None:
        """Say what decides the version of the zeros."""
        if name not in ("v1", "v2", *self.layouts):
            return None
        return "symmetric weights go out as v1, others as v2, because a zero point of 0 has no portable code in v1"

    def quantization_config(self, packed: Mapping[str, PackedSpec], plain: Collection[str]) -> dict[str, Any]:
        """Return the config with the most frequent setting, and the others in ``dynamic``."""
        settings = by_setting(packed)
        base, *others = settings
        version = "gptq" if all(setting.symmetric for setting in settings) else "gptq_v2"
        dynamic: dict[str, dict[str, Any]] = {}
        for setting in others:
            chosen = dict.fromkeys(settings[setting])
            rest = [name for name in (*packed, *plain) if name not in chosen]
            for pattern in patterns(with_fused(chosen), with_fused(rest)):
                dynamic[f"+:{pattern}"] = _flags(setting)
        skipped = [name for name in plain if is_in_block(name)]
        for pattern in patterns(with_fused(skipped), with_fused(packed)):
            dynamic[f"-:{pattern}"] = {}
        return {
            "quant_method": "gptq",
            **_flags(base),
            "lm_head": any(name.rpartition(".")[2] == "lm_head" for name in packed),
            "checkpoint_format": version,
            "format": version,
            "pack_dtype": "int32",
            "true_sequential": True,
            "damp_percent": 0.01,
            "meta": {"quantizer": [f"lowbit:{lowbit.__version__}"]},
            **({"dynamic": dynamic} if dynamic else {}),
            **_modules_in_block(packed, skipped),
        }

    def stored(self, packed: PackedTensor, config: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """Return the buffers; the constant zeros of a symmetric module follow the version of the file."""
        if packed.layout == "gptq" and config["checkpoint_format"] == "gptq_v2":
            return {**packed.buffers, "qzeros": symmetric_zeros(packed.scheme, packed.shape, version=2)}
        return packed.buffers

    def kept(self, packed: PackedTensor) -> Sequence[str]:
        """Name integer zeros that are the midpoint everywhere, and an act-order index that is sequential."""
        return list(_kept(packed))


@dataclass(frozen=True, slots=True)
class _Override:
    """One entry of ``dynamic``: the modules it matches, and their setting; None leaves them plain."""

    key: str
    matches: Callable[[str], bool]
    setting: Setting | None


def _overrides(config: Mapping[str, Any], where: str) -> list[_Override]:
    """Return the entries of ``dynamic`` in their order: ``+:`` or nothing overrides, ``-:`` leaves plain."""
    dynamic = config.get("dynamic") or {}
    if not isinstance(dynamic, dict) or not all(isinstance(value, dict) for value in dynamic.values()):
        raise CheckpointError(f"{where}: dynamic must map patterns to objects, got {dynamic!r}")
    found = []
    for key, values in dynamic.items():
        matches = matcher(key.removeprefix("+:").removeprefix("-:"), f"dynamic of {where}")
        named = f"dynamic {key!r} of {where}"
        setting = None if key.startswith("-:") else read_setting({**config, **values}, named, KEYS)
        found.append(_Override(key, matches, setting))
    return found


def _writer(config: Mapping[str, Any]) -> str:
    """Return which of ``WORD_WRITERS`` names itself in ``meta.quantizer`` or ``provider``; empty when none does."""
    meta = config.get("meta")
    named = meta.get("quantizer") if isinstance(meta, dict) else None
    writers = named if isinstance(named, list) else [named]
    words = [str(writer).lower().partition(":")[0] for writer in (*writers, config.get("provider"))]
    return next((writer for writer in WORD_WRITERS if writer in words), "")


def _shape(stored: StoredModule, setting: Setting) -> tuple[Scheme, tuple[int, int]]:
    """Return a symmetric scheme and the shape (out, in); raise CheckpointError when tensors and config disagree."""
    words, rows = stored.matrix("qweight", torch.int32)
    stored.matrix("scales", torch.float16, torch.bfloat16)
    columns, rest = divmod(32 * words, setting.bits)
    said = f"{setting.bits} bits and group_size {setting.stored_group_size}"
    if rest or not columns or not rows:
        raise CheckpointError(
            f"{stored.tensor('qweight')} has shape {[words, rows]}, which is no weight of {said}, as the "
            "quantization_config says"
        )
    scheme = Scheme(Grid.AFFINE, setting.bits, setting.group_size, scales=ScaleFormat(stored.dtype("scales")))
    groups = scheme.groups((rows, columns))
    because = f"a {rows}x{columns} weight of {said}, as qweight and the quantization_config say,"
    stored.expect("scales", TensorSpec(torch_dtype(scheme.scales.dtype), (groups, rows)), because)
    stored.expect("qzeros", TensorSpec(torch.int32, (groups, word_count(rows, setting.bits))), because)
    if "g_idx" in stored:
        stored.expect("g_idx", TensorSpec(torch.int32, (columns,)), because)
    return scheme, (rows, columns)


def _is_permuted(stored: StoredModule, setting: Setting, groups: int) -> bool:
    """Whether columns choose their groups; raise CheckpointError when g_idx contradicts the config or has no sense."""
    if "g_idx" not in stored:
        if setting.act_order and groups > 1:
            raise CheckpointError(
                f"{stored.name} has no g_idx, but the quantization_config says desc_act is true; the checkpoint is incomplete"
            )
        return False
    index = stored.read("g_idx")
    if is_sequential(index, setting.group_size):
        return False
    if wrong := index[(index < 0) | (index >= groups)].tolist():
        raise CheckpointError(f"{stored.tensor('g_idx')} names group {wrong[0]}, but scales has {groups} groups")
    if setting.act_order is False:
        column = int((index != sequential_index(len(index), setting.group_size)).nonzero()[0])
        raise CheckpointError(
            f"{stored.tensor('g_idx')} puts column {column} into group {int(index[column])}, but the quantization_config "
            "says desc_act is false, and loaders that believe it ignore g_idx; set desc_act to true"
        )
    return True


def _flags(setting: Setting) -> dict[str, Any]:
    return {
        "bits": setting.bits,
        "group_size": setting.stored_group_size,
        "desc_act": setting.act_order,
        "sym": setting.symmetric,
    }


def _kept(packed: PackedTensor) -> Iterator[str]:
    scheme, rows = packed.scheme, packed.shape[0]
    if not scheme.symmetric and only_code(packed.buffers["qzeros"], scheme.bits, rows) == scheme.midpoint:
        yield "zeros"
    if scheme.permutation and is_sequential(packed.buffers["g_idx"], scheme.group_size):
        yield "permutation"


def _modules_in_block(packed: Mapping[str, PackedSpec], skipped: Collection[str]) -> dict[str, list[list[str]]]:
    """Return the linears of a block that are quantized, for transformers, where some are not and all blocks agree."""
    inside, outside = (
        {_name_in_block(name): None for name in names if is_in_block(name)} for names in (packed, skipped)
    )
    if not outside or inside.keys() & outside.keys():
        return {}
    return {"modules_in_block_to_quantize": [list(inside)]}


def _name_in_block(name: str) -> str:
    """Return a module's name inside its numbered block: ``mlp.up_proj`` of ``model.layers.3.mlp.up_proj``."""
    parts = name.split(".")
    number = next(index for index, part in enumerate(parts) if part.isdigit())
    return ".".join(parts[number + 1 :])


@hookimpl
def lowbit_register_packers(register: Callable[[Packer], None]) -> None:
    """Register the layouts ``gptq`` and ``gptq_v2``."""
    for packer in PACKERS:
        register(packer)


@hookimpl
def lowbit_register_kernels(register: Callable[[Kernel], None]) -> None:
    """Register their plain-torch kernels."""
    for packer in PACKERS:
        register(ReferenceKernel(packer))


@hookimpl
def lowbit_register_importers(register: Callable[[Importer], None]) -> None:
    """Register the importer."""
    register(GptqImporter())


@hookimpl
def lowbit_register_exporters(register: Callable[[Exporter], None]) -> None:
    """Register the exporter."""
    register(GptqExporter())
