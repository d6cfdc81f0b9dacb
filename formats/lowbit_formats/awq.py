"""Format ``awq``: folders of AutoAWQ, in and out, and other programs' that have the same tensors.

Written: version ``gemm``, zero points always (vLLM 0.33 reads qzeros even where ``zero_point`` is false; a symmetric weight
has 0x88888888, and reads back symmetric). One setting for all weights, because nothing but GPTQModel takes more. Read also:
version ``gemv``, whose tensors lie along the other axis and are rearranged on the way:

    gemv      dtype, shape                                holds (b = 4)
    qweight   int32 (out, in / 8)                         codes in order, one stream along each row
    qzeros    int32 (out, width)                          zero points of a row's groups in order, zeros behind them
    scales    float16 (out, 8 * width)                    width = ceil(groups / 8), a multiple of 128 / group_size below 128

Source of the gemv table: AutoAWQ's awq/modules/linear/gemv.py.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import lowbit
from lowbit.errors import CheckpointError, NoRouteError
from lowbit.hookspecs import hookimpl
from lowbit.interfaces import Exporter, Importer, Kernel, Packer
from lowbit.kernels import ReferenceKernel
from lowbit.parts import TensorSpec, torch_dtype
from lowbit.scheme import Grid, ScaleFormat, Scheme, Zero
from lowbit.tensors import PackedSpec, PackedTensor, QuantizedTensor
from lowbit_formats.awq_layout import BITS, PACKERS, AwqPacker, symmetric_zeros
from lowbit_formats.int_words import only_code, unpack_across, unpack_words
from lowbit_formats.module_settings import Setting, read_kept, read_setting
from lowbit_formats.quantized_folder import FolderImporter, ModuleReader, PackedModule, StoredModule, packed_spec
from lowbit_formats.quantized_output import FolderExporter, uniform

KEYS = {"bits": ("bits", "w_bit"), "group_size": ("group_size", "q_group_size"), "symmetric": (), "act_order": ()}
PACKER = AwqPacker()
MIDPOINT = 8


class AwqReader(ModuleReader):
    """Reads modules of qweight, qzeros and scales, in the versions gemm and gemv."""

    suffixes = ("qweight", "qzeros", "scales")

    def __init__(self, setting: Callable[[str], Setting], gemv: bool, kept: Mapping[str, frozenset[str]]) -> None:
        self._setting, self._gemv, self._kept = setting, gemv, kept

    def open(self, stored: StoredModule) -> PackedModule:
        """Read the shapes, and the zero points, which decide whether the weight is symmetric."""
        setting = self._setting(stored.name)
        if setting.bits != BITS:
            raise CheckpointError(f"{stored.name} has {setting.bits} bits, and lowbit reads AWQ of 4 bits only")
        scheme, shape = (_gemv_shape if self._gemv else _gemm_shape)(stored, setting)
        if self._has_zeros(stored, scheme, shape):
            scheme = replace(scheme, zero=Zero.INTEGER)
        spec = packed_spec(PACKER, scheme, shape, stored.name)
        return PackedModule(spec, partial(_gemv_buffers if self._gemv else _gemm_buffers, stored, spec))

    def provenance(self) -> Mapping[str, str]:
        """Say that the tensors were rearranged, when they were."""
        return {"awq_version": "gemv"} if self._gemv else {}

    def _has_zeros(self, stored: StoredModule, scheme: Scheme, shape: tuple[int, int]) -> bool:
        words = stored.read("qzeros")
        if self._gemv:
            zeros = unpack_words(words, BITS, scheme.groups(shape))
            symmetric = bool((zeros == MIDPOINT).all())
        else:
            symmetric = only_code(words, BITS, shape[0]) == MIDPOINT
        return not symmetric or "zeros" in self._kept.get(stored.name, ())


class AwqImporter(FolderImporter):
    """Reads a folder whose config.json, or quant_config.json, says ``quant_method: awq``."""

    format = "awq"
    methods = ("awq",)
    own_files = ("quant_config.json",)

    def reader(self, config: Mapping[str, Any], where: str) -> AwqReader:
        """Return the reader for a quantization_config."""
        version = str(config.get("version") or config.get("format") or "gemm").lower()
        if version not in ("gemm", "gemv"):
            raise CheckpointError(
                f"{where} has version {version!r}; lowbit reads the AWQ versions gemm and gemv, so save it as gemm with the "
                "program that wrote it"
            )
        setting = read_setting(config, where, KEYS)
        return AwqReader(lambda name: setting, version == "gemv", read_kept(config, where))


class AwqExporter(FolderExporter):
    """Writes a folder that AutoAWQ, GPTQModel, vLLM, SGLang and transformers know."""

    format = "awq"
    layouts = ("awq-gemm",)

    def quantization_config(self, packed: Mapping[str, PackedSpec], plain: Collection[str]) -> dict[str, Any]:
        """Return the config; refuse a second group size, and a plain module whose name would cover a packed one."""
        sizes = {name: f"groups of {spec.scheme.group_size or 'a whole row'}" for name, spec in packed.items()}
        uniform(self.format, packed, sizes, "choose one group size, or the format 'compressed-tensors'")
        left_plain = _left_plain(packed, plain)
        group_size = next(iter(packed.values())).scheme.group_size
        return {
            "quant_method": "awq",
            "bits": BITS,
            "group_size": group_size or -1,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": left_plain,
            **({"lm_head": True} if "lm_head" in packed else {}),
            "meta": {"quantizer": [f"lowbit:{lowbit.__version__}"]},
        }

    def kept(self, packed: PackedTensor) -> Sequence[str]:
        """Name integer zeros that are the midpoint everywhere."""
        same = only_code(packed.buffers["qzeros"], BITS, packed.shape[0]) == MIDPOINT
        return ("zeros",) if same and not packed.scheme.symmetric else ()


def _left_plain(packed: Mapping[str, PackedSpec], plain: Collection[str]) -> list[str]:
    """Return the names for ``modules_to_not_convert``, which loaders look for inside the names of modules."""
    names = [name for name in plain if name not in packed]
    if "lm_head" not in packed and "lm_head" not in names:
        names.append("lm_head")  # tied to the embedding, it has no tensor, but loaders find the module
    for name in names:
        if covered := next((module for module in packed if name in module), None):
            question = f"AWQ loaders would leave {covered} unquantized, because {name} is and its name begins the same"
            raise NoRouteError(question, {}, "quantize both, or choose the format 'compressed-tensors'")
    return names


def _scheme(stored: StoredModule, setting: Setting) -> Scheme:
    return Scheme(Grid.AFFINE, BITS, setting.group_size, scales=ScaleFormat(stored.dtype("scales")))


def _said(setting: Setting, shape: tuple[int, int], version: str) -> str:
    return (
        f"a {version} weight of {shape[0]}x{shape[1]} with group_size {setting.stored_group_size}, as qweight and the "
        "quantization_config say,"
    )


def _check_shape(stored: StoredModule, setting: Setting, shape: tuple[int, int]) -> None:
    if min(shape) < 1 or shape[1] % (setting.group_size or shape[1]):
        raise CheckpointError(
            f"{stored.tensor('qweight')} is a weight of {shape[0]}x{shape[1]}, which groups of "
            f"{setting.stored_group_size}, as the quantization_config says, do not divide"
        )


def _gemm_shape(stored: StoredModule, setting: Setting) -> tuple[Scheme, tuple[int, int]]:
    columns, words = stored.matrix("qweight", torch.int32)
    stored.matrix("scales", torch.float16, torch.bfloat16)
    scheme, shape = _scheme(stored, setting), (8 * words, columns)
    _check_shape(stored, setting, shape)
    because, groups = _said(setting, shape, "gemm"), scheme.groups(shape)
    stored.expect("scales", TensorSpec(torch_dtype(scheme.scales.dtype), (groups, shape[0])), because)
    stored.expect("qzeros", TensorSpec(torch.int32, (groups, words)), because)
    return scheme, shape


def _gemm_buffers(stored: StoredModule, spec: PackedSpec) -> dict[str, Tensor]:
    symmetric = spec.scheme.symmetric
    return {
        "qweight": stored.read("qweight"),
        "qzeros": symmetric_zeros(spec.scheme, spec.shape) if symmetric else stored.read("qzeros"),
        "scales": stored.scales("scales"),
    }


def _gemv_shape(stored: StoredModule, setting: Setting) -> tuple[Scheme, tuple[int, int]]:
    rows, words = stored.matrix("qweight", torch.int32)
    stored.matrix("scales", torch.float16, torch.bfloat16)
    scheme, shape = _scheme(stored, setting), (rows, 8 * words)
    _check_shape(stored, setting, shape)
    because, width = _said(setting, shape, "gemv"), _gemv_width(shape[1], setting.group_size or shape[1])
    stored.expect("scales", TensorSpec(torch_dtype(scheme.scales.dtype), (rows, 8 * width)), because)
    stored.expect("qzeros", TensorSpec(torch.int32, (rows, width)), because)
    return scheme, shape


def _gemv_width(columns: int, group_size: int) -> int:
    """Return the words of a row of qzeros: eight groups to a word, then a multiple of 128 / group_size."""
    words, multiple = -(-columns // group_size // 8), max(1, 128 // group_size)
    return -(-words // multiple) * multiple


def _gemv_buffers(stored: StoredModule, spec: PackedSpec) -> Mapping[str, Tensor]:
    """Rearrange the tensors of version gemv as those of version gemm; no code changes."""
    groups = spec.scheme.groups(spec.shape)
    parts = {
        "codes": unpack_across(stored.read("qweight"), BITS, spec.shape[1]),
        "scales": stored.scales("scales")[:, :groups].contiguous(),
    }
    if not spec.scheme.symmetric:
        parts["zeros"] = unpack_words(stored.read("qzeros"), BITS, groups).to(torch.int16)
    return PACKER.pack(QuantizedTensor(spec.scheme, spec.shape, parts)).buffers


@hookimpl
def lowbit_register_packers(register: Callable[[Packer], None]) -> None:
    """Register the layout ``awq-gemm``."""
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
    register(AwqImporter())


@hookimpl
def lowbit_register_exporters(register: Callable[[Exporter], None]) -> None:
    """Register the exporter."""
    register(AwqExporter())
