"""Steps that count some tokens skip the others where tokens do not meet, and nowhere else; gradients are the same."""

import pytest
import torch
from torch import nn

from lowbit_autoround.token_wise import TokenWise

WIDTH, TOKENS = 16, 24


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, hidden):
        heads = [linear(hidden).unflatten(-1, (2, -1)).transpose(1, 2) for linear in (self.query, self.key, self.value)]
        mixed = nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(-2))


class Shift(nn.Module):
    """Adds a tenth of the token before; ``quietly``, so that no gradient shows it."""

    def __init__(self, quietly):
        super().__init__()
        self.linear, self.quietly = nn.Linear(WIDTH, WIDTH), quietly

    def forward(self, hidden):
        before = hidden.roll(1, 1)
        return self.linear(hidden + (before.detach() if self.quietly else before))


class Layer(nn.Module):
    def __init__(self, mlp):
        super().__init__()
        self.norm, self.attention, self.mlp = nn.LayerNorm(WIDTH), Attention(), mlp

    def forward(self, hidden):
        hidden = hidden + self.attention(self.norm(hidden))
        return hidden + self.mlp(self.norm(hidden))


def gated():
    return nn.Sequential(nn.Linear(WIDTH, 40), nn.GELU(), nn.Linear(40, WIDTH))


def layer(mlp, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Layer(mlp()).eval(), torch.randn(3, TOKENS, WIDTH)


def chosen(module, hidden):
    """Return the paths of the modules that skip."""
    wise = TokenWise(module, [part for part in module.modules() if isinstance(part, nn.Linear)])
    with wise.skipping(module, hidden[:1]):
        return {path for path, part in module.named_modules() if "forward" in vars(part)}


def test_what_treats_tokens_one_by_one_is_found():
    module, hidden = layer(gated)
    assert chosen(module, hidden) == {"attention.query", "attention.out", "mlp"}
    assert not any("forward" in vars(part) for part in module.modules())


def test_what_mixes_tokens_and_what_comes_before_it_runs_on_all_of_them():
    module, hidden = layer(lambda: Shift(False))
    assert chosen(module, hidden) == {"mlp.linear"}


def test_mixing_that_no_gradient_shows_is_noticed():
    module, hidden = layer(lambda: Shift(True))
    assert chosen(module, hidden) == set()


def test_gradients_are_those_of_the_whole_block():
    module, hidden = layer(gated)
    tokens = torch.randperm(3 * TOKENS, generator=torch.Generator().manual_seed(4))[:20].sort().values
    wise = TokenWise(module, [part for part in module.modules() if isinstance(part, nn.Linear)])

    def gradients():
        loss = module(hidden).flatten(0, 1)[tokens].square().sum()
        return [loss, *torch.autograd.grad(loss, list(module.parameters()))]

    whole, seen = gradients(), []
    with wise.skipping(module, hidden[:1]), wise.only(tokens):
        handle = module.mlp[0].register_forward_pre_hook(lambda part, args: seen.append(args[0].shape))
        found = gradients()
        handle.remove()
    assert seen == [(1, 20, WIDTH)]
    for one, other in zip(found, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [None, torch.arange(5)])
def test_outside_of_a_step_everything_runs(tokens):
    module, hidden = layer(gated)
    wise = TokenWise(module, list(module.mlp))
    expected = module(hidden)
    with wise.skipping(module, hidden[:1]):
        with wise.only(tokens):
            found = module(hidden)
        assert torch.equal(module(hidden), expected)
    if tokens is None:
        assert torch.equal(found, expected)
    else:
        assert not torch.equal(found, expected)
        torch.testing.assert_close(found[0, :5], expected[0, :5])
