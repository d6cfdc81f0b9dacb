"""Quantizing to GGUF types: weights a second, and against llama.cpp's own quantizer and the gguf package in the same run.

``pytest bench/test_ggml.py`` times every type. ``python bench/test_ggml.py [--rows N] [TYPE...]`` prints the table of the documentation:
seconds of quantizing and packing against the same of ggml's C code limited to as many threads (and of the gguf package's numpy
for the types that it has), in alternation, and errors against ggml's.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from pathlib import Path

import gguf
import pytest
import torch

from lowbit.grids import dequantize
from lowbit.interfaces import Calibration
from lowbit.tensors import PackedTensor
from lowbit_formats.ggml import GgmlQuantizer
from lowbit_formats.ggml.options import TYPES, GgmlOptions
from lowbit_formats.gguf import PACKERS

ROWS, COLUMNS = 1024, 4096
THREADS = 2
PACKER_OF = {packer.type.name.lower(): packer for packer in PACKERS}
NUMPY_TYPES = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")


def make_weight(rows=ROWS):
    return torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(0)) * 0.02


def make_importance():
    return torch.exp(1.5 * torch.randn(COLUMNS, generator=torch.Generator().manual_seed(1)))


def ours(weight, name, importance=None):
    """Quantize and pack: blocks as in a file."""
    calibration = None if importance is None else Calibration(importance=importance)
    return PACKER_OF[name].pack(GgmlQuantizer().quantize(weight, GgmlOptions(name), calibration))


def load_ggml():
    """ggml's C functions, or None where llama-cpp-python is not installed."""
    if importlib.util.find_spec("llama_cpp") is None:
        return None
    location = Path(__file__).parents[1] / "tests" / "oracles" / "ggml_library.py"
    spec = importlib.util.spec_from_file_location("ggml_library", location)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Ggml()


def theirs(ggml, weight, name, importance=None):
    factors = None if importance is None else importance.numpy()
    return ggml.quantize(PACKER_OF[name].type.id, weight.numpy(), factors, threads=THREADS)


def by_numpy(weight, name):
    return gguf.quantize(weight.numpy(), gguf.GGMLQuantizationType[name.upper()])


def seconds(call):
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def speedup(mine, other, rounds):
    """Return the median over rounds of other's time by mine, one after the other so that both see the same machine."""
    mine(), other()
    return statistics.median([seconds(other) / seconds(mine) for _ in range(rounds)])


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("calibrated", [False, True], ids=["plain", "imatrix"])
@pytest.mark.parametrize("name", TYPES)
@pytest.mark.benchmark(group="ggml")
def test_quantize_and_pack(benchmark, name, calibrated):
    weight, importance = make_weight(), make_importance() if calibrated else None
    packed = benchmark(ours, weight, name, importance)
    benchmark.extra_info["weights"] = weight.numel()
    assert packed.shape == (ROWS, COLUMNS)


def test_q4_k_keeps_up_with_llama_cpp():
    """The figure is at least as fast as ggml on two threads; the gate leaves room for a busy machine."""
    ggml = load_ggml()
    if ggml is None:
        pytest.skip("llama-cpp-python is not installed")
    weight = make_weight()
    ratio = speedup(lambda: ours(weight, "q4_k"), lambda: theirs(ggml, weight, "q4_k"), rounds=5)
    assert ratio > 0.8


@pytest.mark.parametrize("name", ["q4_0", "q8_0"])
def test_simple_types_are_faster_than_numpy(name):
    """The figure is three times the gguf package's code; the gate leaves room for a busy machine."""
    weight = make_weight()
    assert speedup(lambda: ours(weight, name), lambda: by_numpy(weight, name), rounds=9) > 1.5


def print_table(names, rows):
    ggml, weight, importance = load_ggml(), make_weight(rows), make_importance()
    if ggml is None:
        raise SystemExit("Error: llama-cpp-python is not installed; pip install llama-cpp-python")
    print(f"{rows}x{COLUMNS} Gaussian weights, {THREADS} threads, quantized and packed; median of 5 alternating runs")
    print(f"{'type':8}{'imatrix':9}{'M weights/s':>12}{'by ggml':>9}{'by numpy':>10}{'error / ggml':>14}")
    for name in names:
        for factors in (None, importance):
            print_row(ggml, weight, name, factors)


def print_row(ggml, weight, name, factors):
    by_ggml = speedup(lambda: ours(weight, name, factors), lambda: theirs(ggml, weight, name, factors), 5)
    by_gguf = ""
    if factors is None and name in NUMPY_TYPES:
        by_gguf = f"{speedup(lambda: ours(weight, name), lambda: by_numpy(weight, name), 5):.2f}"
    rate = weight.numel() / min(seconds(lambda: ours(weight, name, factors)) for _ in range(5)) / 1e6
    packer = PACKER_OF[name]
    blocks = torch.from_numpy(theirs(ggml, weight, name, factors))
    spec = packer.spec(packer.scheme, tuple(weight.shape))
    errors = [
        float(
            (
                (dequantize(packer.unpack(packed)) - weight).double().square() * (1 if factors is None else factors)
            ).mean()
        )
        for packed in (ours(weight, name, factors), PackedTensor(spec, {"blocks": blocks}))
    ]
    given = "" if factors is None else "yes"
    print(f"{name:8}{given:9}{rate:12.0f}{by_ggml:9.2f}{by_gguf:>10}{errors[0] / errors[1]:14.4f}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(THREADS)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("types", nargs="*", default=list(TYPES))
    flags = parser.parse_args()
    print_table(flags.types, flags.rows)
