"""Quantizing a 4096x4096 bf16 weight (searches: 1024 rows of it), on as many threads as torch uses; then its error is checked.

``lowbit.workers`` splits the rows over threads, so run it where nothing else runs. ``extra_info`` has the number of
weights, for rates.
"""

import pytest
import torch

from lowbit.metrics import measure
from lowbit.options import build_options
from lowbit.plugins import installed
from lowbit.testing import budgets

SHAPE = (4096, 4096)
PLAIN = {
    "kbit-int4-g64": ("kbit", {"codebook": "int", "scale": "absmax"}),
    "kbit-int8-g64": ("kbit", {"bits": "8", "codebook": "int", "scale": "absmax"}),
    "kbit-nf2-g64": ("kbit", {"bits": "2", "codebook": "nf", "scale": "absmax"}),
    "kbit-nf4-g64": ("kbit", {"codebook": "nf", "scale": "absmax"}),
    "kbit-fp6-g64": ("kbit", {"bits": "6", "codebook": "fp", "scale": "absmax"}),
    "kbit-learned4-g64": ("kbit", {}),
    "autoround-sym4-g128": ("autoround", {}),
    "autoround-sym8-g32": ("autoround", {"bits": "8", "group_size": "32"}),
    "autoround-asym4-g128": ("autoround", {"symmetric": "false"}),
    "autoround-min4-g32": ("autoround", {"symmetric": "false", "zero": "minimum", "group_size": "32"}),
}
SEARCHED = {
    "kbit-int4-g64": ("kbit", {"codebook": "int", "scale": "search"}),
    "kbit-nf4-g64": ("kbit", {"codebook": "nf", "scale": "search"}),
    "kbit-learned4-g64": ("kbit", {"scale": "search"}),
    "autoround-sym4-g128": ("autoround", {"scale": "search"}),
    "autoround-asym4-g128": ("autoround", {"symmetric": "false", "scale": "search"}),
    "autoround-min4-g32": (
        "autoround",
        {"symmetric": "false", "zero": "minimum", "group_size": "32", "scale": "search"},
    ),
}


@pytest.fixture(scope="module")
def weight():
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).bfloat16()


@pytest.mark.benchmark(group="quantize")
@pytest.mark.parametrize("case", PLAIN)
def test_quantize(benchmark, weight, case):
    check(benchmark, weight, *PLAIN[case], rounds=9)


@pytest.mark.benchmark(group="quantize-search")
@pytest.mark.parametrize("case", SEARCHED)
def test_quantize_with_searched_scales(benchmark, weight, case):
    check(benchmark, weight[:1024], *SEARCHED[case], rounds=3)


def check(benchmark, weight, name, settings, rounds):
    """Time one quantizer, and hold its error to what rounding to nearest costs on Gaussian weights."""
    quantizer = installed().quantizers[name]
    options = build_options(quantizer.Options, settings, name)
    benchmark.extra_info["weights"] = weight.numel()
    quantized = benchmark.pedantic(quantizer.quantize, (weight, options), rounds=rounds, warmup_rounds=1)
    quantized.validate()
    assert quantized.scheme == quantizer.scheme(options)
    assert measure(weight, quantized).relative ** 2 <= budgets.nmse_budget(quantized.scheme, weight.shape[1])
