"""Format ``hqq``, to read: safetensors folders of HQQ models, saved by hqq or by transformers.

The tensors of a module ``P``: ``P.W_q``, ``P.scale``, ``P.zero`` (``hqq_layout``), ``P.bias`` where it has one, and settings,
each a tensor of its own: numbers and booleans as scalars, text as one uint8 for each character (hqq/core/utils.py).

    read and used    nbits  group_size  axis  shape  packing  channel_wise
    must be false    quant_scale  quant_zero  offload_meta        (they move or quantize scale and zero)
    without meaning  view_as_float  unpack_view_dtype  compute_dtype  encoded_state_dict  stores_quant_config  optimize
                     round_zero

Supported: axis 1 with 8, 6, 5, 4, 3, 2, 1.58 and 1 bits, W_q as integers or viewed as floats. Refused by name: axis 0, whose
groups run across rows (a scheme cannot say that), one scale for the whole tensor, quantized or offloaded scales, and pickles
(``qmodel.pt``). hqq multiplies in compute_dtype and rounds twice there; lowbit's weights are the same products in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import CheckpointError
from lowbit.hookspecs import hookimpl
from lowbit.interfaces import Importer, Kernel, Packer
from lowbit.kernels import ReferenceKernel
from lowbit.parts import TensorSpec
from lowbit_formats.checkpoint_folder import file_names
from lowbit_formats.hqq_layout import HqqPacker, hqq_scheme
from lowbit_formats.quantized_folder import FolderImporter, ModuleReader, PackedModule, StoredModule, packed_spec
from lowbit_formats.safetensors_files import SafetensorsReader
from lowbit_formats.shards import find_weights

PACKER = HqqPacker()
PICKLE = "qmodel.pt"
CODES = ".W_q"
SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
INTEGERS = (torch.uint8, torch.int32, torch.int64)
PACKINGS = {"8bit_u8": (8, 6, 5), "4bit_u8": (4,), "3bit_32": (3,), "2bit_u8": (2,), "1bit_u8": (1,)}
"""hqq's names of the packings, with the bits that they are for; 1.58 bits have three levels in the packing of 2."""
REFUSED = {
    "quant_scale": "quantized scales",
    "quant_zero": "quantized zeros",
    "offload_meta": "offloaded scales and zeros",
}
SETTINGS = (
    "nbits",
    "group_size",
    "axis",
    "shape",
    "packing",
    "channel_wise",
    *REFUSED,
    "view_as_float",
    "unpack_view_dtype",
    "compute_dtype",
    "encoded_state_dict",
    "stores_quant_config",
    "optimize",
    "round_zero",
)


class HqqReader(ModuleReader):
    """Reads modules of HQQ; what they are is in their own tensors."""

    suffixes = ("W_q", "scale", "zero", *SETTINGS)

    def open(self, stored: StoredModule) -> PackedModule:
        """Return the module; raise CheckpointError, by name, for what lowbit does not read."""
        for setting, what in REFUSED.items():
            if setting in stored and _number(stored, setting):
                raise CheckpointError(
                    f"{stored.tensor(setting)} is set: lowbit reads no {what}; save the model without"
                )
        if "channel_wise" in stored and not _number(stored, "channel_wise"):
            raise CheckpointError(
                f"{stored.tensor('channel_wise')} is 0: lowbit reads scales of groups, not of a whole tensor"
            )
        if (axis := _number(stored, "axis")) != 1:
            raise CheckpointError(
                f"{stored.tensor('axis')} is {axis:g}: lowbit reads groups along in_features (axis 1) only; quantize the model "
                "again with axis=1"
            )
        bits, levels = _bits(stored)
        group_size, shape = int(_number(stored, "group_size")), _shape(stored)
        if group_size < 1:
            raise CheckpointError(f"{stored.tensor('group_size')} is {group_size}; it must be positive")
        stored.matrix("scale", *SCALE_DTYPES)
        scheme = hqq_scheme(bits, group_size, shape, stored.dtype("scale"), levels)
        spec = packed_spec(PACKER, scheme, shape, stored.name)
        _expect_buffers(stored, spec.buffers)

        def buffers() -> Mapping[str, Tensor]:
            wanted = spec.buffers["W_q"]
            codes = stored.read("W_q").flatten().view(wanted.dtype).reshape(wanted.shape)
            return {"W_q": codes, "scale": stored.scales("scale"), "zero": stored.scales("zero")}

        return PackedModule(spec, buffers)


class HqqImporter(FolderImporter):
    """Reads folders with quant_method ``hqq`` and those that hqq wrote; its pickles are recognised, to refuse them."""

    format = "hqq"
    methods = ("hqq",)

    def reader(self, config: Mapping[str, Any], where: str) -> HqqReader:
        """Return a reader."""
        return HqqReader()

    def quantization(self, folder: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the quantization_config, or a stand-in where hqq wrote the folder itself: then the tensors tell."""
        found = super().quantization(folder, config)
        return {"quant_method": "hqq"} if found is None and _is_hqqs_own(folder) else found


def _is_hqqs_own(folder: Path) -> bool:
    """Whether a folder without a quantization_config holds a pickle of hqq, or tensors named as it names them."""
    if PICKLE in file_names(folder):
        return True
    files = find_weights(folder)
    if files.places or not files.paths:
        return any(name.endswith(CODES) for name in files.places)
    with SafetensorsReader(files.paths[0]) as reader:
        return any(name.endswith(CODES) for name in reader.tensors)


def _expect_buffers(stored: StoredModule, buffers: Mapping[str, TensorSpec]) -> None:
    """Check the three tensors; W_q may be viewed as floats (view_as_float), which keeps its rows."""
    rows, columns = buffers["W_q"].shape
    row_bytes = columns * buffers["W_q"].dtype.itemsize
    stored.matrix("W_q", buffers["W_q"].dtype, *SCALE_DTYPES)
    dtype = stored.spec("W_q").dtype
    stored.expect("W_q", TensorSpec(dtype, (rows, row_bytes // dtype.itemsize)), f"the shape of {stored.name}")
    for buffer in ("scale", "zero"):
        stored.expect(buffer, buffers[buffer], f"the shape of {stored.name}")


def _bits(stored: StoredModule) -> tuple[int, int | None]:
    """Return bits and levels: 1.58 bits are three levels of two bits."""
    nbits, packing = _number(stored, "nbits"), _text(stored, "packing")
    if packing == "2bit_u8" and nbits != 2 and int(nbits) == 1:
        return 2, 3
    if nbits != int(nbits) or int(nbits) not in PACKINGS.get(packing, ()):
        raise CheckpointError(f"{stored.name} has {nbits:g} bits with packing {packing!r}, which lowbit does not know")
    return int(nbits), None


def _shape(stored: StoredModule) -> tuple[int, int]:
    tensor = _setting(stored, "shape")
    values = tensor.flatten().tolist()
    if tensor.dtype not in INTEGERS or len(values) != 2 or min(values) < 1:
        raise CheckpointError(f"{stored.tensor('shape')} is {values}; lowbit reads matrices [out, in]")
    return values[0], values[1]


def _number(stored: StoredModule, suffix: str) -> float:
    tensor = _setting(stored, suffix)
    if tensor.numel() != 1 or tensor.dtype not in (*INTEGERS, *SCALE_DTYPES) or not bool(torch.isfinite(tensor)):
        raise CheckpointError(f"{stored.tensor(suffix)} must be one finite number, got {tensor.flatten()[:4].tolist()}")
    return float(tensor)


def _text(stored: StoredModule, suffix: str) -> str:
    tensor = _setting(stored, suffix)
    if tensor.dtype is not torch.uint8:
        raise CheckpointError(f"{stored.tensor(suffix)} must be text in uint8, got {tensor.dtype}")
    return bytes(tensor.flatten().tolist()).decode("latin-1")


def _setting(stored: StoredModule, suffix: str) -> Tensor:
    if suffix not in stored:
        raise CheckpointError(
            f"{stored.name} has no {suffix}; its settings are stored by hqq 0.2 and newer, save the model again"
        )
    return stored.read(suffix)


@hookimpl
def lowbit_register_packers(register: Callable[[Packer], None]) -> None:
    """Register the layout ``hqq``."""
    register(PACKER)


@hookimpl
def lowbit_register_kernels(register: Callable[[Kernel], None]) -> None:
    """Register its plain-torch kernel."""
    register(ReferenceKernel(PACKER))


@hookimpl
def lowbit_register_importers(register: Callable[[Importer], None]) -> None:
    """Register the importer."""
    register(HqqImporter())
