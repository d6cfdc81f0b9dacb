"""Decoding with a whole model on a GPU: microseconds a token and a block, packed against fp16, with and without dependent launch.

    PYTHONPATH=.:core:cuda:formats:plugins/kbit:plugins/autoround python3 bench/gpu_decode.py [OUTPUT.json] [--blocks 16]

Blocks of Llama-3.1-8B's shape with random fp16 weights, made and quantized on the GPU; one captured step is replayed
(``lowbit.runtime.graphs``), as ``lowbit generate`` does. The weights of one token are read once, 16 blocks hold 7 GB in fp16: L2 is cold.
Dependent launch lets a product fetch its weights while the kernel before it ends; everything between products is transformers'.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lowbit
import lowbit_cuda.plugin
from lowbit.runtime.graphs import GraphedSteps

SHAPE = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
QUANTIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "kbit 4-bit g64": ("kbit", {"bits": 4, "group_size": 64}),
    "kbit 3-bit g64": ("kbit", {"bits": 3, "group_size": 64}),
    "affine 4-bit g128": ("autoround", {"bits": 4, "group_size": 128, "recipe": "rtn"}),
}


def build(blocks: int) -> Any:
    """Return a model of ``blocks`` blocks in fp16 on the GPU; its vocabulary is small, so that blocks are what counts."""
    config = LlamaConfig(**SHAPE, num_hidden_layers=blocks, vocab_size=1024, max_position_embeddings=2048)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device("cuda"):
            return LlamaForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def decode(model: Any, steps: int = 64, runs: int = 5) -> float:
    """Return the microseconds of a step, the median of ``runs`` runs of ``steps`` replayed steps."""
    graphed = GraphedSteps(model, 2 + 8 + steps * (runs + 1))
    graphed.prefill(torch.tensor([[1, 2]], device="cuda"))
    for token in range(8):
        graphed.step(token)
    times = []
    for _ in range(runs):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for token in range(steps):
            graphed.step(token)
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / steps)
    return statistics.median(times)


def measure(blocks: int) -> dict[str, dict[str, float]]:
    """Return what each kind of weights takes."""
    figures: dict[str, dict[str, float]] = {}
    model = build(blocks)
    dense = decode(model)
    figures["fp16"] = {"us": round(dense, 1), "us a block": round(dense / blocks, 2)}
    print(figures, flush=True)
    del model
    independent = lowbit_cuda.plugin._dependent
    for name, (quantizer, options) in QUANTIZERS.items():
        started = time.perf_counter()
        model = lowbit.quantize_model(build(blocks), quantizer, **options)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        lowbit_cuda.plugin._dependent = lambda device: False
        alone = decode(model)
        lowbit_cuda.plugin._dependent = independent
        us = decode(model)
        figures[name] = {
            "us": round(us, 1),
            "us a block": round(us / blocks, 2),
            "us without dependent launch": round(alone, 1),
            "gain of dependent launch": round(alone / us, 3),
            "speed by fp16": round(dense / us, 2),
            "seconds to make and quantize": round(seconds, 1),
        }
        print(name, figures[name], flush=True)
        del model
        torch.cuda.empty_cache()
    return figures


def main() -> None:
    """Measure, print, and write to the given file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("output", nargs="?", type=Path)
    parser.add_argument("--blocks", type=int, default=16)
    flags = parser.parse_args()
    document = {
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "blocks": flags.blocks,
        "figures": measure(flags.blocks),
    }
    if flags.output:
        flags.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
