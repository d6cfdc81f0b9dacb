"""Dequantizing to float32 with the plain-torch reference: the slow version that every kernel is compared with."""

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
