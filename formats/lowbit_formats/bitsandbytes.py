"""Format ``bitsandbytes``: folders that transformers writes for ``load_in_4bit`` (NF4 and FP4, double quantization too).

The tensors of a module ``P``; the layouts (``bitsandbytes_layout``) say what is in them:

    P.weight   P.weight.absmax   P.weight.quant_map   [ P.weight.nested_absmax   P.weight.nested_quant_map ]
    P.weight.quant_state.bitsandbytes__nf4  (or __fp4)     uint8: JSON, perhaps with spaces at its end

    {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [out, in],
     "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.03}         (the last three: double quantization)

``dtype`` is what bitsandbytes dequantizes to. lowbit writes the model's, and does not need it to read. Sources: bitsandbytes
0.50 (functional.QuantState), transformers 5.23 (utils.quantization_config.BitsAndBytesConfig).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import CheckpointError
from lowbit.hookspecs import hookimpl
from lowbit.interfaces import Exporter, Importer, Kernel, Packer
from lowbit.kernels import ReferenceKernel
from lowbit.parts import TensorSpec
from lowbit.scheme import Grid, ScaleCoding, ScaleFormat, Scheme
from lowbit.tensors import PackedSpec, PackedTensor
from lowbit_formats.bitsandbytes_layout import DOUBLE, SINGLE, TABLES, Bnb4bitPacker
from lowbit_formats.quantized_folder import FolderImporter, ModuleReader, PackedModule, StoredModule, packed_spec
from lowbit_formats.quantized_output import FolderExporter
from lowbit_formats.safetensors_header import are_sizes
from lowbit_formats.strict_json import parse_object

PACKERS = tuple(Bnb4bitPacker(quant_type) for quant_type in TABLES)
STATE = "weight.quant_state.bitsandbytes__"
SUFFIX_OF_BUFFER: Mapping[str, str] = MappingProxyType(
    {
        "quant_map": "weight.quant_map",
        "nested_quant_map": "weight.nested_quant_map",
        "nested_absmax": "weight.nested_absmax",
        "absmax": "weight.absmax",
        "weight": "weight",
    }
)
"""Suffixes of the stored buffers, floats first: so every tensor of a file is aligned without changing their order."""
DTYPES = ("float32", "float16", "bfloat16")
STORAGE_DTYPES = (torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""How the bytes of codes may be stored (transformers' bnb_4bit_quant_storage)."""
LARGEST = torch.finfo(torch.float32).max
LONGEST_OFFSET = float(torch.tensor(-1.1754943508222875e-38))
"""A float32 with as many characters as any: a sign, 17 digits, a point and an exponent of two digits."""


@dataclass(frozen=True, slots=True)
class QuantState:
    """What the JSON says that lowbit needs."""

    scheme: Scheme
    shape: tuple[int, int]
    nested_offset: float | None


class BitsAndBytesReader(ModuleReader):
    """Reads 4-bit modules; what they are is in their own tensors."""

    suffixes = (*SUFFIX_OF_BUFFER.values(), *(STATE + quant_type for quant_type in TABLES))
    telltale = tuple(suffix for suffix in suffixes if suffix != "weight")

    def open(self, stored: StoredModule) -> PackedModule:
        """Return the module; raise CheckpointError when its quant_state and its tensors contradict each other."""
        packer = next((packer for packer in PACKERS if STATE + packer.quant_type in stored), None)
        if packer is None:
            raise CheckpointError(f"{stored.name} has a quant_map, but no {STATE}nf4 or {STATE}fp4; it is incomplete")
        state = read_state(stored, packer.quant_type)
        spec = packed_spec(packer, state.scheme, state.shape, stored.name)
        for buffer, suffix in SUFFIX_OF_BUFFER.items():
            if buffer in spec.buffers:
                wanted = spec.buffers[buffer]
                if buffer == "weight" and stored.spec(suffix).dtype in STORAGE_DTYPES:
                    wanted = _stored_as(stored.spec(suffix).dtype, wanted)
                stored.expect(suffix, wanted, f"the quant_state of {stored.name}")
            elif suffix in stored:
                raise CheckpointError(
                    f"{stored.tensor(suffix)} is there, but the quant_state of {stored.name} knows no double quantization"
                )

        def buffers() -> Mapping[str, Tensor]:
            return {
                name: _read(stored, name, state, packer.table).reshape(it.shape) for name, it in spec.buffers.items()
            }

        return PackedModule(spec, buffers)


class BitsAndBytesImporter(FolderImporter):
    """Reads folders with quant_method ``bitsandbytes`` and 4-bit weights."""

    format = "bitsandbytes"
    methods = ("bitsandbytes",)

    def reader(self, config: Mapping[str, Any], where: str) -> BitsAndBytesReader:
        """Return a reader; raise CheckpointError for 8-bit checkpoints (LLM.int8)."""
        if config.get("load_in_8bit") or config.get("_load_in_8bit"):
            raise CheckpointError(
                f"{where} says load_in_8bit (LLM.int8), and lowbit reads 4-bit bitsandbytes weights only"
            )
        return BitsAndBytesReader()


class BitsAndBytesExporter(FolderExporter):
    """Writes what ``save_pretrained`` writes for a model loaded in 4 bits."""

    format = "bitsandbytes"
    layouts = tuple(packer.layout for packer in PACKERS)
    quantizers = ("kbit",)

    def variants(self) -> Mapping[str, Scheme]:
        """Return NF4 and FP4 with the usual blocks of 64, and with double quantization."""
        plain, double = (Scheme(Grid.CODEBOOK, 4, 64, scales=scales, flat=True) for scales in (SINGLE, DOUBLE))
        return {"nf4": plain, "fp4": plain, "nf4-double": double, "fp4-double": double}

    def preferred(self, variant: str) -> Sequence[str]:
        """Return the layout of the table that the variant names; the schemes are the same."""
        return [f"bnb-{variant.partition('-')[0]}"]

    def quantization_config(self, packed: Mapping[str, PackedSpec], plain: Collection[str]) -> dict[str, Any]:
        """Return the fields of transformers' BitsAndBytesConfig; each module says by itself what it is."""
        first = next(iter(packed.values()))
        # A tied lm_head has no tensor and is a linear layer all the same: a loader would quantize it.
        skipped = [*plain] if "lm_head" in {*plain, *packed} else [*plain, "lm_head"]
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "_load_in_4bit": True,
            "_load_in_8bit": False,
            "bnb_4bit_quant_type": first.layout.removeprefix("bnb-"),
            "bnb_4bit_use_double_quant": first.scheme.scales.two_level,
            "bnb_4bit_compute_dtype": "float32",
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_skip_modules": skipped,
            "llm_int8_threshold": 6.0,
        }

    def for_model(self, config: Mapping[str, Any], model: Mapping[str, Any]) -> Mapping[str, Any]:
        """Compute in the model's dtype, as far as bitsandbytes knows it."""
        dtype = model.get("dtype", model.get("torch_dtype"))
        return {**config, "bnb_4bit_compute_dtype": dtype} if dtype in DTYPES else config

    def tensor_specs(self, spec: PackedSpec) -> Mapping[str, TensorSpec]:
        """Return the stored buffers, and the JSON with as many spaces as make whole words of the module's bytes."""
        specs = {suffix: spec.buffers[name] for name, suffix in SUFFIX_OF_BUFFER.items() if name in spec.buffers}
        longest = len(json.dumps(_state(spec, "bfloat16", LONGEST_OFFSET)))
        padding = -(longest + sum(each.nbytes for each in specs.values())) % 8
        return {**specs, STATE + _quant_type(spec): TensorSpec(torch.uint8, (longest + padding,))}

    def stored(self, packed: PackedTensor, config: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """Return the buffers by suffix, and the JSON."""
        offset = float(packed.buffers["nested_offset"]) if "nested_offset" in packed.buffers else 0.0
        text = json.dumps(_state(packed.spec, config["bnb_4bit_compute_dtype"], offset))
        name = STATE + _quant_type(packed.spec)
        (length,) = self.tensor_specs(packed.spec)[name].shape
        state = torch.tensor(list(text.ljust(length).encode()), dtype=torch.uint8)
        buffers = {suffix: packed.buffers[name] for name, suffix in SUFFIX_OF_BUFFER.items() if name in packed.buffers}
        return {**buffers, name: state}


def read_state(stored: StoredModule, quant_type: str) -> QuantState:
    """Return what a module's quant_state says; raise CheckpointError, naming the tensor, for what makes no sense."""
    name = stored.tensor(STATE + quant_type)
    text = stored.read(STATE + quant_type)
    if text.dtype is not torch.uint8:
        raise CheckpointError(f"{name} must hold JSON in uint8, got {text.dtype}")
    document = parse_object(text.numpy().tobytes(), name)
    if document.get("quant_type") != quant_type:
        raise CheckpointError(f"{name} says quant_type {document.get('quant_type')!r}; the checkpoint is damaged")
    shape = document.get("shape")
    if not isinstance(shape, list) or not are_sizes(shape) or len(shape) != 2:
        raise CheckpointError(f"{name} is for a weight of shape {shape!r}; lowbit reads matrices [out, in]")
    scales, offset = SINGLE, None
    if document.get("nested_blocksize") is not None:
        size, offset = _positive(document, "nested_blocksize", name), _finite(document, "nested_offset", name)
        scales = ScaleFormat("float32", bits=8, super_group=size, coding=ScaleCoding.CODEBOOK)
    scheme = Scheme(Grid.CODEBOOK, 4, _positive(document, "blocksize", name), scales=scales, flat=True)
    return QuantState(scheme, (shape[0], shape[1]), offset)


def _positive(document: Mapping[str, Any], key: str, name: str) -> int:
    value = document.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"{name}: {key} must be a positive integer, got {value!r}")
    return value


def _finite(document: Mapping[str, Any], key: str, name: str) -> float:
    value = document.get(key)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) <= LARGEST:
        raise CheckpointError(f"{name}: {key} must be a finite number, got {value!r}")
    return float(value)


def _read(stored: StoredModule, buffer: str, state: QuantState, table: Tensor) -> Tensor:
    if buffer == "nested_offset":
        return torch.tensor(state.nested_offset, dtype=torch.float32)
    suffix = SUFFIX_OF_BUFFER[buffer]
    if buffer == "weight":
        return stored.read(suffix).flatten().view(torch.uint8)
    values = stored.scales(suffix)
    if buffer == "quant_map" and not torch.allclose(values, table, rtol=0, atol=1e-6):
        raise CheckpointError(f"{stored.tensor(suffix)} is not the table of its quant_type; quantize the model again")
    # bitsandbytes multiplies by its own table, whatever the file says (backends/default/ops.py)
    return table if buffer == "quant_map" else values


def _stored_as(dtype: torch.dtype, spec: TensorSpec) -> TensorSpec:
    """Return the spec of the same bytes as a column of another dtype."""
    return TensorSpec(dtype, (spec.nbytes // dtype.itemsize, 1)) if spec.nbytes % dtype.itemsize == 0 else spec


def _quant_type(spec: PackedSpec) -> str:
    return spec.layout.removeprefix("bnb-")


def _state(spec: PackedSpec, dtype: str, nested_offset: float) -> dict[str, Any]:
    """Return the JSON document of a module, as bitsandbytes' ``QuantState.as_dict`` orders it."""
    said: dict[str, Any] = {
        "quant_type": _quant_type(spec),
        "blocksize": spec.scheme.group_size,
        "dtype": dtype,
        "shape": list(spec.shape),
    }
    if spec.scheme.scales.two_level:
        said |= {
            "nested_blocksize": spec.scheme.scales.super_group,
            "nested_dtype": "float32",
            "nested_offset": nested_offset,
        }
    return said


@hookimpl
def lowbit_register_packers(register: Callable[[Packer], None]) -> None:
    """Register the layouts ``bnb-nf4`` and ``bnb-fp4``."""
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
    register(BitsAndBytesImporter())


@hookimpl
def lowbit_register_exporters(register: Callable[[Exporter], None]) -> None:
    """Register the exporter."""
    register(BitsAndBytesExporter())
