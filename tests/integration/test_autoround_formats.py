"""Tuned codes are stored as they are: every format that holds the scheme gives the very weights back that were tuned."""

import pytest
import torch
from torch import nn

from lowbit import dequantize
from lowbit.calibration.block import Block
from lowbit.plugins import installed
from lowbit.registry import Route
from lowbit.testing.contracts.checks import assert_same_quantized
from lowbit_autoround.kquants import K_SCHEMES
from lowbit_autoround.options import AutoRoundOptions
from lowbit_autoround.quantizer import AutoRoundQuantizer
from lowbit_formats.gguf.layouts import BY_TYPE

QUANTIZER, REGISTRY = AutoRoundQuantizer(), installed()
WIDTH, NAME = 256, "model.layers.0.mlp.up_proj.weight"
SYMMETRIC, ASYMMETRIC = (
    AutoRoundOptions(4, 128, iters=8, lr=0.02),
    AutoRoundOptions(4, 128, symmetric=False, iters=8, lr=0.02),
)


class OneLinear(Block):
    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.name, self.samples, self.linears = "model.layers.0", 4, {NAME: "0"}
        self.module = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False)).eval()
        self.module[0].weight.data = torch.randn(WIDTH, WIDTH, generator=generator) / 16
        self.hidden = torch.randn(4, 32, 8, generator=generator) @ torch.randn(8, WIDTH, generator=generator)
        self.outputs = self.module(self.hidden).detach()

    def inputs(self, index):
        return self.hidden[list(index)]

    def targets(self, index):
        return self.outputs[list(index)]

    def mask(self, index):
        return torch.ones(len(index), 32, dtype=torch.bool)

    def forward(self, hidden):
        return self.module(hidden)


def tuned(options):
    block = OneLinear()
    weights = {NAME: block.module[0].weight.detach()}
    result = QUANTIZER.quantize_block(weights, {NAME: options}, {}, block)[NAME]
    assert not torch.equal(result.parts["codes"], QUANTIZER.quantize(weights[NAME], options).parts["codes"])
    return result


@pytest.mark.parametrize(
    ("format", "options"),
    [
        *((format, SYMMETRIC) for format in ("gptq", "awq", "compressed-tensors", "auto-round", "native")),
        *((format, ASYMMETRIC) for format in ("gptq", "awq", "compressed-tensors", "native")),
        *(("gguf", AutoRoundOptions(bits, 32, iters=8, lr=0.02)) for bits in (4, 8)),
        *(("gguf", AutoRoundOptions(iters=8, lr=0.02).for_scheme(scheme)) for scheme in K_SCHEMES.values()),
    ],
    ids=lambda value: value if isinstance(value, str) else QUANTIZER.scheme(value).summary().replace(" ", "-"),
)
def test_a_format_gives_the_tuned_weight_back(format, options):
    result = tuned(options)
    route = REGISTRY.ask(result.scheme, result.shape, format)
    assert isinstance(route, Route), route
    again = route.packer.unpack(route.packer.pack(result))
    assert_same_quantized(again, result, format)
    assert torch.equal(dequantize(again), dequantize(result))


@pytest.mark.parametrize("bits", K_SCHEMES)
def test_k_quants_are_those_of_the_format(bits):
    scheme = BY_TYPE[f"Q{bits}_K"].scheme
    assert K_SCHEMES[bits] == scheme
    fitted = QUANTIZER.fit(AutoRoundOptions(recipe="light"), scheme)
    assert QUANTIZER.scheme(fitted) == scheme
    assert fitted.recipe == "light"
