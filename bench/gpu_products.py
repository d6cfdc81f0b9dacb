"""GEMV on a GPU: microseconds by CUDA graph over rotating cold weights, against the read-only time of the same bytes and cuBLAS.

    PYTHONPATH=core:cuda python3 bench/gpu_gemv.py [OUTPUT.json]

Weights rotate over at least 256 MB, so that L2 is cold; each time is the median of 11 replays of a graph of 24 launches or more.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from lowbit_cuda.decoder import Decoder
from lowbit_cuda.gemv import Gemv, GemvShape
from lowbit_cuda.units import UnitFormat, pack_units

SHAPES = ((4096, 4096), (4096, 11008), (4096, 14336), (8192, 28672))
COLD_BYTES = 256e6


def graph_time(calls: list[Callable[[], object]], replays: int = 11) -> float:
    """Return the median microseconds of one call, by replaying a graph that makes all of them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    count = max(24, len(calls))
    with torch.cuda.graph(graph):
        for index in range(count):
            calls[index % len(calls)]()
    times = []
    for replay in range(replays + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        if replay >= 3:
            times.append(begin.elapsed_time(end) * 1e3 / count)
    return sorted(times)[len(times) // 2]


def copies(nbytes: int) -> int:
    """Return how many copies of a weight make L2 cold."""
    return max(2, min(64, math.ceil(COLD_BYTES / nbytes)))


def measure(decoder: Decoder, group: int, zeros: bool, tokens: int, columns: int, rows: int) -> dict[str, float]:
    """Check one shape against float64, then time it with and without programmatic dependent launch."""
    generator = torch.Generator("cuda").manual_seed(0)
    format = UnitFormat(decoder, group, offset="ZEROS" if zeros else "CONSTANT")
    codes = torch.randint(2**decoder.bits, (rows, columns), dtype=torch.uint8, device="cuda", generator=generator)
    scales = torch.rand(rows, columns // group, device="cuda", generator=generator).mul(0.01).half()
    middle = 2.0 ** (decoder.bits - 1)
    own = torch.full_like(scales, middle) if zeros else None
    units = pack_units(format, codes, scales, own)
    x = torch.randn(tokens, columns, device="cuda", generator=generator).half()
    values = torch.arange(2**decoder.bits, device="cuda") - middle
    expected = x.float() @ (values[codes.long()] * scales.float().repeat_interleave(group, 1)).T
    out = torch.empty(tokens, rows, device="cuda", dtype=torch.float16)
    weights = [units.clone() for _ in range(copies(units.numel()))]
    figures: dict[str, float] = {"MB": round(units.numel() / 1e6, 1)}
    for name, dependent in (("us", False), ("us_dependent", True)):
        gemv = Gemv(GemvShape(format, columns, rows, tokens, torch.float16, dependent))
        gemv(units, x, out, zero=middle, codebook=values)
        figures["error"] = round(float((out - expected).norm() / expected.norm()), 6)
        assert figures["error"] < 5e-4
        calls = [partial(gemv, each, x, out, zero=middle, codebook=values) for each in weights]
        figures[name] = round(graph_time(calls), 2)
    figures["GB/s"] = round(units.numel() / figures["us"] / 1e3)
    return figures


def dense(tokens: int, columns: int, rows: int) -> float:
    """Return the microseconds of torch's fp16 matmul of the same shape."""
    weights = [torch.randn(rows, columns, device="cuda").half() for _ in range(copies(2 * rows * columns))]
    x = torch.randn(tokens, columns, device="cuda").half()
    return round(graph_time([partial(torch.nn.functional.linear, x, each) for each in weights]), 2)


def main() -> None:
    """Measure every case, print them, and write them to the given file."""
    cases = [(bits, 128, False, tokens, *shape) for shape in SHAPES for bits in (4, 3, 2) for tokens in (1, 8)]
    cases += [(4, 32, True, 1, 4096, 14336), (4, 64, False, 1, 4096, 14336), (8, 128, False, 1, 4096, 14336)]
    figures = {}
    for bits, group, zeros, tokens, columns, rows in cases:
        name = f"{bits}-bit g{group}{' zeros' if zeros else ''} M={tokens} {columns}x{rows}"
        figures[name] = measure(bits, group, zeros, tokens, columns, rows)
        print(name, figures[name], flush=True)
    for columns, rows in SHAPES:
        for tokens in (1, 8):
            name = f"cuBLAS fp16 M={tokens} {columns}x{rows}"
            figures[name] = {"us": dense(tokens, columns, rows)}
            print(name, figures[name], flush=True)
    document = {
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name(0),
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda},
        "method": "CUDA graph replay, rotating cold weights (>= 256 MB), median of 11; K x N is in_features x out_features",
        "figures": figures,
    }
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
