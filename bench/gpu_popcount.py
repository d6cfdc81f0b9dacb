"""Products of signs on a GPU: microseconds by CUDA graph over rotating cold weights, against the read-only time of the same bytes.

    PYTHONPATH=core:cuda:bench python3 bench/gpu_popcount.py [OUTPUT.json] [--tune]

Weights have a sign for each entry and a scale for each row; activations are exact to 16 bits. The method is that of
``bench/gpu_products.py``; every product is compared with float64 first. ``--tune`` tries depths of the weight stream instead.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from gpu_products import copies, floor, graph_time

from lowbit_cuda.popcount import Popcount, PopcountShape, pack_signs

SHAPES = ((4096, 14336), (8192, 28672), (4096, 4096), (14336, 4096))
TUNED = (3, 4, 5, 6, 8, 10, 12, 16)


class Signs:
    """Random planes with scales, their copies, and what they are in float64."""

    def __init__(self, columns: int, rows: int, planes: int) -> None:
        generator = torch.Generator("cuda").manual_seed(0)
        bits = torch.randint(2, (planes, rows, columns), dtype=torch.uint8, device="cuda", generator=generator)
        self.scales = torch.rand(planes, rows, device="cuda", generator=generator) * 0.01
        self.signs = pack_signs(bits)
        self.dense = torch.zeros(rows, columns, device="cuda")
        for bit, scale in zip(bits, self.scales, strict=True):
            self.dense += (bit.float() * 2 - 1) * scale[:, None]
        self.copies = [self.signs.clone() for _ in range(copies(self.signs.numel()))]

    def check(self, shape: PopcountShape) -> float:
        """Return the relative error against float64."""
        x = torch.randn(shape.tokens, shape.in_features, device="cuda").to(shape.dtype)
        out = torch.empty(shape.tokens, shape.out_features, device="cuda", dtype=shape.out_dtype or shape.dtype)
        Popcount(shape)(self.signs, self.scales, x, out)
        expected = torch.cat([x.double() @ block.double().T for block in self.dense.split(2048)], 1)
        error = float((out.double() - expected).norm() / expected.norm())
        assert error < torch.finfo(shape.dtype).eps, error
        return float(f"{error:.3g}")

    def measure(self, shape: PopcountShape) -> tuple[float, float]:
        """Return microseconds and the relative error."""
        x = torch.randn(shape.tokens, shape.in_features, device="cuda").to(shape.dtype)
        out = torch.empty(shape.tokens, shape.out_features, device="cuda", dtype=shape.dtype)
        product, error = Popcount(shape), self.check(shape)
        return graph_time([partial(product, each, self.scales, x, out) for each in self.copies]), error


def measured(weight: Signs, shape: PopcountShape, read: float) -> dict[str, float]:
    """Return the figures of one product; those of one row of x with the error of a float32 result, which is that of 16 bits alone."""
    us, error = weight.measure(shape)
    figures = {
        "MB": round(weight.signs.numel() / 1e6, 1),
        "stages": shape.stages(torch.cuda.get_device_capability()),
        "us": us,
        "us_dependent": weight.measure(replace(shape, dependent=True))[0],
        "error": error,
        "floor_us": read,
        "of_floor": round(read / us, 3),
    }
    if shape.tokens == 1:
        figures["error_float32_result"] = weight.check(replace(shape, out_dtype=torch.float32))
    return figures


def figures(tune: bool) -> dict[str, dict[str, float]]:
    """Measure and print every case."""
    found: dict[str, dict[str, float]] = {}
    every = [(columns, rows, planes) for columns, rows in SHAPES for planes in (1, 2)]
    for columns, rows, planes in every[:3:2] if tune else every:
        weight = Signs(columns, rows, planes)
        read = floor(weight.signs.numel() // 16 * 16)
        if tune:
            shapes = [PopcountShape(columns, rows, planes=planes, most_stages=stages) for stages in TUNED]
        else:
            shapes = [PopcountShape(columns, rows, tokens, planes) for tokens in (1, 2, 4, 8)]
        capability = torch.cuda.get_device_capability()
        for shape in shapes:
            name = f"{planes} planes M={shape.tokens} {columns}x{rows}"
            name += f" stages {shape.stages(capability)}" if tune else ""
            if name in found:  # shared memory has no room for more
                continue
            if reason := shape.why_not(capability):
                print(f"{name}: {reason}", flush=True)
                continue
            found[name] = measured(weight, shape, read)
            print(name, found[name], flush=True)
        del weight
    return found


def main() -> None:
    """Measure, print, and write the figures to the given file."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--tune"]
    document = {
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name(0),
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda},
        "method": "CUDA graph replay, rotating cold weights (>= 256 MB, at most 64 copies), median of 11; K x N is in_features x out_features; "
        "floor_us reads the same bytes and does nothing",
        "figures": figures("--tune" in sys.argv),
    }
    if arguments:
        Path(arguments[0]).write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
