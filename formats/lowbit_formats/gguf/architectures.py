"""The model architectures that can be told in GGUF: names of tensors, and what llama.cpp does to their values.

llama.cpp renames tensors (``conversion/`` and ``gguf-py/gguf/tensor_mapping.py``), interleaves the rows of q and k of
``llama`` (its rotary embedding turns neighbours, Hugging Face's turns halves), and stores gemma's norms plus one. In float32
that sum forgets the sign of a zero and all below 2**-24, so the norms themselves are kept in the key EXACT_NORMS, in the order
of the tensors; whoever does not know it reads the sums.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.errors import CheckpointError

EXACT_NORMS = "lowbit.norms"
_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_LLAMA = {
    **_ATTENTION,
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_QWEN3 = {**_LLAMA, "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_GEMMA3 = {
    **_QWEN3,
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_PHI3 = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}
_BLOCK_NAME = re.compile(r"(blk|model\.layers)\.(0|[1-9]\d{0,4})\.(.+)\.(weight|bias)")
_OUTER_NAME = re.compile(r"(.+)\.(weight|bias)")


@dataclass(frozen=True, slots=True)
class Architecture:
    """One architecture.

    Attributes:
        name: ``general.architecture``, and the prefix of its keys.
        model_type: ``model_type`` of the config that is rebuilt; ``accepts`` are those that are written as this one.
        block: In a decoder block, from ggml's stem to Hugging Face's module.
        interleaved: Whether the rows of q and k are interleaved.
        norm_offset: What the file adds to every norm.
    """

    name: str
    model_type: str
    hf_class: str
    accepts: tuple[str, ...]
    block: Mapping[str, str]
    interleaved: bool = False
    norm_offset: float = 0.0

    def hf_name(self, name: str, blocks: int) -> str | None:
        """Return the Hugging Face name of a ggml tensor, or None for a name that a model of ``blocks`` blocks does not have."""
        return _renamed(name, blocks, ("blk", "model.layers"), self.block, _OUTER)

    def ggml_name(self, name: str, blocks: int) -> str | None:
        """Return the ggml name of a Hugging Face tensor, or None for a name that such a model does not have."""
        return _renamed(name, blocks, ("model.layers", "blk"), _inverse(self.block), _inverse(_OUTER))

    def required(self, blocks: int) -> list[str]:
        """Return the Hugging Face names without which there is no model of ``blocks`` decoder blocks."""
        inner = [f"model.layers.{i}.{module}.weight" for i in range(blocks) for module in self.block.values()]
        return [f"{_OUTER['token_embd']}.weight", f"{_OUTER['output_norm']}.weight", *inner]

    def heads_of(self, name: str, heads: int, kv_heads: int) -> int | None:
        """Return how many heads the interleaved rows of a Hugging Face tensor have; None: its rows stay as they are."""
        if not self.interleaved:
            return None
        module = name.rpartition(".")[0]
        return {"q_proj": heads, "k_proj": kv_heads}.get(module.rpartition(".")[2])

    def offset_of(self, name: str) -> float:
        """Return what the file adds to a Hugging Face tensor."""
        return self.norm_offset if name.endswith("norm.weight") else 0.0


ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        # llama.cpp's llama has no sliding window: Mistral 7B v0.1 loses its own, as in llama.cpp's converter.
        Architecture("llama", "llama", "LlamaForCausalLM", ("llama", "mistral"), _LLAMA, interleaved=True),
        Architecture("qwen2", "qwen2", "Qwen2ForCausalLM", ("qwen2",), _LLAMA),
        Architecture("qwen3", "qwen3", "Qwen3ForCausalLM", ("qwen3",), _QWEN3),
        Architecture("gemma3", "gemma3_text", "Gemma3ForCausalLM", ("gemma3_text",), _GEMMA3, norm_offset=1.0),
        Architecture("phi3", "phi3", "Phi3ForCausalLM", ("phi3",), _PHI3),
    )
}

BY_MODEL_TYPE = {model_type: found for found in ARCHITECTURES.values() for model_type in found.accepts}


def interleave(rows: Tensor, heads: int) -> Tensor:
    """Put Hugging Face's rows (h, half, i) of q or k in ggml's order (h, i, half); a permutation of dimension 0.

    It moves whole rows, so packed rows move as well as floats. ``rows`` has heads * 2 * n rows.
    """
    return _rows_in_order(rows, torch.arange(len(rows), device=rows.device).view(heads, 2, -1).transpose(1, 2))


def deinterleave(rows: Tensor, heads: int) -> Tensor:
    """Undo ``interleave``."""
    return _rows_in_order(rows, torch.arange(len(rows), device=rows.device).view(heads, -1, 2).transpose(1, 2))


def _rows_in_order(rows: Tensor, order: Tensor) -> Tensor:
    return rows.index_select(0, order.reshape(-1))


def check_heads(name: str, rows: int, heads: int) -> None:
    """Raise CheckpointError unless ``rows`` are ``heads`` heads of an even length."""
    if heads < 1 or rows % (2 * heads):
        raise CheckpointError(f"{name} has {rows} rows, which are not {heads} heads of an even length")


def stored_norm(values: Tensor, offset: float) -> Tensor:
    """Return what llama.cpp expects of a norm: float32, the offset added (and rounded)."""
    return values.to(torch.float32) + offset


def _renamed(
    name: str, blocks: int, prefixes: tuple[str, str], block: Mapping[str, str], outer: Mapping[str, str]
) -> str | None:
    if found := _BLOCK_NAME.fullmatch(name):
        start, index, stem, suffix = found.groups()
        known = start == prefixes[0] and stem in block and int(index) < blocks
        return f"{prefixes[1]}.{index}.{block[stem]}.{suffix}" if known else None
    if (found := _OUTER_NAME.fullmatch(name)) and found[1] in outer:
        return f"{outer[found[1]]}.{found[2]}"
    return None


def _inverse(names: Mapping[str, str]) -> dict[str, str]:
    return {value: key for key, value in names.items()}
