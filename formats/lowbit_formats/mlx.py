"""Format ``mlx``: folders that mlx-lm writes for affine quantization.

The tensors of a module ``P`` are the buffers of the layout ``mlx-affine``: ``P.weight``, ``P.scales``, ``P.biases``. The config
says the rest, under ``quantization`` and once more under ``quantization_config``:

    {"group_size": 64, "bits": 4, "mode": "affine",
     "model.layers.0.mlp.down_proj": {"group_size": 64, "bits": 6},         a module with a setting of its own
     "lm_head": false}                                                      a module that is not quantized

Source: mlx-lm 0.32 (utils.load_model, quantize_model). Its other modes (mxfp4, mxfp8, nvfp4) and stacked experts (3-D weights)
are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import CheckpointError
from lowbit.hookspecs import hookimpl
from lowbit.interfaces import Exporter, Importer, Kernel, Packer
from lowbit.kernels import ReferenceKernel
from lowbit.scheme import Scheme
from lowbit.tensors import PackedSpec
from lowbit_formats.mlx_layout import BITS, MlxPacker, mlx_scheme
from lowbit_formats.module_settings import Setting, by_setting, read_setting
from lowbit_formats.quantized_folder import (
    FolderImporter,
    ModuleReader,
    PackedModule,
    QuantizedCheckpoint,
    StoredModule,
    packed_spec,
)
from lowbit_formats.quantized_output import FolderExporter

PACKER = MlxPacker()
KEY = "quantization"
SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
AFFINE = "affine"
SETTING_KEYS: Mapping[str, tuple[str, ...]] = MappingProxyType({"bits": ("bits",), "group_size": ("group_size",)})


class MlxReader(ModuleReader):
    """Reads modules whose bits and group size the config gives."""

    suffixes = ("scales", "biases", "weight")
    telltale = ("biases",)

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self._where = where
        self._default = self._setting(config, where)
        self._own = {name: value for name, value in config.items() if isinstance(value, dict)}

    def open(self, stored: StoredModule) -> PackedModule:
        """Return the module; raise CheckpointError when its tensors contradict its setting."""
        setting = self._default
        if stored.name in self._own:
            setting = self._setting(self._own[stored.name], f"{stored.name} in {self._where}")
        rows, groups = stored.matrix("scales", *SCALE_DTYPES)
        assert setting.group_size is not None
        scheme = mlx_scheme(setting.bits, setting.group_size, stored.dtype("scales"))
        spec = packed_spec(PACKER, scheme, (rows, groups * setting.group_size), stored.name)
        for suffix, wanted in spec.buffers.items():
            stored.expect(suffix, wanted, f"{setting.bits} bits and groups of {setting.group_size} ({self._where})")

        def buffers() -> Mapping[str, Tensor]:
            return {
                "weight": stored.read("weight"),
                "scales": stored.scales("scales"),
                "biases": stored.scales("biases"),
            }

        return PackedModule(spec, buffers)

    def _setting(self, config: Mapping[str, Any], where: str) -> Setting:
        if (mode := config.get("mode", AFFINE)) != AFFINE:
            raise CheckpointError(f"{where} has mode {mode!r}, and lowbit reads the mode {AFFINE!r} of MLX only")
        setting = read_setting(config, where, SETTING_KEYS)
        if setting.group_size is None:
            raise CheckpointError(f"{where} has group_size -1, which MLX has not; the config is damaged")
        return setting


class MlxImporter(FolderImporter):
    """Reads folders whose config has a ``quantization`` by MLX."""

    format = "mlx"
    methods = ("mlx",)

    def reader(self, config: Mapping[str, Any], where: str) -> MlxReader:
        """Return a reader; raise CheckpointError for settings that make no sense."""
        return MlxReader(config, where)

    def quantization(self, folder: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the ``quantization`` of the config; MLX names no quant_method, so bits and group size make the sign."""
        found = config.get(KEY) or super().quantization(folder, config)
        if isinstance(found, dict) and "quant_method" not in found and {"bits", "group_size"} <= found.keys():
            return {**found, "quant_method": "mlx"}
        return found if isinstance(found, dict) else None

    def open(self, path: Path) -> QuantizedCheckpoint:
        """Open a folder; raises CheckpointError, with a sentence, for anything malformed."""
        checkpoint = super().open(path)
        config = {key: value for key, value in checkpoint.metadata.config.items() if key != KEY}
        checkpoint.metadata = replace(checkpoint.metadata, config=config)
        return checkpoint


class MlxExporter(FolderExporter):
    """Writes what ``mlx_lm.convert`` writes for an affine model."""

    format = "mlx"
    layouts = (PACKER.layout,)

    def packs(self, name: str) -> bool:
        """Take every name: MLX has quantized embeddings."""
        return True

    def variants(self) -> Mapping[str, Scheme]:
        """Return ``4bit``, ``8bit`` and so on, with MLX's default groups of 64 and float16 scales."""
        return {f"{bits}bit": mlx_scheme(bits, 64) for bits in BITS}

    def quantization_config(self, packed: Mapping[str, PackedSpec], plain: Collection[str]) -> dict[str, Any]:
        """Return the most frequent setting, and an entry for each module that has another."""
        usual, *others = by_setting(packed)
        modules = {name: setting for name, spec in packed.items() if (setting := Setting.of(spec.scheme)) in others}
        return {**_document(usual), **{name: _document(setting) for name, setting in modules.items()}}

    def document(self, model: Mapping[str, Any], config: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return ``config.json`` with the settings under both of MLX's keys."""
        return {**model, KEY: config, "quantization_config": config}


def _document(setting: Setting) -> dict[str, Any]:
    return {"group_size": setting.group_size, "bits": setting.bits, "mode": AFFINE}


@hookimpl
def lowbit_register_packers(register: Callable[[Packer], None]) -> None:
    """Register the layout ``mlx-affine``."""
    register(PACKER)


@hookimpl
def lowbit_register_kernels(register: Callable[[Kernel], None]) -> None:
    """Register its plain-torch kernel."""
    register(ReferenceKernel(PACKER))


@hookimpl
def lowbit_register_importers(register: Callable[[Importer], None]) -> None:
    """Register the importer."""
    register(MlxImporter())


@hookimpl
def lowbit_register_exporters(register: Callable[[Exporter], None]) -> None:
    """Register the exporter."""
    register(MlxExporter())
