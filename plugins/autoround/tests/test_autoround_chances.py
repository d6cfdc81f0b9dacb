"""Which tokens a step counts: each as often as its chance says, and so that the expected loss is that of all tokens."""

import pytest
import torch
from tiny_block import TOKENS, TinyBlock

from lowbit_autoround import activations
from lowbit_autoround.tuner import Batches, chances

SIZES = torch.rand(6, 50, generator=torch.Generator().manual_seed(0)) ** 4 * 100


@pytest.mark.parametrize("share", [0.1, 0.5, 0.7, 0.95])
def test_chances_add_up_to_the_share_and_rise_with_the_size(share):
    sizes = SIZES.clone()
    sizes[2, 10:] = 0  # padding
    found = chances(sizes, share)
    assert float(found.sum()) == pytest.approx(share * float((sizes > 0).sum()), rel=1e-4)
    assert ((found >= 0) & (found <= 1)).all()
    assert (found[sizes == 0] == 0).all()
    assert (found[sizes > 0] > 0).all()
    order = sizes.flatten().argsort()
    assert (found.flatten()[order].diff() >= 0).all()


def test_equal_sizes_have_equal_chances():
    assert torch.allclose(chances(torch.full((3, 7), 5.0), 0.4), torch.tensor(0.4))


def test_every_token_is_drawn_with_its_chance_and_counts_one_on_average():
    found, batches = chances(SIZES, 0.5), Batches(6, 6, seed=0)
    drawn = torch.stack([batches.draw(found) for _ in range(4000)])
    assert torch.allclose((drawn > 0).float().mean(0), found, atol=0.05)
    assert float((drawn.mean(0) - 1).abs().max()) < 0.25
    counts = (drawn > 0).sum((1, 2))
    assert int((counts - float(found.sum())).abs().max()) <= 1


def test_a_certain_token_is_always_drawn_and_counts_one():
    found = torch.tensor([[1.0, 0.3, 0.0, 1.0, 0.7]])
    drawn = torch.cat([Batches(1, 1, seed).draw(found) for seed in range(50)])
    assert (drawn[:, [0, 3]] == 1).all()
    assert (drawn[:, 2] == 0).all()


@pytest.mark.parametrize("samples", [8, 7, 3])
def test_sequences_are_dealt_so_that_pieces_expect_as_many_tokens(monkeypatch, samples):
    monkeypatch.setattr(activations, "PIECE_TOKENS", 4 * TOKENS)
    runner = activations.Runner(TinyBlock(), samples)
    given = torch.arange(24.0)[:, None].expand(24, TOKENS) / 24
    index = list(range(5, 5 + samples))
    dealt = runner.dealt(index, given)
    assert sorted(dealt) == index
    if samples == 8:
        assert given[dealt[:4]].sum() == pytest.approx(float(given[dealt[4:]].sum()))
