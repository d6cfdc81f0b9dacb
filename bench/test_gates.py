"""The regression gate: figures that do not depend on the machine, and ratios measured inside one run.

``bench/baselines/figures.json`` holds bits per weight and relative error of quantizers on seeded weights. A change that moves one
must say so: ``python bench/test_gates.py`` writes the current figures. Absolute times are never gated.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import pytest
import torch

from lowbit.bits import pack_bits
from lowbit.metrics import measure
from lowbit.options import build_options
from lowbit.plugins import installed

BASELINE = Path(__file__).parent / "baselines" / "figures.json"
SHAPE = (512, 2048)
CASES = {
    "kbit 2-bit g64 learned search": (
        "kbit",
        {"bits": "2", "group_size": "64", "codebook": "learned", "scale": "search"},
    ),
    "kbit 3-bit g64 learned search": (
        "kbit",
        {"bits": "3", "group_size": "64", "codebook": "learned", "scale": "search"},
    ),
    "kbit 4-bit g64 int absmax": ("kbit", {"bits": "4", "group_size": "64", "codebook": "int", "scale": "absmax"}),
    "kbit 4-bit g64 nf absmax": ("kbit", {"bits": "4", "group_size": "64", "codebook": "nf", "scale": "absmax"}),
    "kbit 4-bit g64 fp signed": ("kbit", {"bits": "4", "group_size": "64", "codebook": "fp", "scale": "signed"}),
    "autoround 4-bit g128": ("autoround", {"bits": "4", "group_size": "128"}),
    "autoround 4-bit g128 asymmetric": ("autoround", {"bits": "4", "group_size": "128", "symmetric": "false"}),
    "autoround 3-bit g128 search": ("autoround", {"bits": "3", "group_size": "128", "scale": "search"}),
    "autoround 8-bit g32": ("autoround", {"bits": "8", "group_size": "32"}),
}


def figures(case: str) -> dict[str, float]:
    """Quantize a seeded Gaussian weight; return stored bits per weight in the native format and the relative RMSE."""
    name, settings = CASES[case]
    registry = installed()
    quantizer = registry.quantizers[name]
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    quantized = quantizer.quantize(weight, build_options(quantizer.Options, settings, name))
    packer = registry.route(quantized.scheme, quantized.shape, "native").packer
    assert packer is not None
    bits = packer.pack(quantized).spec.bits_per_weight
    return {"bits_per_weight": round(bits, 4), "relative_rmse": round(measure(weight, quantized).relative, 5)}


@pytest.mark.parametrize("case", CASES)
def test_bits_and_errors_are_those_of_the_baseline(case):
    expected, found = json.loads(BASELINE.read_text())[case], figures(case)
    assert found["bits_per_weight"] == expected["bits_per_weight"]
    # Summation order differs between processors; a real change of an algorithm moves the error far more than this.
    assert found["relative_rmse"] == pytest.approx(expected["relative_rmse"], rel=1e-3)


def test_packing_keeps_up_with_a_copy():
    """Packing 4-bit codes takes at most 30 times a plain copy of the same codes, on one thread, in the same run."""
    codes = torch.randint(16, (1024, 4096), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        ratios = [_seconds(lambda: pack_bits(codes, 4)) / _seconds(codes.clone) for _ in range(9)]
    finally:
        torch.set_num_threads(threads)
    assert statistics.median(ratios) < 30


def _seconds(call):
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


if __name__ == "__main__":
    BASELINE.write_text(json.dumps({case: figures(case) for case in CASES}, indent=1) + "\n")
