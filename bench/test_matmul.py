"""Products on a GPU, ours and other people's, by the same method: CUDA graph replays over rotating cold weights, medians.

    PYTHONPATH=core:cuda:formats python3 bench/test_matmul.py OUTPUT.json [--peers NAME ...] [--shapes KxN ...] [--tokens M ...]

prints one table: microseconds, GB/s, and the part of the time that reading the same bytes takes in this run. Under pytest each product
runs once at a small shape and is compared with float64; without a GPU everything is skipped.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("cuda.core", reason='cuda-core is not installed (pip install "lowbit[gpu]")')

import gpu_peers
from gpu_products import SHAPES, Weight, floor, graph_time

from lowbit_cuda.decoder import AFFINE, CODEBOOK
from lowbit_cuda.errors import CudaError

OURS = {
    **{f"affine {bits}-bit g128": (AFFINE[bits], 128, "CONSTANT") for bits in (4, 3, 2, 1, 8)},
    "affine 4-bit g32 zeros": (AFFINE[4], 32, "ZEROS"),
    **{f"codebook {bits}-bit g64": (CODEBOOK[bits], 64, "CONSTANT") for bits in (2, 3, 4, 5, 6, 7, 8)},
}
TOKENS = (1, 2, 4, 8, 16, 32, 64)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("tokens", [1, 16, 33])
@pytest.mark.parametrize("name", OURS)
def test_matmul(benchmark, name, tokens):
    weight = Weight(*OURS[name], 1024, 512)  # measure compares with float32 first
    try:
        figures = benchmark.pedantic(weight.measure, (tokens,), rounds=1)
    except CudaError as error:
        pytest.skip(str(error))  # torch multiplies by the dense weight then
    benchmark.extra_info |= figures
    assert figures["us"] > 0


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("name", gpu_peers.PRODUCTS)
def test_peers_run(benchmark, name):
    try:
        calls = gpu_peers.PRODUCTS[name](1024, 512, 4)
    except ImportError as error:
        pytest.skip(f"{error}")
    benchmark.extra_info["us"] = benchmark.pedantic(graph_time, (calls[:2],), rounds=1)
    assert calls[0]().shape == (4, 512)


def measure_ours(name: str, columns: int, rows: int, all_tokens: list[int]) -> dict[str, dict[str, float | str]]:
    """Return the figures of one of ``OURS`` by ``name M=tokens KxN``."""
    weight = Weight(*OURS[name], columns, rows)
    nbytes = weight.units.numel()
    read, found = floor(nbytes // 16 * 16), {}
    for tokens in all_tokens:
        try:
            figures = weight.measure(tokens)
        except CudaError as error:  # no kernel has room for it
            found[f"{name} M={tokens} {columns}x{rows}"] = {"why not": str(error)}
            continue
        rate = {
            "GB/s": round(nbytes / figures["us"] / 1e3),
            "floor_us": read,
            "of_floor": round(read / figures["us"], 3),
        }
        found[f"{name} M={tokens} {columns}x{rows}"] = {**figures, **rate}
    return found


def measure_peer(name: str, columns: int, rows: int, tokens: int) -> dict[str, float | str]:
    """Return microseconds, or why there are none."""
    started = time.perf_counter()
    try:
        calls = gpu_peers.PRODUCTS[name](columns, rows, tokens)
        return {"us": graph_time(calls), "seconds to get there": round(time.perf_counter() - started, 1)}
    except gpu_peers.FAILURES as error:
        torch.cuda.synchronize()
        return {"why not": " ".join(f"{type(error).__name__}: {error}".split())[:300]}


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--ours", nargs="*", default=list(OURS))
    parser.add_argument(
        "--peers", nargs="*", default=list(gpu_peers.PRODUCTS), help="by the first word of a name, or whole"
    )
    parser.add_argument("--shapes", nargs="*", default=[f"{columns}x{rows}" for columns, rows in SHAPES])
    parser.add_argument("--tokens", nargs="*", type=int, default=list(TOKENS))
    options = parser.parse_args()
    figures: dict[str, dict[str, float | str]] = {}

    def note(found: dict[str, dict[str, float | str]]) -> None:
        figures.update(found)
        for name, values in found.items():
            print(f"{name:42s}", *(f"{key} {value}" for key, value in values.items()), flush=True)
        document = {
            "date": time.strftime("%Y-%m-%d"),
            "device": torch.cuda.get_device_name(0),
            "versions": {**gpu_peers.versions(), "cuda": torch.version.cuda},
            "method": "CUDA graph replay over rotating cold weights (>= 256 MB), median of 11; shapes are in_features x out_features",
            "figures": figures,
        }
        options.output.write_text(
            json.dumps(document, indent=1) + "\n"
        )  # each time: a run that is cut short has its figures

    for shape in options.shapes:
        columns, rows = map(int, shape.split("x"))
        for name in options.ours:
            note(measure_ours(name, columns, rows, options.tokens))
        for name in gpu_peers.PRODUCTS:
            if name in options.peers or name.split()[0] in options.peers:
                for tokens in options.tokens:
                    note({f"{name} M={tokens} {shape}": measure_peer(name, columns, rows, tokens)})
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
