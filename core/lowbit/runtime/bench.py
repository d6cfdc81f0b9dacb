"""Timing a loaded model: prefill, decode, and each kind of layer against a dense one."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowbit.plugins import installed
from lowbit.runtime.extras import need_transformers
from lowbit.runtime.generate import stream
from lowbit.runtime.graphs import READY_STEPS
from lowbit.runtime.linear import QuantLinear
from lowbit.runtime.load import find_model_class, model_config

Call = Callable[[], Any]
_DENSE_BYTES = 1 << 30
_LEAST_CALLS = 64


@dataclass(frozen=True, slots=True)
class Rates:
    """Tokens per second, medians over the repetitions."""

    prefill: float
    decode: float


@dataclass(frozen=True, slots=True)
class LayerTime:
    """One kind of layer at one row of x: microseconds packed and dense, medians of runs taken in turns.

    ``replayed`` says that a CUDA graph was timed, and not the host that launches kernels.
    """

    kernel: str
    layout: str
    shape: tuple[int, int]
    count: int
    packed: float
    dense: float
    replayed: bool


def import_model_code(path: Path) -> None:
    """Import all that a model needs, plugins, transformers and its model class, so that loading it can be timed alone."""
    need_transformers("lowbit bench")
    with installed().open(path) as checkpoint:
        find_model_class(model_config(checkpoint.metadata, str(path)))
    import lowbit.runtime.hf  # noqa: F401


def measure_rates(model: Any, prompt_tokens: int, new_tokens: int, repeat: int) -> Rates:
    """Time ``repeat`` greedy runs over a prompt of random tokens (seed 0), after one to warm up."""
    vocabulary = model.get_input_embeddings().num_embeddings
    prompt = torch.randint(vocabulary, (prompt_tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    runs = [_run(model, prompt, new_tokens) for _ in range(repeat + 1)][1:]
    return Rates(
        statistics.median(prompt_tokens / first for first, _ in runs), statistics.median(rate for _, rate in runs)
    )


def measure_layers(model: nn.Module, repeat: int = 30) -> list[LayerTime]:
    """Time one layer of each kernel, layout and shape, in turns with ``F.linear`` of the same shape and dtype.

    On CUDA several layers of each kind one after the other, from a captured graph where that is possible.
    """
    kinds: dict[tuple[str, str, tuple[int, int]], list[QuantLinear]] = {}
    for module in model.modules():
        if isinstance(module, QuantLinear) and module.kernel is not None:
            kinds.setdefault((module.kernel.name, module.spec.layout, module.spec.shape), []).append(module)
    return [LayerTime(*kind, len(layers), *_pair(layers, repeat)) for kind, layers in kinds.items()]


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


def _pair(layers: Sequence[QuantLinear], repeat: int) -> tuple[float, float, bool]:
    """Return microseconds of a product, packed and dense, and whether replays were timed."""
    rotated = layers[: _rotation(layers[0])]
    weights = [layer.dequantize() for layer in rotated]
    x = torch.randn(1, layers[0].in_features, dtype=layers[0].compute_dtype, device=weights[0].device)
    packed: list[Call] = [partial(layer, x) for layer in rotated]
    dense: list[Call] = [partial(nn.functional.linear, x, weight) for weight in weights]
    with torch.inference_mode():
        runs = [replayed(packed), replayed(dense)] if x.is_cuda else [None, None]
        if runs[0] is not None and runs[1] is not None:
            return *_in_turns(runs[0], runs[1], repeat), True
        return *_in_turns((packed[0], 1), (dense[0], 1), repeat), False


def _rotation(layer: QuantLinear) -> int:
    """Return how many equal layers to time in turns: on CUDA as many as fit ``_DENSE_BYTES`` when dense, so that L2 is cold."""
    nbytes = layer.in_features * layer.out_features * layer.compute_dtype.itemsize
    return max(1, _DENSE_BYTES // nbytes) if layer.device.type == "cuda" else 1


def replayed(calls: Sequence[Call]) -> tuple[Call, int] | None:
    """Capture calls as one CUDA graph, each as often as makes ``_LEAST_CALLS``; return its replay, and the number of calls in it.

    Launching a small kernel takes the host longer than running it takes the GPU; decoding replays a graph, too. None when the calls
    cannot be captured, as those that wait for the GPU.
    """
    rounds = -(-_LEAST_CALLS // len(calls))

    def run() -> None:
        for _ in range(rounds):
            for call in calls:
                call()

    try:
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(side):
            run()  # kernels are loaded and memory is allocated before the capture
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
    except (RuntimeError, AssertionError):  # the latter from a torch without CUDA
        return None
    return graph.replay, rounds * len(calls)


def _in_turns(first: tuple[Call, int], second: tuple[Call, int], repeat: int) -> tuple[float, float]:
    """Return median microseconds of a call of two runs of several, run alternately so that both see the same machine."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeat + 3):
        for (run, count), found in zip((first, second), times, strict=True):
            started = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            found.append((time.perf_counter() - started) / count)
    return statistics.median(times[0][3:]) * 1e6, statistics.median(times[1][3:]) * 1e6
