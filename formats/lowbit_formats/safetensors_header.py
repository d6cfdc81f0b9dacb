"""The header of a safetensors file, parsed strictly and built aligned.

    offset  0            8                      8 + n
            [ n, uint64 ][ JSON, n bytes, spaces ][ tensors, without holes or overlaps ]
              little-endian

    JSON: {"__metadata__": {"format": "pt"}, name: {"dtype": "BF16", "shape": [2, 3], "data_offsets": [begin, end]}, ...}
          begin and end count from 8 + n

The rules are those of the format's specification (github.com/safetensors/safetensors, README, "Format").
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from types import MappingProxyType
from typing import Any

import torch

from lowbit.errors import CheckpointError
from lowbit.parts import TensorSpec
from lowbit_formats.strict_json import parse_object

LENGTH_BYTES = 8
MAX_HEADER = 100_000_000
"""Longest header, in bytes: the limit of the safetensors library, which protects a reader's memory."""

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
        "F8_E5M2": torch.float8_e5m2,
        "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
        "F8_E8M0": torch.float8_e8m0fnu,
        "F4": torch.float4_e2m1fn_x2,
        "C64": torch.complex64,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U64": torch.uint64,
        "U32": torch.uint32,
        "U16": torch.uint16,
        "U8": torch.uint8,
        "BOOL": torch.bool,
    }
)
"""Every dtype that both safetensors and torch have. F4 counts single values in the file and pairs (bytes) in torch."""
DTYPE_NAMES: Mapping[torch.dtype, str] = MappingProxyType({dtype: name for name, dtype in DTYPES.items()})


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file: dtype and shape, its first byte and the one after its last, counted from the end of the header."""

    name: str
    spec: TensorSpec
    begin: int
    end: int


def parse_header(text: bytes, data_bytes: int, file: str) -> dict[str, StoredTensor]:
    """Return the tensors of a header in the order of their bytes; ``data_bytes`` is what the file holds after the header.

    Raises CheckpointError, naming ``file`` and the tensor, for anything that the format does not allow.
    """
    if not text.startswith(b"{"):
        raise CheckpointError(f"{file} is no safetensors file: its header does not begin with '{{'")
    document = parse_object(text, f"the header of {file}")
    metadata = document.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata  # MLX writes null where it has none
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{file}: __metadata__ must map strings to strings")
    found = [_parse_tensor(name, record, f"{file}: tensor {name!r}") for name, record in document.items()]
    found.sort(key=lambda tensor: (tensor.begin, tensor.end))
    _check_tiling(found, data_bytes, file)
    return {tensor.name: tensor for tensor in found}


def build_header(specs: Mapping[str, TensorSpec]) -> tuple[bytes, dict[str, StoredTensor]]:
    """Return the header (its length included) of a file that holds ``specs``, and where each tensor goes.

    The bytes keep the order of ``specs`` when that aligns every tensor to its item size; else larger items come first.
    """
    names = list(specs)
    ends = list(accumulate((specs[name].nbytes for name in names), initial=0))
    if any(begin % specs[name].dtype.itemsize for name, begin in zip(names, ends[:-1], strict=True)):
        names.sort(key=lambda name: -specs[name].dtype.itemsize)
        ends = list(accumulate((specs[name].nbytes for name in names), initial=0))
    tensors = {
        name: StoredTensor(name, specs[name], begin, end)
        for name, begin, end in zip(names, ends[:-1], ends[1:], strict=True)
    }
    document: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    document |= {
        name: {**describe(tensor.spec), "data_offsets": [tensor.begin, tensor.end]} for name, tensor in tensors.items()
    }
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text, tensors


def why_not_storable(name: str, spec: TensorSpec) -> str | None:
    """Return None when a safetensors file can hold the tensor, else the reason."""
    if spec.dtype not in DTYPE_NAMES:
        return (
            f"tensor {name!r} is {str(spec.dtype)[6:]}, which safetensors files cannot hold; cast it to another dtype"
        )
    if name == "__metadata__":
        return "a tensor is named '__metadata__', which safetensors files keep for themselves; rename it"
    return None


def describe(spec: TensorSpec) -> dict[str, Any]:
    """Return dtype and shape as a JSON document says them; ``parse_spec`` reads it."""
    shape = list(spec.shape)
    if spec.dtype is torch.float4_e2m1fn_x2:
        shape[-1] *= 2
    return {"dtype": DTYPE_NAMES[spec.dtype], "shape": shape}


def _parse_tensor(name: str, record: Any, tensor: str) -> StoredTensor:
    if not isinstance(record, dict) or record.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{tensor} must have exactly dtype, shape and data_offsets")
    spec = parse_spec(record["dtype"], record["shape"], tensor)
    offsets = record["data_offsets"]
    if not are_sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{tensor} has data_offsets {offsets!r}; they must be two non-negative integers")
    begin, end = offsets
    if end - begin != spec.nbytes:
        raise CheckpointError(
            f"{tensor} has {end - begin} bytes (offsets {begin} to {end}), but {record['dtype']} {list(spec.shape)} "
            f"takes {spec.nbytes}"
        )
    return StoredTensor(name, spec, begin, end)


def parse_spec(dtype: Any, shape: Any, tensor: str) -> TensorSpec:
    """Return the spec of a tensor from what a JSON document says; ``tensor`` names it in a CheckpointError."""
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{tensor} has dtype {dtype!r}, which lowbit does not read; it reads {', '.join(DTYPES)}")
    if not are_sizes(shape):
        raise CheckpointError(f"{tensor} has shape {shape!r}; it must be a list of non-negative integers")
    if dtype == "F4":
        if not shape or shape[-1] % 2:
            raise CheckpointError(f"{tensor} has shape {shape!r}; two F4 values share a byte, so the last must be even")
        shape = [*shape[:-1], shape[-1] // 2]
    return TensorSpec(DTYPES[dtype], tuple(shape))


def are_sizes(value: Any) -> bool:
    """Whether a JSON value is a list of non-negative integers (and true is no integer)."""
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_tiling(tensors: list[StoredTensor], data_bytes: int, file: str) -> None:
    """Raise CheckpointError unless the tensors, sorted, cover ``data_bytes`` exactly."""
    position, owner = 0, "the header"
    for tensor in tensors:
        if tensor.begin < position:
            raise CheckpointError(f"{file}: tensors {owner} and {tensor.name!r} overlap at byte {tensor.begin}")
        if tensor.begin > position:
            raise CheckpointError(
                f"{file}: {tensor.begin - position} bytes before tensor {tensor.name!r} belong to no tensor"
            )
        if tensor.end > data_bytes:
            raise CheckpointError(
                f"{file} is truncated: tensor {tensor.name!r} ends at byte {tensor.end} after the header, the file at "
                f"{data_bytes}; download it again"
            )
        position, owner = tensor.end, repr(tensor.name)
    if position != data_bytes:
        raise CheckpointError(f"{file}: the last {data_bytes - position} bytes belong to no tensor")
