"""Products on a GPU: microseconds by CUDA graph over rotating cold weights, against the read-only time of the same bytes and torch.

    PYTHONPATH=core:cuda python3 bench/gpu_products.py [OUTPUT.json]

Weights rotate over at least 256 MB, so that L2 is cold; each time is the median of 11 replays of a graph of 24 launches or more.
Each product is checked against float32 first. ``bench/plot_gpu.py`` draws what this writes.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowbit_cuda.decoder import AFFINE, CODEBOOK, Decoder
from lowbit_cuda.gemm import Dequantizer, Gemm, GemmShape
from lowbit_cuda.gemv import MAX_TOKENS, Gemv, GemvShape
from lowbit_cuda.launch import Launcher
from lowbit_cuda.program import KernelProgram
from lowbit_cuda.units import UnitFormat, pack_units

SHAPES = ((4096, 4096), (4096, 11008), (4096, 14336), (14336, 4096), (8192, 28672), (28672, 8192))
COLD_BYTES = 256e6
CASES = [  # decoder, group, offsets, rows of x
    *((AFFINE[bits], 128, "CONSTANT", tokens) for bits in (4, 3, 2) for tokens in (1, 8, 16, 64)),
    *((CODEBOOK[bits], 64, "CONSTANT", tokens) for bits in (4, 3, 2) for tokens in (1, 8)),
]
OTHERS = [  # at 4096 x 14336 and 4096 x 5120 only
    *((AFFINE[bits], 128, "CONSTANT", 1) for bits in (1, 5, 6, 8)),
    (AFFINE[4], 64, "CONSTANT", 1),
    (AFFINE[4], 32, "CONSTANT", 1),
    (AFFINE[4], 128, "ZEROS", 1),
    (AFFINE[4], 32, "MINIMUMS", 1),
]


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
    return round(sorted(times)[len(times) // 2], 2)


def copies(nbytes: int) -> int:
    """Return how many copies of a weight make L2 cold."""
    return max(2, min(64, math.ceil(COLD_BYTES / nbytes)))


def floor(nbytes: int) -> float:
    """Return the microseconds of reading ``nbytes`` and nothing else."""
    launcher = Launcher(KernelProgram(Path(__file__).parent / "floor.cu", "read_only"))
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    buffers = [torch.zeros(nbytes, dtype=torch.uint8, device="cuda") for _ in range(copies(nbytes))]
    never = torch.zeros(1, dtype=torch.int32, device="cuda")
    configs = [launcher.config(blocks * processors, 512) for blocks in (1, 2, 4)]

    def read(config: Any, buffer: Tensor) -> None:
        launcher.launch(config, [buffer.data_ptr(), np.int64(nbytes // 16), never.data_ptr()])

    return min(graph_time([partial(read, config, buffer) for buffer in buffers]) for config in configs)


class Weight:
    """A random weight in units, its copies, and what it is in float32."""

    def __init__(self, decoder: Decoder, group: int, offset: str, columns: int, rows: int) -> None:
        generator = torch.Generator("cuda").manual_seed(0)
        dtype = torch.float32 if offset == "MINIMUMS" else torch.float16
        self.format, self.shape = UnitFormat(decoder, group, dtype, offset), (rows, columns)
        codes = torch.randint(2**decoder.bits, (rows, columns), dtype=torch.uint8, device="cuda", generator=generator)
        scales = torch.rand(rows, columns // group, device="cuda", generator=generator).mul(0.01).to(dtype)
        self.zero = 2.0 ** (decoder.bits - 1)
        self.entries = torch.arange(2**decoder.bits, device="cuda") - self.zero
        offsets = {"CONSTANT": None, "ZEROS": torch.full_like(scales, self.zero), "MINIMUMS": scales * -self.zero}[
            offset
        ]
        self.units = pack_units(self.format, codes, scales, offsets)
        self.dense = self.entries[codes.long()] * scales.float().repeat_interleave(group, 1)
        self.copies = [self.units.clone() for _ in range(copies(self.units.numel()))]

    def measure(self, tokens: int) -> dict[str, float]:
        """Check the product of ``tokens`` rows, then time it; a GEMV also with programmatic dependent launch."""
        rows, columns = self.shape
        x = torch.randn(tokens, columns, device="cuda").half()
        out = torch.empty(tokens, rows, device="cuda", dtype=torch.float16)
        expected = x.float() @ self.dense.T
        figures: dict[str, float] = {"MB": round(self.units.numel() / 1e6, 1)}
        for name, dependent in (("us", False), ("us_dependent", True)):
            product = self.product(tokens, dependent)
            product(self.units, x, out)
            figures["error"] = round(float((out - expected).norm() / expected.norm()), 6)
            assert figures["error"] < 5e-4
            figures[name] = graph_time([partial(product, each, x, out) for each in self.copies])
            if tokens > MAX_TOKENS:
                break
        return figures

    def product(self, tokens: int, dependent: bool) -> Callable[[Tensor, Tensor, Tensor], None]:
        """Return the kernel for ``tokens`` rows: GEMV, or GEMM."""
        rows, columns = self.shape
        if tokens <= MAX_TOKENS:
            gemv = Gemv(GemvShape(self.format, columns, rows, tokens, torch.float16, dependent))
            return lambda units, x, out: gemv(units, x, out, None, self.zero, self.entries)
        shape = GemmShape(self.format, columns, rows, tokens)
        gemm, arrived = Gemm(shape), torch.zeros(shape.row_blocks, dtype=torch.int32, device="cuda")
        return lambda units, x, out: gemm(units, x, out, arrived, None, self.zero, self.entries)

    def dequantize(self) -> dict[str, float]:
        """Time the weight's way to fp16, against a copy of as many bytes."""
        outs = [torch.empty(self.shape, device="cuda", dtype=torch.float16) for _ in range(4)]
        kernel = Dequantizer(self.format, torch.float16)
        calls = [
            partial(kernel, units, out, self.zero, self.entries)
            for units, out in zip(self.copies * 4, outs, strict=False)
        ]
        half = (self.units.numel() + outs[0].nbytes) // 32 * 16
        sides = [torch.zeros(2, half, dtype=torch.uint8, device="cuda") for _ in range(4)]
        copied = graph_time([partial(side[0].copy_, side[1]) for side in sides])
        us = graph_time(calls)
        return {"us": us, "us_copy_of_the_bytes": copied, "rate_of_copy": round(copied / us, 3)}


def dense(tokens: int, columns: int, rows: int) -> float:
    """Return the microseconds of torch's fp16 matmul (cuBLAS) of the same shape."""
    weights = [torch.randn(rows, columns, device="cuda").half() for _ in range(copies(2 * rows * columns))]
    x = torch.randn(tokens, columns, device="cuda").half()
    return graph_time([partial(torch.nn.functional.linear, x, each) for each in weights])


def torch_int4(tokens: int, columns: int, rows: int) -> float:
    """Return the microseconds of torch's own int4 product, bf16, groups of 128."""
    codes = torch.randint(256, (rows, columns // 2), dtype=torch.uint8, device="cuda")
    weight = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
    scales = torch.rand(columns // 128, rows, 2, device="cuda").bfloat16()
    weights = [weight.clone() for _ in range(copies(weight.nbytes))]
    x = torch.randn(tokens, columns, device="cuda").bfloat16()
    return graph_time([partial(torch.ops.aten._weight_int4pack_mm, x, each, 128, scales) for each in weights])


def prefill(weight: Weight, tokens: int) -> float:
    """Return the microseconds of a long product: dequantize, then cuBLAS."""
    kernel, out = (
        Dequantizer(weight.format, torch.float16),
        torch.empty(weight.shape, device="cuda", dtype=torch.float16),
    )
    x = torch.randn(tokens, weight.shape[1], device="cuda").half()

    def call(units: Tensor) -> None:
        kernel(units, out, weight.zero, weight.entries)
        torch.nn.functional.linear(x, out)

    return graph_time([partial(call, each) for each in weight.copies])


def main() -> None:
    """Measure every case, print them, and write them to the given file."""
    figures: dict[str, dict[str, float]] = {}

    def note(name: str, values: dict[str, float]) -> None:
        figures[name] = values
        print(name, values, flush=True)

    for columns, rows in (*SHAPES, (4096, 5120)):
        where = f"{columns}x{rows}"
        full = (columns, rows) in SHAPES
        groups: dict[tuple[Decoder, int, str], list[int]] = {}
        for decoder, group, offset, tokens in [*(CASES if full else []), *(OTHERS if rows in (14336, 5120) else [])]:
            groups.setdefault((decoder, group, offset), []).append(tokens)
        for (decoder, group, offset), all_tokens in groups.items():
            weight = Weight(decoder, group, offset, columns, rows)
            kind = f"{'affine' if decoder.integer else 'codebook'} {decoder.bits}-bit g{group} {offset.lower()}"
            read = floor(weight.units.numel() // 16 * 16)
            for tokens in all_tokens:
                found = weight.measure(tokens)
                note(
                    f"{kind} M={tokens} {where}", {**found, "floor_us": read, "of_floor": round(read / found["us"], 3)}
                )
            if (columns, rows) == (4096, 14336) and 1 in all_tokens:
                note(f"{kind} dequantize {where}", weight.dequantize())
            if (decoder, columns) == (AFFINE[4], 4096) and rows == 14336 and group == 128 and offset == "CONSTANT":
                note(f"{kind} M=2048 {where}", {"us": prefill(weight, 2048)})
            del weight
        for tokens in (1, 8, 16, 64, *((2048,) if rows == 14336 else ())):
            note(f"cuBLAS fp16 M={tokens} {where}", {"us": dense(tokens, columns, rows)})
        for tokens in (1, 16, 64):
            note(f"torch int4 bf16 g128 M={tokens} {where}", {"us": torch_int4(tokens, columns, rows)})
    document = {
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name(0),
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda},
        "method": "CUDA graph replay, rotating cold weights (>= 256 MB), median of 11; K x N is in_features x out_features; "
        "floor_us reads the same bytes and does nothing",
        "figures": figures,
    }
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
