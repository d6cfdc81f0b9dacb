"""``lowbit.json``, the table of contents of a native folder. SPEC.md describes it field by field."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import lowbit
from lowbit.errors import CheckpointError, SchemeError
from lowbit.interfaces import Entry
from lowbit.parts import TensorSpec
from lowbit.scheme import Scheme
from lowbit.tensors import PackedSpec
from lowbit_formats.safetensors_header import are_sizes, describe, parse_spec, why_not_storable

FILE = "lowbit.json"
VERSION = 1
MOST_WEIGHTS_PER_BIT = 64
"""More weights than this for each stored bit is a wrong shape: no code in use goes below 1/16 bit a weight."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """Every tensor of the checkpoint in order, and for a packed weight the stored tensor of each buffer."""

    entries: Mapping[str, Entry]
    buffers: Mapping[str, Mapping[str, str]]
    provenance: Mapping[str, str]


def stored_names(name: str, spec: PackedSpec) -> dict[str, str]:
    """Return buffer -> stored tensor: ``a.b.weight`` gives ``a.b.qweight``; any other name keeps itself in front."""
    owner = name.removesuffix(".weight")
    return {buffer: f"{owner}.{buffer}" for buffer in spec.buffers}


def stored_specs(entries: Mapping[str, Entry]) -> dict[str, dict[str, TensorSpec]]:
    """Return for each entry the tensors that are stored for it, by stored name.

    Raises CheckpointError when two of them have the same name, or a safetensors file cannot hold one.
    """
    owners: dict[str, str] = {}
    groups = {}
    for name, entry in entries.items():
        if isinstance(entry, PackedSpec):
            group = {stored: entry.buffers[buffer] for buffer, stored in stored_names(name, entry).items()}
        else:
            group = {name: entry}
        for stored, spec in group.items():
            if stored in owners:
                raise CheckpointError(f"{owners[stored]} and {name} would both be stored as {stored!r}; rename one")
            if reason := why_not_storable(stored, spec):
                raise CheckpointError(reason)
            owners[stored] = name
        groups[name] = group
    return groups


def build(entries: Mapping[str, Entry], provenance: Mapping[str, str]) -> dict[str, Any]:
    """Return the document; equal schemes are written once, in a table."""
    schemes: dict[Scheme, int] = {}
    tensors = {
        name: _record(name, entry, schemes) if isinstance(entry, PackedSpec) else {} for name, entry in entries.items()
    }
    return {
        "version": VERSION,
        "lowbit_version": lowbit.__version__,
        "provenance": dict(provenance),
        "schemes": [scheme.to_json() for scheme in schemes],
        "tensors": tensors,
    }


def parse(document: Mapping[str, Any], stored: Mapping[str, TensorSpec], file: str) -> Manifest:
    """Read the document and compare it with the tensors that the files hold; ``file`` names it in errors.

    Raises CheckpointError for an unknown version, and for every contradiction: within the document, or with ``stored``.
    """
    if (version := document.get("version")) != VERSION:
        raise CheckpointError(f"{file} has version {version!r}, this lowbit reads {VERSION}; install a newer lowbit")
    tensors, provenance = document.get("tensors"), document.get("provenance", {})
    if not isinstance(tensors, dict) or not _is_text_map(provenance):
        raise CheckpointError(f"{file} must hold tensors by name, and provenance as strings")
    schemes = _parse_schemes(document.get("schemes"), file)
    entries: dict[str, Entry] = {}
    buffers: dict[str, dict[str, str]] = {}
    for name, record in tensors.items():
        if record == {}:
            entries[name] = _stored(name, stored, f"{file}: tensor {name!r}")
        else:
            entries[name], buffers[name] = _parse_packed(record, schemes, stored, f"{file}: weight {name!r}")
    _check_use(entries, buffers, stored, file)
    return Manifest(entries, buffers, provenance)


def _record(name: str, spec: PackedSpec, schemes: dict[Scheme, int]) -> dict[str, Any]:
    buffers = {
        buffer: {"tensor": stored, **describe(spec.buffers[buffer])}
        for buffer, stored in stored_names(name, spec).items()
    }
    number = schemes.setdefault(spec.scheme, len(schemes))
    return {"layout": spec.layout, "scheme": number, "shape": list(spec.shape), "buffers": buffers}


def _parse_schemes(documents: Any, file: str) -> list[Scheme]:
    if not isinstance(documents, list) or not all(isinstance(document, dict) for document in documents):
        raise CheckpointError(f"{file} must hold a list of schemes")
    try:
        return [Scheme.from_json(document) for document in documents]
    except SchemeError as error:
        raise CheckpointError(f"{file}: {error}") from error


def _parse_packed(
    record: Any, schemes: list[Scheme], stored: Mapping[str, TensorSpec], weight: str
) -> tuple[PackedSpec, dict[str, str]]:
    if not isinstance(record, dict) or record.keys() != {"layout", "scheme", "shape", "buffers"}:
        raise CheckpointError(f"{weight} must have exactly layout, scheme, shape and buffers")
    layout, number, shape, records = record["layout"], record["scheme"], record["shape"], record["buffers"]
    if not isinstance(layout, str) or not isinstance(records, dict) or not records:
        raise CheckpointError(f"{weight} must have a layout's name and at least one buffer")
    if type(number) is not int or not 0 <= number < len(schemes):
        raise CheckpointError(f"{weight} has scheme {number!r}, but the file holds {len(schemes)} schemes")
    if not are_sizes(shape) or len(shape) != 2 or 0 in shape:
        raise CheckpointError(f"{weight} has shape {shape!r}; it must be [out_features, in_features]")
    buffers, specs = {}, {}
    for buffer, description in records.items():
        buffers[buffer], specs[buffer] = _parse_buffer(description, stored, f"{weight}, buffer {buffer!r}")
    spec = PackedSpec(layout, schemes[number], (shape[0], shape[1]), specs)
    if math.prod(shape) > 8 * spec.nbytes * MOST_WEIGHTS_PER_BIT:
        raise CheckpointError(f"{weight} has shape {shape} in {spec.nbytes} bytes; no code is that small")
    return spec, buffers


def _parse_buffer(description: Any, stored: Mapping[str, TensorSpec], buffer: str) -> tuple[str, TensorSpec]:
    if not isinstance(description, dict) or description.keys() != {"tensor", "dtype", "shape"}:
        raise CheckpointError(f"{buffer} must have exactly tensor, dtype and shape")
    name = description["tensor"]
    spec = parse_spec(description["dtype"], description["shape"], buffer)
    if not isinstance(name, str) or _stored(name, stored, buffer) != spec:
        raise CheckpointError(f"{buffer} should be {spec.dtype} {spec.shape}, but the tensor {name!r} is not")
    return name, spec


def _stored(name: str, stored: Mapping[str, TensorSpec], owner: str) -> TensorSpec:
    if name not in stored:
        raise CheckpointError(f"{owner} is missing in the weight files (as {name!r}); copy the whole folder again")
    return stored[name]


def _check_use(
    entries: Mapping[str, Entry],
    buffers: Mapping[str, Mapping[str, str]],
    stored: Mapping[str, TensorSpec],
    file: str,
) -> None:
    """Raise CheckpointError unless every stored tensor belongs to exactly one entry."""
    used = [name for name in entries if name not in buffers]
    used += [name for names in buffers.values() for name in names.values()]
    if len(set(used)) < len(used):
        twice = next(name for name in used if used.count(name) > 1)
        raise CheckpointError(f"{file}: two tensors share the stored tensor {twice!r}")
    if unused := stored.keys() - set(used):
        raise CheckpointError(f"{file} does not know the stored tensor {min(unused)!r}; copy the whole folder again")


def _is_text_map(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(item, str) for item in value.values())
