"""Format ``auto-round``: folders of Intel's auto-round, in and out, which vLLM, SGLang and transformers load at 2 to 8 bits.

The tensors are GPTQ's without g_idx, or AWQ's; ``packing_format`` says which, and where GPTQ's zero points begin:

    auto_round:auto_gptq, auto_round:gptq            z - 1, as GPTQ version 1               read, and written (symmetric)
    auto_round, auto_round:gptqmodel                 z, as GPTQ version 2                   read
    auto_round:auto_awq                              AWQ, version gemm                      read

Source: auto-round 0.16.1, ``export_to_autoround/export.py`` and ``inference/backend.py`` (GPTQ_FORMAT, GPTQ_FORMAT_NO_ZP).
Other packings (fp8, MX, NVFP4, compressed-tensors, MLX) are refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor

import lowbit
from lowbit.errors import CheckpointError
from lowbit.hookspecs import hookimpl
from lowbit.interfaces import Exporter, Importer
from lowbit.scheme import Grid, Scheme
from lowbit.tensors import PackedSpec, PackedTensor
from lowbit_formats.awq import AwqReader
from lowbit_formats.gptq import GptqReader
from lowbit_formats.gptq_zeros import AUTO_ROUND, ZeroReader
from lowbit_formats.module_settings import Setting, by_setting, is_in_block, matcher, read_kept, read_setting
from lowbit_formats.quantized_folder import FolderImporter, ModuleReader
from lowbit_formats.quantized_output import FolderExporter

BITS = (2, 3, 4, 8)
PACKING = "auto_round:auto_gptq"
VERSIONS = {
    PACKING: 1,
    "auto_round:gptq": 1,
    "auto_round:auto_gptq:exllamav2": 1,
    "auto_round": 2,
    "auto_round:exllamav2": 2,
    "auto_round:tritonv2": 2,
    "auto_round:gptqmodel": 2,
}
"""Packings with GPTQ's tensors, and the version of their zero points."""
AWQ_PACKINGS = ("auto_round:auto_awq", "auto_round:awq")
KEYS = {"bits": ("bits",), "group_size": ("group_size",), "symmetric": ("sym",), "act_order": ()}
REGEX_SIGNS = frozenset(r"*+?^$()[]{}|\\")
"""A key of ``extra_config`` with one of these is an expression, any other the name of a module, as in vLLM's loader."""
PLAIN = {"bits": 16, "data_type": "float"}
"""What ``extra_config`` says of a module that stays plain."""


class AutoRoundImporter(FolderImporter):
    """Reads a folder whose config.json, or quantization_config.json, says ``quant_method: auto-round``."""

    format = "auto-round"
    methods = ("auto-round", "auto_round", "intel/auto-round")
    own_files = ("quantization_config.json",)

    def reader(self, config: Mapping[str, Any], where: str) -> ModuleReader:
        """Return the reader for a quantization_config."""
        _check(config, where)
        packing = config.get("packing_format", PACKING)
        setting, kept = _settings(config, where), read_kept(config, where)
        if packing in AWQ_PACKINGS:
            return AwqReader(setting, False, kept)
        if not isinstance(packing, str) or packing not in VERSIONS:
            known = ", ".join((*VERSIONS, *AWQ_PACKINGS))
            raise CheckpointError(
                f"{where} has packing_format {packing!r}, which lowbit does not read; it reads {known}"
            )
        return GptqReader(setting, ZeroReader(VERSIONS[packing], AUTO_ROUND), kept)


class AutoRoundExporter(FolderExporter):
    """Writes a folder with ``packing_format: auto_round:auto_gptq``, symmetric."""

    format = "auto-round"
    layouts = ("gptq",)

    def why_not(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """Refuse act-order, other widths than loaders know, and shapes that are not whole blocks of 32 codes."""
        if scheme.grid is not Grid.AFFINE:
            return None  # the layout says why
        if scheme.permutation:
            return "auto-round files have no g_idx for a permutation (act-order); the format 'gptq' stores it"
        if scheme.bits not in BITS:
            return (
                f"auto-round files have 2, 3, 4 or 8 bits for all loaders, not {scheme.bits}; the format "
                "'compressed-tensors' has 2 to 8"
            )
        for side, length in (("out_features", shape[0]), ("in_features", shape[1])):
            if length % 32:
                return f"auto-round needs {side} that are a multiple of 32, got {length}; leave the weight unquantized"
        return None

    def quantization_config(self, packed: Mapping[str, PackedSpec], plain: Collection[str]) -> dict[str, Any]:
        """Return the config with the most frequent setting, and every other module in ``extra_config``."""
        base, *others = settings = by_setting(packed)
        outside = [name for name in packed if not is_in_block(name)]
        odd = {name: _flags(setting) for setting in others for name in settings[setting]}
        extra = {
            **{name: _flags(Setting.of(packed[name].scheme)) for name in outside},
            **odd,
            **{name: PLAIN for name in plain if is_in_block(name)},
        }
        return {
            "quant_method": "auto-round",
            "packing_format": PACKING,
            **_flags(base),
            "data_type": "int",
            "block_name_to_quantize": ",".join(dict.fromkeys(_blocks(name) for name in packed if is_in_block(name))),
            **({"extra_config": extra} if extra else {}),
            "provider": f"lowbit {lowbit.__version__}",
        }

    def derived(self) -> frozenset[str]:
        """Return g_idx, which is always sequential here."""
        return frozenset({"g_idx"})

    def stored(self, packed: PackedTensor, config: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """Return every buffer but g_idx."""
        return {name: buffer for name, buffer in packed.buffers.items() if name not in self.derived()}


def _check(config: Mapping[str, Any], where: str) -> None:
    """Raise CheckpointError for what changes the meaning of the tensors and is not read here."""
    problems = {
        "data_type": not str(config.get("data_type") or "int").startswith("int"),
        "act_bits": (config.get("act_bits") or 16) not in (16, 32),
        "super_bits": bool(config.get("super_bits")),
        "rotation_config": bool(config.get("rotation_config")),
    }
    for key, present in problems.items():
        if present:
            raise CheckpointError(f"{where} has {key} {config[key]!r}; lowbit reads auto-round's integer weights only")


def _settings(config: Mapping[str, Any], where: str) -> Callable[[str], Setting]:
    """Return the setting of a module: its own entry in ``extra_config``, the first expression there that is in its name."""
    extra = config.get("extra_config") or {}
    if not isinstance(extra, dict) or not all(isinstance(value, dict) for value in extra.values()):
        raise CheckpointError(f"{where}: extra_config must map modules to objects, got {extra!r}")
    base = read_setting(config, where, KEYS)
    expressions = {
        key: matcher(key, f"extra_config of {where}", search=True) for key in extra if REGEX_SIGNS & set(key)
    }

    def setting(name: str) -> Setting:
        key = name if name in extra else next((key for key, found in expressions.items() if found(name)), None)
        if key is None or not extra[key]:
            return base
        if (bits := extra[key].get("bits", base.bits)) in (16, 32):
            raise CheckpointError(f"{name} is quantized, but extra_config of {where} gives it {bits} bits")
        return read_setting({**config, **extra[key]}, f"extra_config {key!r} of {where}", KEYS)

    return setting


def _flags(setting: Setting) -> dict[str, Any]:
    return {"bits": setting.bits, "group_size": setting.stored_group_size, "sym": setting.symmetric}


def _blocks(name: str) -> str:
    """Return what the names of all blocks begin with: ``model.layers`` of ``model.layers.3.mlp.up_proj``."""
    parts = name.split(".")
    return ".".join(parts[: next(index for index, part in enumerate(parts) if part.isdigit())])


@hookimpl
def lowbit_register_importers(register: Callable[[Importer], None]) -> None:
    """Register the importer."""
    register(AutoRoundImporter())


@hookimpl
def lowbit_register_exporters(register: Callable[[Exporter], None]) -> None:
    """Register the exporter."""
    register(AutoRoundExporter())
