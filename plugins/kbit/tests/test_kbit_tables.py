"""The search tables of the CUDA kernel find the exact count, though the slot of x is rounded: the device's steps in numpy."""

import numpy as np
import pytest
import torch

from lowbit_kbit.codebooks import fixed_codebook, midpoints
from lowbit_kbit.tables import SearchTables, search_tables

F32 = np.float32


def counts(tables: SearchTables, x, nudge):
    """Return the counts of float32 ``x`` as quantize.cu computes them; ``nudge`` adds a rounding error to the slot, in slots."""
    if not tables.compares:
        return np.searchsorted(tables.edges.numpy(), x)
    share = np.clip(x.astype(np.float64) * tables.step + tables.start, 0, 1)
    slot = np.clip(np.rint(share * (len(tables.below) - 1) + nudge), 0, len(tables.below) - 1).astype(int)
    found = tables.below.numpy()[slot].astype(int)
    for _ in range(tables.compares):
        found += tables.edges.numpy()[found] < x
    return found


def books():
    for bits in range(2, 9):
        for name in ("int", "nf", "fp"):
            yield f"{name}{bits}", fixed_codebook(name, bits)
    generator = torch.Generator().manual_seed(0)
    yield "random", torch.rand(256, generator=generator).mul(2).sub(1).sort().values
    yield "clustered", torch.randn(256, generator=generator).pow(3).sort().values / 40
    yield "equal", torch.full((8,), 0.5)
    yield "doubled", torch.tensor([-1.0, -0.5, -0.5, -0.5, -0.5, -0.5, 1.0, 1.0])
    yield "tiny", torch.tensor([0.0, 1e-42, 2e-42, 1.0])
    yield "all tiny", torch.tensor([0.0, 1e-42, 2e-42, 3e-42])


@pytest.mark.parametrize("codebook", [pytest.param(book, id=name) for name, book in books()])
@pytest.mark.parametrize("nudge", [-0.01, 0.0, 0.01])
def test_counts_are_exact(codebook, nudge):
    tables, edges = search_tables(midpoints(codebook)), midpoints(codebook).numpy()
    extra = np.array([0.0, -0.0, 1e-45, 1.5, -1.5, 65504.0, -65504.0, 3e38, -3e38, np.inf, -np.inf], F32)
    around = (np.nextafter(edges, F32(limit)) for limit in (np.inf, -np.inf))
    uniform = np.random.default_rng(0).uniform(-1.2, 1.2, 20000).astype(F32)
    x = np.concatenate((edges, *around, codebook.numpy(), extra, uniform))
    with np.errstate(invalid="ignore"):
        found = counts(tables, x, nudge)
    assert np.array_equal(found, np.searchsorted(edges, x))


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_usual_codebooks_need_one_comparison(bits):
    for name in ("int", "nf", "fp"):
        assert search_tables(midpoints(fixed_codebook(name, bits))).compares == 1
