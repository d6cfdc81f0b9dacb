"""Rotary embeddings: Hugging Face's ``rope_parameters`` and GGUF's keys and tensors, both ways.

Llama 3's scaling has no keys: its file holds ``rope_freqs.weight``, float32 (head_dim / 2,), by which ggml divides each
frequency. The parameters are found again from these factors. Phi 3's are the tensors ``rope_factors_long.weight`` and
``rope_factors_short.weight``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import CheckpointError
from lowbit_formats.gguf.keys import Key, Keys, f32, shortest, text, u32

FREQS, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
TENSORS = (FREQS, LONG, SHORT)
_YARN = {
    "extrapolation_factor": "yarn_ext_factor",
    "attention_factor": "yarn_attn_factor",
    "beta_fast": "yarn_beta_fast",
    "beta_slow": "yarn_beta_slow",
}
_OPTIONAL = (*_YARN, "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_NEEDED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor",),
    "longrope": ("long_factor", "short_factor"),
    "su": ("long_factor", "short_factor"),
}


def from_keys(keys: Keys, tensors: Mapping[str, Tensor], head_dim: int) -> dict[str, Any]:
    """Return Hugging Face's rope parameters of a file; ``tensors`` holds those of TENSORS that it has.

    Raises CheckpointError for a scaling that Hugging Face cannot say.
    """
    theta = keys.number("rope.freq_base", 10000.0)
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    width = keys.integer("rope.dimension_count", head_dim)
    if width != head_dim:
        parameters["partial_rotary_factor"] = width / head_dim
    if FREQS in tensors:
        return {**parameters, "rope_type": "llama3", **_llama3_parameters(tensors[FREQS], theta)}
    if LONG in tensors and SHORT in tensors:
        return {**parameters, **_longrope(keys, tensors)}
    kind = keys.text("rope.scaling.type", "linear")
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 1.0))
    if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
        return parameters
    if kind == "linear":
        return {**parameters, "rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise CheckpointError(f"{keys.path}: rope scaling {kind!r} without its tensors cannot be read")
    return {**parameters, **_yarn(keys, factor)}


def parameters_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rope parameters of full attention from a config.json of any age, rope_theta and rope_type filled in."""
    merged = {**(config.get("rope_parameters") or {}), **(config.get("rope_scaling") or {})}
    merged = {**merged, **(merged.get("full_attention") or {})}
    merged["rope_type"] = merged.get("rope_type", merged.get("type")) or "default"
    if merged.get("rope_theta") is None:
        merged["rope_theta"] = config.get("rope_theta") or (1e6 if config.get("model_type") == "gemma3_text" else 1e4)
    if merged.get("partial_rotary_factor") is None:
        merged["partial_rotary_factor"] = config.get("partial_rotary_factor") or 1.0
    return merged


def why_not(parameters: Mapping[str, Any], head_dim: int) -> str | None:
    """Return None when GGUF can say the rope parameters, else the reason."""
    kind = parameters["rope_type"]
    if kind not in _NEEDED:
        return f"rope scaling {kind!r}, which cannot be told in GGUF; it can tell {', '.join(_NEEDED)}"
    for name in ("rope_theta", "partial_rotary_factor", *_NEEDED[kind]):
        value = parameters.get(name)
        if name.endswith(("long_factor", "short_factor")):
            if not isinstance(value, list) or len(value) != head_dim // 2 or not all(map(is_number, value)):
                return f"rope scaling {kind!r} whose {name} is not a list of {head_dim // 2} numbers"
        elif not is_number(value):
            return f"rope scaling {kind!r} whose {name!r} is {value!r}; it must be a number"
    for name, value in parameters.items():
        if name in _OPTIONAL and value is not None and not is_number(value):
            return f"rope scaling {kind!r} whose {name!r} is {value!r}; it must be a number"
    return None


def is_number(value: Any) -> bool:
    """Whether a value of a JSON document is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def to_keys(parameters: Mapping[str, Any], head_dim: int, config: Mapping[str, Any]) -> list[Key]:
    """Return the keys of rope parameters, names without the architecture; call only when ``why_not`` is None."""
    kind = parameters["rope_type"]
    keys = [
        f32("rope.freq_base", parameters["rope_theta"]),
        u32("rope.dimension_count", int(head_dim * parameters["partial_rotary_factor"])),
    ]
    if kind in ("linear", "yarn"):
        keys += [text("rope.scaling.type", kind), f32("rope.scaling.factor", parameters["factor"])]
    if kind == "yarn":
        keys.append(u32("rope.scaling.original_context_length", _original_context(parameters, config)))
        keys += [
            f32(f"rope.scaling.{key}", parameters[name])
            for name, key in _YARN.items()
            if parameters.get(name) is not None
        ]
    if kind in ("longrope", "su"):
        original = _original_context(parameters, config)
        keys += [text("rope.scaling.type", "longrope"), u32("rope.scaling.original_context_length", original)]
        keys.append(f32("rope.scaling.attn_factor", _longrope_attention(parameters, config, original)))
    return keys


def to_tensors(parameters: Mapping[str, Any], head_dim: int) -> dict[str, Tensor]:
    """Return the extra tensors that the rope parameters need, by ggml's names."""
    kind = parameters["rope_type"]
    if kind == "llama3":
        return {FREQS: llama3_factors(parameters, head_dim)}
    if kind in ("longrope", "su"):
        lists = {LONG: parameters["long_factor"], SHORT: parameters["short_factor"]}
        return {name: torch.tensor(values, dtype=torch.float32) for name, values in lists.items()}
    return {}


def llama3_factors(parameters: Mapping[str, Any], head_dim: int) -> Tensor:
    """Return Llama 3's frequency divisors, float32 (head_dim / 2,).

    The same float32 operations in the same order as llama.cpp's conversion/llama.py: generate_extra_tensors.
    """
    factor = float(parameters.get("factor", 8.0))
    low, high = float(parameters.get("low_freq_factor", 1.0)), float(parameters.get("high_freq_factor", 4.0))
    context = parameters.get("original_max_position_embeddings", 8192)
    steps = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    wavelengths = 2 * math.pi / (1.0 / (parameters["rope_theta"] ** steps))
    smooth = (context / wavelengths - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    factors = torch.where(wavelengths > context / low, torch.full_like(between, factor), between)
    return torch.where(wavelengths < context / high, torch.ones_like(factors), factors)


def _llama3_parameters(factors: Tensor, theta: float) -> dict[str, Any]:
    """Find the parameters again: the published ones if they give these factors, else others that do.

    Between the two corner wavelengths, ``(1/f - 1/factor) / (1 - 1/factor)`` is linear in ``1 / wavelength`` with slope
    context / (high - low) and intercept -low / (high - low). One unknown is free, and low = 1 is what everyone uses; with a
    single factor in between, high = 4 is too.
    """
    factor, head_dim = shortest(float(factors.max())), 2 * len(factors)
    inverse = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim) / (2 * math.pi)
    middle = (factors > 1) & (factors < factor)
    guesses = [(8192, 4.0)]
    if factor > 1 and bool(middle.any()):
        smooth = (1 / factors[middle].double() - 1 / factor) / (1 - 1 / factor)
        guesses.append((round(float((3 * smooth[0] + 1) / inverse[middle][0])), 4.0))
        table = torch.stack((inverse[middle], torch.ones_like(smooth)), dim=1)
        slope, intercept = torch.linalg.lstsq(table, smooth[:, None]).solution[:, 0].tolist()
        if intercept < 0:
            guesses.append((round(-slope / intercept), round(1 - 1 / intercept, 4)))
    elif factor > 1 and bool(
        (factors == 1).any()
    ):  # a corner between the last untouched frequency and the first scaled one
        last, first = inverse[factors == 1].min(), inverse[factors == factor].max()
        guesses.append((round(float(2 / (last * first) ** 0.5)), 4.0))
    for context, high in guesses:
        found = {
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": high,
            "original_max_position_embeddings": context,
        }
        if high > 1 and torch.allclose(llama3_factors({**found, "rope_theta": theta}, head_dim), factors, rtol=1e-4):
            return found
    raise CheckpointError(
        f"{FREQS} is no Llama 3 rope scaling (its largest factor is {factor}), and Hugging Face has no other of this form"
    )


def _longrope(keys: Keys, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "long_factor": [shortest(value) for value in tensors[LONG].tolist()],
        "short_factor": [shortest(value) for value in tensors[SHORT].tolist()],
        "original_max_position_embeddings": keys.integer("rope.scaling.original_context_length"),
    }


def _yarn(keys: Keys, factor: float) -> dict[str, Any]:
    found: dict[str, Any] = {"rope_type": "yarn", "factor": factor}
    if "rope.scaling.original_context_length" in keys:
        found["original_max_position_embeddings"] = keys.integer("rope.scaling.original_context_length")
    for name, key in _YARN.items():
        if f"rope.scaling.{key}" in keys:
            found[name] = keys.number(f"rope.scaling.{key}")
    return found


def _original_context(parameters: Mapping[str, Any], config: Mapping[str, Any]) -> int:
    return int(
        parameters.get("original_max_position_embeddings")
        or config.get("original_max_position_embeddings")
        or config["max_position_embeddings"]
    )


def _longrope_attention(parameters: Mapping[str, Any], config: Mapping[str, Any], original: int) -> float:
    """Return longrope's attention factor: sqrt(1 + ln(scale) / ln(original)) (conversion/phi.py)."""
    scale = config["max_position_embeddings"] / original
    return math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
