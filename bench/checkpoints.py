"""Synthetic checkpoints of any size, shaped like an 8B Llama, for figures about speed and memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch

from lowbit import Metadata, TensorSpec, installed

HIDDEN, INTERMEDIATE, KEYS = 4096, 14336, 1024


def write(folder: Path, nbytes: int, shards: int, hidden: int = HIDDEN, intermediate: int = INTERMEDIATE) -> None:
    """Write a bf16 checkpoint of about ``nbytes`` in ``shards`` safetensors files; Gaussian weights, seed 0."""
    entries = dict(_entries(nbytes, hidden, intermediate))
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(hidden * intermediate, generator=generator).mul_(0.02).bfloat16()

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        for index, (name, spec) in enumerate(entries.items()):
            rows, columns = (*spec.shape, 1)[:2]
            yield name, noise.roll(index)[: rows * columns].reshape(spec.shape)

    total = sum(spec.nbytes for spec in entries.values())
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16"}
    installed().exporters["hf"].write(
        folder, entries, stream(), Metadata(config), shard_size=total // shards + hidden * intermediate * 2
    )


def _entries(nbytes: int, hidden: int, intermediate: int) -> Iterator[tuple[str, TensorSpec]]:
    shapes = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden // 4, hidden),
        "self_attn.v_proj": (hidden // 4, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }
    layer_bytes = 2 * sum(torch.Size(shape).numel() for shape in shapes.values())
    for layer in range(max(1, round(nbytes / layer_bytes))):
        for name, shape in shapes.items():
            yield f"model.layers.{layer}.{name}.weight", TensorSpec(torch.bfloat16, shape)


def describe(folder: Path) -> dict[str, float]:
    """Return bytes, shards and the largest tensor in float32 of a written checkpoint."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    return {"bytes": sum((folder / name).stat().st_size for name in files), "shards": len(files)}
