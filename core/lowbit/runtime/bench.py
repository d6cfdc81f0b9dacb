"""Timing a loaded model: prefill, decode, and each kind of layer against a dense one."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lowbit.runtime.generate import stream
from lowbit.runtime.graphs import READY_STEPS
from lowbit.runtime.linear import QuantLinear


@dataclass(frozen=True, slots=True)
class Rates:
    """Tokens per second, medians over the repetitions."""

    prefill: float
    decode: float


@dataclass(frozen=True, slots=True)
class LayerTime:
    """One kind of layer at one row of x: microseconds packed and dense, medians of runs taken in turns."""

    kernel: str
    layout: str
    shape: tuple[int, int]
    count: int
    packed: float
    dense: float


def measure_rates(model: Any, prompt_tokens: int, new_tokens: int, repeat: int) -> Rates:
    """Time ``repeat`` greedy runs over a prompt of random tokens (seed 0), after one to warm up."""
    vocabulary = model.get_input_embeddings().num_embeddings
    prompt = torch.randint(vocabulary, (prompt_tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    runs = [_run(model, prompt, new_tokens) for _ in range(repeat + 1)][1:]
    return Rates(
        statistics.median(prompt_tokens / first for first, _ in runs), statistics.median(rate for _, rate in runs)
    )


def measure_layers(model: nn.Module, repeat: int = 30) -> list[LayerTime]:
    """Time one layer of each kernel, layout and shape, in turns with ``F.linear`` of the same shape and dtype."""
    kinds: dict[tuple[str, str, tuple[int, int]], list[QuantLinear]] = {}
    for module in model.modules():
        if isinstance(module, QuantLinear) and module.kernel is not None:
            kinds.setdefault((module.kernel.name, module.spec.layout, module.spec.shape), []).append(module)
    return [LayerTime(*kind, len(layers), *_pair(layers[0], repeat)) for kind, layers in kinds.items()]


def _run(model: Any, prompt: list[int], new_tokens: int) -> tuple[float, float]:
    """Return the seconds to the first token, and tokens per second after those that get a GPU ready (``graphs.READY_STEPS``)."""
    tokens = stream(model, prompt, new_tokens)
    started = time.perf_counter()
    next(tokens)  # the loop reads each token, which waits for the device
    first = time.perf_counter()
    ready = min(READY_STEPS, new_tokens - 2) if model.device.type == "cuda" else 0
    for _ in range(ready):
        next(tokens)
    begun = time.perf_counter()
    for _ in tokens:
        pass
    return first - started, (new_tokens - 1 - ready) / (time.perf_counter() - begun)


def _pair(layer: QuantLinear, repeat: int) -> tuple[float, float]:
    weight = layer.dequantize()
    x = torch.randn(1, layer.in_features, dtype=layer.compute_dtype, device=weight.device)
    with torch.inference_mode():
        packed, dense = _in_turns((lambda: layer(x)), (lambda: nn.functional.linear(x, weight)), repeat)
    return packed, dense


def _in_turns(first: Callable[[], Any], second: Callable[[], Any], repeat: int) -> tuple[float, float]:
    """Return median microseconds of two functions, run alternately so that both see the same machine."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeat + 3):
        for function, found in zip((first, second), times, strict=True):
            started = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            found.append(time.perf_counter() - started)
    return statistics.median(times[0][3:]) * 1e6, statistics.median(times[1][3:]) * 1e6
