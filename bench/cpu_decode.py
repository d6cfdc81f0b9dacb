"""Speed of 4-bit weights on a CPU: SmolLM2 against bfloat16 in transformers, and layers against the reference kernel.

    python bench/cpu_decode.py [--rounds 5]

All models decode in the same process, in turns; the median of the ratios counts. Writes ``bench/baselines/cpu_decode.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from models import smollm2
from transformers import AutoModelForCausalLM

import lowbit
from lowbit.convert import convert
from lowbit.plan import Target
from lowbit.recipe import Recipe, Rule
from lowbit.runtime.bench import measure_rates
from lowbit.testing import samples

BASELINE = Path(__file__).parent / "baselines" / "cpu_decode.json"
PROMPT, NEW = 64, 32
SCHEMES = {
    "4-bit g64": lowbit.Scheme(lowbit.Grid.AFFINE, 4, 64),
    "4-bit g128 asym": lowbit.Scheme(lowbit.Grid.AFFINE, 4, 128, lowbit.Zero.INTEGER),
    "8-bit g32": lowbit.Scheme(lowbit.Grid.AFFINE, 8, 32),
    "8-bit, one scale a row": lowbit.Scheme(lowbit.Grid.AFFINE, 8),
}
SHAPE = (2048, 2048)


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    document = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, "
        f"torch {torch.__version__}, {torch.get_num_threads()} threads",
        "method": f"greedy decoding of {NEW} tokens after {PROMPT}; medians of ratios of runs in turns",
        "SmolLM2-135M": models(rounds),
        "layers 2048x2048, one row": {name: layers(scheme) for name, scheme in SCHEMES.items()},
    }
    print(json.dumps(document, indent=1))
    BASELINE.write_text(json.dumps(document, indent=1) + "\n")


def models(rounds: int) -> dict[str, float]:
    """Return tokens per second of both models, and how many times faster the 4-bit one is."""
    registry = lowbit.installed()
    rule = Rule("*", "autoround", {"bits": "4", "group_size": "64"})
    with tempfile.TemporaryDirectory() as name:
        plain, packed = Path(name) / "plain", Path(name) / "packed"
        convert(smollm2(), plain, Target("hf"), registry)
        convert(plain, packed, Target("native"), registry, Recipe(rule))
        ours = lowbit.load(packed)
        theirs = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.bfloat16)
    pairs = [[measure_rates(model, PROMPT, NEW, 1) for model in (ours, theirs)] for _ in range(rounds)]
    return {
        "decode_4bit": round(statistics.median(first.decode for first, _ in pairs), 1),
        "decode_bf16": round(statistics.median(second.decode for _, second in pairs), 1),
        "decode_ratio": round(statistics.median(first.decode / second.decode for first, second in pairs), 3),
        "prefill_ratio": round(statistics.median(first.prefill / second.prefill for first, second in pairs), 3),
    }


def layers(scheme: lowbit.Scheme) -> dict[str, float | str]:
    """Return how many times faster than the reference kernel, and than a dense bfloat16 product, the chosen kernel is."""
    registry = lowbit.installed()
    packed = registry.packers["plain"].pack(samples.quantized(scheme, SHAPE))
    layer = lowbit.QuantLinear.from_packed(packed, dtype=torch.bfloat16)
    reference, dense = registry.kernels["torch-plain"], layer.dequantize()
    x = torch.randn(1, SHAPE[1]).bfloat16()
    runs = (lambda: layer(x), lambda: reference.matmul(x, packed), lambda: torch.nn.functional.linear(x, dense))
    with torch.inference_mode():
        times = [[seconds(run) for run in runs] for _ in range(33)][3:]
    assert layer.kernel is not None
    return {
        "kernel": layer.kernel.name,
        "times_reference": round(statistics.median(slow / fast for fast, slow, _ in times), 2),
        "times_bf16": round(statistics.median(slow / fast for fast, _, slow in times), 2),
    }


def seconds(run) -> float:
    """Return the seconds of a call."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
