"""Format ``compressed-tensors``: folders with ``format: pack-quantized``, in and out, which vLLM and SGLang serve.

Written dense, as compressed-tensors does since 0.20 (June 2026). Read dense and padded, floor(32 / b) codes to a word, as it
was before for 3, 5, 6 and 7 bits: the format's name is the same, so the shape of weight_packed decides, and padded streams
are made dense on the way. Where both would have the same shape (rows of fewer than about 32 codes) dense is read.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import CheckpointError
from lowbit.hookspecs import hookimpl
from lowbit.interfaces import Exporter, Importer, Kernel, Packer
from lowbit.kernels import ReferenceKernel
from lowbit.parts import TensorSpec, torch_dtype
from lowbit.scheme import Grid, ScaleFormat, Scheme, Zero
from lowbit.tensors import PackedSpec
from lowbit_formats.affine_rules import is_sequential
from lowbit_formats.ct_config import ModuleSettings, build_config, read_groups
from lowbit_formats.ct_layout import PACKERS, CtPacker, padded_width, unpad_words
from lowbit_formats.int_words import word_count
from lowbit_formats.module_settings import Setting
from lowbit_formats.quantized_folder import FolderImporter, ModuleReader, PackedModule, StoredModule, packed_spec
from lowbit_formats.quantized_output import FolderExporter

PACKER = CtPacker()


class CtReader(ModuleReader):
    """Reads modules of weight_packed, weight_scale, weight_shape and perhaps weight_zero_point and weight_g_idx."""

    suffixes = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")

    def __init__(self, settings: ModuleSettings) -> None:
        self._settings = settings
        self._padded = 0

    def open(self, stored: StoredModule) -> PackedModule:
        """Read the shapes and weight_shape; weight_g_idx, where it is, decides about the permutation."""
        setting = self._settings.setting(stored.name)
        shape = _weight_shape(stored)
        scheme = _scheme(stored, setting, shape)
        padded = _check_tensors(stored, scheme, shape)
        self._padded += padded
        spec = packed_spec(PACKER, scheme, shape, stored.name)
        return PackedModule(spec, partial(_buffers, stored, spec, padded))

    def provenance(self) -> Mapping[str, str]:
        """Say how many modules were padded."""
        return {"compressed_tensors_packing": f"{self._padded} modules were padded"} if self._padded else {}


class CtImporter(FolderImporter):
    """Reads a folder whose config.json says ``quant_method: compressed-tensors``."""

    format = "compressed-tensors"
    methods = ("compressed-tensors",)

    def reader(self, config: Mapping[str, Any], where: str) -> CtReader:
        """Return the reader for a quantization_config."""
        return CtReader(read_groups(config, where))


class CtExporter(FolderExporter):
    """Writes a folder that compressed-tensors, vLLM, SGLang and transformers know."""

    format = "compressed-tensors"
    layouts = ("ct-pack",)

    def why_not(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """Refuse act-order, which the format lost in August 2026, and partial groups."""
        if scheme.permutation:
            return "compressed-tensors has no act-order since August 2026; the format 'gptq' stores it as g_idx"
        if scheme.grid is Grid.AFFINE and scheme.group_size and shape[1] % scheme.group_size:
            return (
                f"compressed-tensors has no partial group: {scheme.group_size} does not divide in_features {shape[1]}; "
                "choose another group size, or the format 'gptq'"
            )
        return None

    def quantization_config(self, packed: Mapping[str, PackedSpec], plain: Collection[str]) -> dict[str, Any]:
        """Return the config: one group for each setting, and everything plain in ``ignore``."""
        return build_config(packed, plain)


def _weight_shape(stored: StoredModule) -> tuple[int, int]:
    """Return the shape (out, in) that weight_shape says; raise CheckpointError for nonsense."""
    stored.matrix("weight_packed", torch.int32)
    stored.matrix("weight_scale", torch.float16, torch.bfloat16, torch.float32)
    dtype = stored.dtype("weight_shape") if "weight_shape" in stored else "int64"
    stored.expect("weight_shape", TensorSpec(torch.int32 if dtype == "int32" else torch.int64, (2,)), "pack-quantized")
    rows, columns = stored.read("weight_shape").tolist()
    if min(rows, columns) < 1:
        raise CheckpointError(f"{stored.tensor('weight_shape')} is {[rows, columns]}; both must be positive")
    return rows, columns


def _scheme(stored: StoredModule, setting: Setting, shape: tuple[int, int]) -> Scheme:
    zero = Zero.SYMMETRIC if setting.symmetric else Zero.INTEGER
    scales = ScaleFormat(stored.dtype("weight_scale"))
    permuted = "weight_g_idx" in stored and _is_permuted(stored, setting, shape)
    return Scheme(Grid.AFFINE, setting.bits, setting.group_size, zero, scales, permutation=permuted)


def _is_permuted(stored: StoredModule, setting: Setting, shape: tuple[int, int]) -> bool:
    stored.expect("weight_g_idx", TensorSpec(torch.int32, (shape[1],)), "weight_shape")
    index = stored.read("weight_g_idx")
    groups = -(-shape[1] // (setting.group_size or shape[1]))
    if wrong := index[(index < 0) | (index >= groups)].tolist():
        raise CheckpointError(f"{stored.tensor('weight_g_idx')} names group {wrong[0]} of {groups}")
    return not is_sequential(index, setting.group_size)


def _check_tensors(stored: StoredModule, scheme: Scheme, shape: tuple[int, int]) -> bool:
    """Raise CheckpointError unless shapes agree with weight_shape and the config; return whether the codes are padded."""
    (rows, columns), bits, groups = shape, scheme.bits, scheme.groups(shape)
    said = f"a {rows}x{columns} weight of {bits} bits and group_size {scheme.group_size or -1}, as weight_shape and the config say,"
    found = stored.matrix("weight_packed", torch.int32)
    padded = found != (rows, word_count(columns, bits)) and found == (rows, padded_width(columns, bits))
    width = (padded_width if padded else word_count)(columns, bits)
    stored.expect("weight_packed", TensorSpec(torch.int32, (rows, width)), said)
    stored.expect("weight_scale", TensorSpec(torch_dtype(scheme.scales.dtype), (rows, groups)), said)
    if not scheme.symmetric:
        height = (padded_width if padded else word_count)(rows, bits)
        stored.expect("weight_zero_point", TensorSpec(torch.int32, (height, groups)), said)
    elif "weight_zero_point" in stored:
        raise CheckpointError(f"{stored.tensor('weight_zero_point')} is there, but the config says symmetric is true")
    return padded


def _buffers(stored: StoredModule, spec: PackedSpec, padded: bool) -> dict[str, Tensor]:
    scheme, (rows, columns) = spec.scheme, spec.shape
    codes = stored.read("weight_packed")
    buffers = {
        "weight_packed": unpad_words(codes, scheme.bits, columns) if padded else codes,
        "weight_scale": stored.scales("weight_scale"),
    }
    if not scheme.symmetric:
        zeros = stored.read("weight_zero_point")
        dense = unpad_words(zeros.T, scheme.bits, rows).T.contiguous() if padded else zeros
        buffers["weight_zero_point"] = dense
    buffers["weight_shape"] = torch.tensor(spec.shape)
    if scheme.permutation:
        buffers["weight_g_idx"] = stored.read("weight_g_idx")
    return buffers


@hookimpl
def lowbit_register_packers(register: Callable[[Packer], None]) -> None:
    """Register the layout ``ct-pack``."""
    for packer in PACKERS:
        register(packer)


@hookimpl
def lowbit_register_kernels(register: Callable[[Kernel], None]) -> None:
    """Register its plain-torch kernel."""
    for packer in PACKERS:
        register(ReferenceKernel(packer))


@hookimpl
def lowbit_register_importers(register: Callable[[Importer], None]) -> None:
    """Register the importer."""
    register(CtImporter())


@hookimpl
def lowbit_register_exporters(register: Callable[[Exporter], None]) -> None:
    """Register the exporter."""
    register(CtExporter())
