"""On a GPU: the kernels of a tuning step do what torch does, weight for weight; a block is tuned as on a CPU. ``make test-gpu``."""

import dataclasses

import pytest
import torch

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

from tiny_block import TinyBlock, output_error

from lowbit import dequantize
from lowbit_autoround import fused
from lowbit_autoround.kquants import K_SCHEMES
from lowbit_autoround.options import AutoRoundOptions
from lowbit_autoround.quantizer import AutoRoundQuantizer
from lowbit_autoround.starts import tuned_weight

QUANTIZER = AutoRoundQuantizer()
PLAIN = AutoRoundOptions(4, 128, iters=10)
KINDS = {
    "symmetric": PLAIN,
    "two-bit": dataclasses.replace(PLAIN, bits=2, group_size=64),
    "integer": dataclasses.replace(PLAIN, symmetric=False, group_size=32),
    "minimum": dataclasses.replace(PLAIN, symmetric=False, zero="minimum", group_size=16),
    "odd": dataclasses.replace(PLAIN, group_size=24, scale="search", symmetric=False),
    "uneven": dataclasses.replace(PLAIN, group_size=96),  # 24 fours for 32 threads
    "row": dataclasses.replace(PLAIN, group_size=None),
    **{f"q{bits}_k": PLAIN.for_scheme(K_SCHEMES[bits]) for bits in K_SCHEMES},
}


@pytest.mark.parametrize("dtype", fused.TYPES, ids=str)
@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_kernels_do_what_torch_does(options, dtype):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(96, 768, generator=generator).cuda()
    weight[3] = 0
    start = [tuned_weight(weight, QUANTIZER.scheme(options), None, options.tuning.search, 1 / 8) for _ in range(2)]
    assert start[0]._fused is fused
    start[1]._fused = None
    found = [torch.empty_like(weight, dtype=dtype) for _ in start]
    for step in range(6):
        gradient = torch.randn(96, 768, generator=generator).to("cuda", dtype)
        for one, out in zip(start, found, strict=True):
            one.decode(out)
            one.learn([gradient.clone()], 1 - step / 6, tune_scales=True)
        assert torch.equal(*found)
        assert torch.equal(start[0]._values, start[1]._values)
        torch.testing.assert_close(start[0].ranges.above, start[1].ranges.above)
        torch.testing.assert_close(start[0].ranges.below, start[1].ranges.below)
    start[0].decode(found[0])
    parts = start[0].parts()
    assert torch.equal(dequantize(start[0].quantized(parts)).to(dtype), found[0])


def test_groups_that_do_not_divide_the_row_are_left_to_torch():
    weight = torch.randn(8, 100, device="cuda")
    for size, served in ((128, fused), (100, fused), (20, fused), (64, None), (16, None), (10, None)):
        scheme = QUANTIZER.scheme(dataclasses.replace(PLAIN, group_size=size))
        assert tuned_weight(weight, scheme, None, False, 0.1)._fused is served, size


def test_a_block_is_tuned_on_the_gpu():
    options = AutoRoundOptions(3, 16, iters=25, batch_size=8)
    block = TinyBlock()
    rounded = {name: QUANTIZER.quantize(weight, options) for name, weight in block.weights().items()}
    before = output_error(block, rounded, dequantize)
    placed = TinyBlock()
    placed.module.cuda()
    placed.hidden, placed.outputs = placed.hidden.cuda(), placed.outputs.cuda()
    weights = placed.weights()
    results = QUANTIZER.quantize_block(weights, dict.fromkeys(weights, options), {}, placed)
    found = {name: dequantize(result).cpu() for name, result in results.items()}
    assert output_error(block, found, lambda weight: weight) < 0.9 * before
