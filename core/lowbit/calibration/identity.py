"""What a calibrated job is: everything that its result depends on, by words that a refusal can use."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lowbit
from lowbit.interfaces import Calibration, Checkpoint, Entry
from lowbit.plan import Plan
from lowbit.tensors import PackedSpec, raw_bytes


def identity(
    plan: Plan,
    checkpoint: Checkpoint,
    tokens: Tensor,
    batch_size: int,
    device: torch.device,
    known: Mapping[str, Calibration],
    given: Any,
) -> dict[str, Any]:
    """Return the identity of a job, as a JSON document.

    The model is known by its config, its headers and the sizes and times of its files; hashing the weights would take as long
    as many a quantizer. ``known`` counts by its importance and by which Hessians there are; ``given`` is whatever else decides
    about measurements.
    """
    chosen = {step.name: step for step in plan.steps if step.choice is not None}
    quantizers = {step.choice.quantizer for step in chosen.values() if step.choice}
    said = {
        name: {
            "quantizer": step.choice.quantizer.name,
            **_options(step.choice.options),
            "target": _describe(step.target),
        }
        for name, step in chosen.items()
        if step.choice
    }
    return {
        "lowbit": lowbit.__version__,
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "quantizer": {quantizer.name: _version(type(quantizer).__module__) for quantizer in quantizers},
        "format": plan.exporter.format,
        "model": _digest([_model(checkpoint), _files(checkpoint.path)]),
        "samples": {
            "number": tokens.shape[0],
            "length": tokens.shape[1],
            "digest": hashlib.sha256(raw_bytes(tokens).numpy().data).hexdigest()[:16],
        },
        "batch size": batch_size,
        "device": device.type,
        "measurements": _digest([given, _known(known)]),
        "choice for": said,
    }


def _options(options: Any) -> dict[str, str]:
    return {field.name: str(getattr(options, field.name)) for field in fields(options)}


def _model(checkpoint: Checkpoint) -> Any:
    entries = {name: _describe(entry) for name, entry in checkpoint.entries.items()}
    return [dict(checkpoint.metadata.config), entries]


def _known(known: Mapping[str, Calibration]) -> Any:
    found = {}
    for name, calibration in known.items():
        importance = calibration.importance
        content = None if importance is None else hashlib.sha256(raw_bytes(importance).numpy().data).hexdigest()
        found[name] = [content, calibration.hessian is not None]
    return found


def _files(path: Path) -> list[Any]:
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()]


def _describe(entry: Entry) -> str:
    if isinstance(entry, PackedSpec):
        return f"{entry.layout} {entry.scheme.to_json()} {entry.shape}"
    return f"{entry.dtype} {entry.shape}"


def _digest(document: Any) -> str:
    text = json.dumps(document, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _version(module: str) -> str:
    """Return the version of the distribution that a module is of; nothing for a module that was not installed."""
    package = module.partition(".")[0]
    try:
        return version(packages_distributions().get(package, [package])[0])
    except PackageNotFoundError:
        return ""
