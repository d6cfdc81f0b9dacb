"""``config.json`` from the keys of a GGUF file, and the keys from a ``config.json``."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from lowbit.errors import CheckpointError
from lowbit_formats.gguf import rope
from lowbit_formats.gguf.architectures import ARCHITECTURES, BY_MODEL_TYPE, Architecture
from lowbit_formats.gguf.keys import Key, Keys, f32, u32

_SLIDING_PATTERN = 6  # llama.cpp's gemma3 makes every sixth layer a full one (src/models/gemma3.cpp)
_GEMMA3_27B_LAYERS = 62  # ... and scales attention of the 27B model by hidden / heads instead of the head's length
_SHAPE = {
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
}


def architecture_of(keys: Keys) -> Architecture:
    """Return the file's architecture; raises CheckpointError, naming it, for one that cannot be read here."""
    if keys.architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{keys.path} is a {keys.architecture!r} model; this lowbit reads the architectures {', '.join(ARCHITECTURES)}"
        )
    if "expert_count" in keys and keys.integer("expert_count"):
        raise CheckpointError(f"{keys.path} is a mixture of experts; this lowbit reads dense models only")
    return ARCHITECTURES[keys.architecture]


def head_dim_of(keys: Keys) -> int:
    """Return the length of an attention head."""
    heads = keys.integer("attention.head_count")
    if not heads:
        raise CheckpointError(f"{keys.path}: {keys.architecture}.attention.head_count is 0")
    length = keys.integer("attention.key_length", keys.integer("embedding_length") // heads)
    if keys.integer("attention.value_length", length) != length or not length:
        raise CheckpointError(f"{keys.path}: keys and values of different lengths are in no architecture read here")
    return length


def from_keys(
    keys: Keys, architecture: Architecture, names: Collection[str], vocab_size: int, extra: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Return the Hugging Face config of a file.

    Args:
        keys: The file's keys.
        architecture: What ``architecture_of`` returned.
        names: The Hugging Face names of its tensors.
        vocab_size: Rows of the embedding.
        extra: The rope tensors that it has.
    """
    head_dim = head_dim_of(keys)
    config: dict[str, Any] = {
        "architectures": [architecture.hf_class],
        "model_type": architecture.model_type,
        **{name: keys.integer(key) for name, key in _SHAPE.items()},
        "num_key_value_heads": keys.integer("attention.head_count_kv", keys.integer("attention.head_count")),
        "head_dim": head_dim,
        "vocab_size": vocab_size,
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "hidden_act": "silu",
        "tie_word_embeddings": "lm_head.weight" not in names,
        "attention_bias": any(name.endswith("_proj.bias") and ".self_attn." in name for name in names),
        "torch_dtype": "float32",
    }
    parameters = rope.from_keys(keys, extra, head_dim)
    if architecture.name == "gemma3":
        return {**config, **_gemma3(keys, config, parameters)}
    if architecture.name == "llama":
        config["mlp_bias"] = any(".mlp." in name and name.endswith(".bias") for name in names)
    if architecture.name == "phi3":
        config |= _phi3(keys, parameters)
    return {**config, **_rope_entries(parameters)}


def to_keys(config: Mapping[str, Any]) -> list[Key]:
    """Return the architecture's keys, names in full; call only when ``why_not`` is None."""
    architecture = BY_MODEL_TYPE[config["model_type"]]
    head_dim = head_dim_in(config)
    parameters = rope.parameters_of(config)
    keys = [u32(key, config[name]) for name, key in _SHAPE.items()]
    keys += [
        u32("attention.head_count_kv", config.get("num_key_value_heads") or config["num_attention_heads"]),
        u32("attention.key_length", head_dim),
        u32("attention.value_length", head_dim),
        f32("attention.layer_norm_rms_epsilon", config["rms_norm_eps"]),
        u32("vocab_size", config["vocab_size"]),
        *rope.to_keys(parameters, head_dim, config),
    ]
    if architecture.name == "gemma3":
        keys += _gemma3_keys(config)
    if architecture.name == "phi3":  # 0 tells Phi 4 from the others (conversion/phi.py)
        keys.append(u32("attention.sliding_window", config.get("sliding_window") or 0))
        if parameters["rope_type"] == "default":
            keys.append(u32("rope.scaling.original_context_length", _original_context(config)))
    return [Key(f"{architecture.name}.{key.name}", key.kind, key.value) for key in keys]


def why_not(config: Mapping[str, Any]) -> str | None:
    """Return None when llama.cpp would compute what this config says, else the reason."""
    kind = config.get("model_type")
    if kind not in BY_MODEL_TYPE:
        return f"a {kind!r} model; GGUF export writes {', '.join(BY_MODEL_TYPE)}"
    for name in (*_SHAPE, "vocab_size", "num_key_value_heads", "head_dim"):
        value = config.get(name)
        optional = name in ("num_key_value_heads", "head_dim") and value is None
        limit = 100_000 if name == "num_hidden_layers" else 2**31
        if not optional and not (isinstance(value, int) and 0 < value < limit):
            return f"a model whose {name} is {value!r}; it must be a whole number from 1 to {limit - 1}"
    if not rope.is_number(config.get("rms_norm_eps")):
        return f"a model whose rms_norm_eps is {config.get('rms_norm_eps')!r}; it must be a number"
    activation = config.get("hidden_activation") or config.get("hidden_act") or "silu"
    expected = ("gelu_pytorch_tanh",) if kind == "gemma3_text" else ("silu", "swish")
    if activation not in expected and (kind != "gemma3_text" or "hidden_activation" in config):
        return f"activation {activation!r}; llama.cpp computes {expected[0]} for {kind}"
    if config.get("use_sliding_window"):
        return "use_sliding_window; llama.cpp has full attention in every layer of this architecture"
    if reason := rope.why_not(rope.parameters_of(config), head_dim_in(config)):
        return reason
    return _why_not_gemma3(config) if kind == "gemma3_text" else None


def head_dim_in(config: Mapping[str, Any]) -> int:
    """Return the length of an attention head by a config.json."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _rope_entries(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return rope parameters as transformers 5 writes them, and as older readers expect them."""
    scaling = {name: value for name, value in parameters.items() if name not in ("rope_theta", "partial_rotary_factor")}
    entries: dict[str, Any] = {"rope_parameters": dict(parameters), "rope_theta": parameters["rope_theta"]}
    if "partial_rotary_factor" in parameters:
        entries["partial_rotary_factor"] = parameters["partial_rotary_factor"]
    if parameters["rope_type"] != "default":
        entries["rope_scaling"] = scaling
    return entries


def _gemma3(keys: Keys, config: Mapping[str, Any], parameters: Mapping[str, Any]) -> dict[str, Any]:
    window = keys.integer("attention.sliding_window", 0)
    layers = config["num_hidden_layers"]
    local = {"rope_type": "default", "rope_theta": keys.number("rope.freq_base_swa", 10000.0)}
    flat = _rope_entries(parameters)
    return {
        **flat,
        "rope_parameters": {"full_attention": flat["rope_parameters"], "sliding_attention": local},
        "rope_local_base_freq": local["rope_theta"],
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_act": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": _attention_scalar(config, config["head_dim"]),
        "sliding_window": window or config["max_position_embeddings"],
        "sliding_window_pattern": _SLIDING_PATTERN if window else 1,
        "layer_types": _layer_types(layers) if window else ["full_attention"] * layers,
        "final_logit_softcapping": keys.number("final_logit_softcapping", 0.0) or None,
        "attn_logit_softcapping": None,
    }


def _gemma3_keys(config: Mapping[str, Any]) -> list[Key]:
    keys = [u32("attention.sliding_window", config["sliding_window"]), f32("rope.freq_base_swa", _local_theta(config))]
    if softcap := config.get("final_logit_softcapping"):
        keys.append(f32("final_logit_softcapping", softcap))
    return keys


def _why_not_gemma3(config: Mapping[str, Any]) -> str | None:
    layers, pattern = config["num_hidden_layers"], config.get("sliding_window_pattern", _SLIDING_PATTERN)
    types = config.get("layer_types") or _layer_types(layers, pattern)
    if (
        types != _layer_types(layers)
        or not isinstance(config.get("sliding_window"), int)
        or not config["sliding_window"]
    ):
        return "layer_types other than five sliding layers and a full one; llama.cpp computes these for gemma3"
    scalar, expected = config.get("query_pre_attn_scalar", 256), _attention_scalar(config, head_dim_in(config))
    if scalar != expected:
        return f"query_pre_attn_scalar {scalar}; llama.cpp scales attention of such a model by {expected}"
    numbers = {
        "final_logit_softcapping": config.get("final_logit_softcapping") or 0,
        "rope_theta": _local_theta(config),
    }
    if wrong := [name for name, value in numbers.items() if not rope.is_number(value)]:
        return f"a model whose {wrong[0]} is {numbers[wrong[0]]!r}; it must be a number"
    if config.get("attn_logit_softcapping") or config.get("use_bidirectional_attention"):
        return "attn_logit_softcapping or use_bidirectional_attention, which llama.cpp's gemma3 does not have"
    return None


def _local_theta(config: Mapping[str, Any]) -> Any:
    """Return the base of sliding layers' rotary frequencies."""
    sliding = (config.get("rope_parameters") or {}).get("sliding_attention") or {}
    return sliding.get("rope_theta") or config.get("rope_local_base_freq") or 10000.0


def _attention_scalar(config: Mapping[str, Any], head_dim: int) -> int:
    large = config["num_hidden_layers"] == _GEMMA3_27B_LAYERS
    return int(config["hidden_size"] // config["num_attention_heads"]) if large else head_dim


def _layer_types(layers: int, pattern: int = _SLIDING_PATTERN) -> list[str]:
    return ["sliding_attention" if (layer + 1) % pattern else "full_attention" for layer in range(layers)]


def _phi3(keys: Keys, parameters: Mapping[str, Any]) -> dict[str, Any]:
    original = keys.integer("rope.scaling.original_context_length", keys.integer("context_length"))
    return {
        "original_max_position_embeddings": parameters.get("original_max_position_embeddings", original),
        "sliding_window": keys.integer("attention.sliding_window", 0) or None,
    }


def _original_context(config: Mapping[str, Any]) -> int:
    return int(config.get("original_max_position_embeddings") or config["max_position_embeddings"])
