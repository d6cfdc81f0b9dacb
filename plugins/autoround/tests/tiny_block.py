"""A decoder block small enough for tests: two branches of linears with a nonlinearity, its inputs and float outputs in memory."""

import torch
from torch import nn

from lowbit.calibration.block import Block

WIDTH, INNER, SAMPLES, TOKENS = 32, 48, 24, 32
NAMES = ("up", "gate", "down")


class TinyModule(nn.Module):
    def __init__(self, bias=False):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.gate = nn.Linear(WIDTH, INNER, bias=bias), nn.Linear(WIDTH, INNER, bias=bias)
        self.down = nn.Linear(INNER, WIDTH, bias=bias)

    def forward(self, hidden):
        normed = self.norm(hidden)
        return hidden + self.down(torch.tanh(self.gate(normed)) * self.up(normed))


def hidden_states(samples, generator):
    """Return correlated inputs, as those of language models are: a few directions hold most of their energy."""
    directions = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(77))
    mixed = torch.randn(samples, TOKENS, 6, generator=generator) @ directions
    return mixed + 0.3 * torch.randn(samples, TOKENS, WIDTH, generator=generator)


class TinyBlock(Block):
    def __init__(self, seed=0, bias=False, dtype=torch.float32):
        generator = torch.Generator().manual_seed(seed)
        self.name, self.samples, self.lines = "model.layers.3", SAMPLES, []
        self.module = TinyModule(bias).eval()
        with torch.no_grad():
            for parameter in self.module.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
            self.module.norm.weight.fill_(1.0)
        self.module.to(dtype)
        self.linears = {f"{self.name}.{name}.weight": name for name in NAMES}
        self.hidden = hidden_states(SAMPLES, generator).to(dtype)
        self.counts = torch.ones(SAMPLES, TOKENS, dtype=torch.bool)
        with torch.no_grad():
            self.outputs = self.module(self.hidden)

    def inputs(self, index):
        return self.hidden[list(index)]

    def targets(self, index):
        return self.outputs[list(index)]

    def mask(self, index):
        return self.counts[list(index)]

    def forward(self, hidden):
        return self.module(hidden)

    def log(self, text):
        self.lines.append(text)

    def weights(self):
        return {name: self.module.get_submodule(path).weight.detach().clone() for name, path in self.linears.items()}


def output_error(block, results, dequantize):
    """Return the mean squared output error with ``results`` in place of the weights."""
    originals = {name: block.module.get_submodule(path).weight for name, path in block.linears.items()}
    with torch.no_grad():
        for name, path in block.linears.items():
            block.module.get_submodule(path).weight = nn.Parameter(dequantize(results[name]))
        error = (block.module(block.hidden) - block.outputs).square()[block.counts].mean()
    for name, path in block.linears.items():
        block.module.get_submodule(path).weight = originals[name]
    return float(error)
