"""Dequantizing: the plain-torch reference on a CPU, and on a GPU every decoder and every k, against a copy of as many bytes.

PYTHONPATH=core:cuda:formats python3 bench/test_dequantize.py OUTPUT.json

measures 14336 x 4096 weights to fp16 by CUDA graph replays over rotating cold weights, and bitsandbytes beside them when it is there.
"""

import json
import sys
import time
from pathlib import Path

import pytest
import torch

from lowbit import Grid, QuantizedTensor, Scheme, Zero, dequantize
from lowbit.grids import empty_parts

SHAPE = (2048, 4096)
SCHEMES = {
    "affine4-g128": Scheme(Grid.AFFINE, 4, 128),
    "affine4-g128-asym": Scheme(Grid.AFFINE, 4, 128, Zero.INTEGER),
    "codebook4-g64": Scheme(Grid.CODEBOOK, 4, 64),
    "codebook3-g64": Scheme(Grid.CODEBOOK, 3, 64),
}


@pytest.mark.benchmark(group="dequantize")
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())
def test_dequantize(benchmark, scheme):
    generator = torch.Generator().manual_seed(0)
    parts = empty_parts(scheme, SHAPE)
    parts["codes"].random_(0, scheme.code_count, generator=generator)
    parts["scales"].uniform_(0.01, 0.02, generator=generator)
    if "codebook" in parts:
        parts["codebook"].copy_(torch.linspace(-1, 1, scheme.code_count)[:, None])
    weight = benchmark(dequantize, QuantizedTensor(scheme, SHAPE, parts))
    assert weight.shape == SHAPE
    assert 0 < weight.abs().max() < 0.02 * 16


GPU_SHAPE = (4096, 14336)


def decoders():
    """The decoders of units: name to what ``gpu_products.Weight`` takes."""
    from lowbit_cuda.decoder import AFFINE, CODEBOOK

    return {
        **{f"affine {bits}-bit g128": (AFFINE[bits], 128, "CONSTANT") for bits in AFFINE},
        **{f"codebook {bits}-bit g64": (CODEBOOK[bits], 64, "CONSTANT") for bits in CODEBOOK},
        "affine 4-bit g32 float32 minimums": (AFFINE[4], 32, "MINIMUMS"),
    }


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_dequantize_on_a_gpu(benchmark):
    from gpu_products import Weight

    for arguments in decoders().values():
        figures = Weight(*arguments, 1024, 512).dequantize()
        assert figures["us"] > 0
    benchmark.extra_info |= benchmark.pedantic(Weight(*arguments, *GPU_SHAPE).dequantize, rounds=1)


def main() -> None:
    """Measure everything, print it, and write it to the given file."""
    import gpu_peers
    from gpu_products import Weight, graph_time

    figures = {}
    for name, arguments in decoders().items():
        figures[name] = Weight(*arguments, *GPU_SHAPE).dequantize()
        print(name, figures[name], flush=True)
    try:
        figures["bitsandbytes nf4 g64"] = {"us": graph_time(gpu_peers.bitsandbytes_dequantize(*GPU_SHAPE))}
    except gpu_peers.FAILURES as error:
        figures["bitsandbytes nf4 g64"] = {"why not": f"{type(error).__name__}: {error}"[:300]}
    print("bitsandbytes nf4 g64", figures["bitsandbytes nf4 g64"])
    document = {
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name(0),
        "versions": gpu_peers.versions(),
        "shape": GPU_SHAPE,
        "figures": figures,
    }
    Path(sys.argv[1]).write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
