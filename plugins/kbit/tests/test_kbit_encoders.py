"""Every encoder counts the midpoints strictly below x, exactly, also one float beside a midpoint."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit_kbit.codebooks import fixed_codebook, midpoints
from lowbit_kbit.encoders import Buffers, SearchEncoder, SlotEncoder, UniformEncoder, make_encoder


def hard_points(codebook):
    """Return midpoints, their float neighbours, entries, signed zeros, subnormals and values far out."""
    edges = midpoints(codebook)
    up, down = (torch.nextafter(edges, torch.tensor(limit)) for limit in (torch.inf, -torch.inf))
    extra = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-39, 1.5, -1.5, 65504.0, -65504.0, 3e38, -3e38])
    random = torch.rand(500, generator=torch.Generator().manual_seed(0)) * 2.4 - 1.2
    return torch.cat((edges, up, down, codebook, extra, random))


def assert_counts_midpoints(encoder, x):
    expected = (midpoints(encoder.codebook) < x[:, None]).sum(1)
    assert torch.equal(encoder.codes(x.clone()).long(), expected)
    entries = encoder.nearest(x.clone(), Buffers(x.shape, x.device))
    assert torch.equal(entries, encoder.codebook[expected])


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("name", "kind"), [("int", UniformEncoder), ("nf", SlotEncoder), ("fp", SlotEncoder)])
def test_fixed_codebooks(name, kind, bits):
    codebook = fixed_codebook(name, bits)
    encoder = make_encoder(codebook)
    assert type(encoder) is kind
    assert_counts_midpoints(encoder, hard_points(codebook))
    assert_counts_midpoints(SearchEncoder(codebook), hard_points(codebook))


@settings(deadline=None, max_examples=200, derandomize=True)
@given(
    st.integers(2, 6).flatmap(
        lambda bits: st.lists(st.floats(-1, 1, width=32), min_size=2**bits, max_size=2**bits).map(sorted)
    )
)
def test_any_ascending_codebook(entries):
    codebook = torch.tensor(entries)
    assert_counts_midpoints(make_encoder(codebook), hard_points(codebook))


def test_entries_that_no_table_parts_are_searched():
    assert isinstance(make_encoder(torch.tensor([0.5, 0.5, 0.5, 0.5])), SearchEncoder)
    assert isinstance(make_encoder(torch.tensor([-1.0, -1e-6, 1e-6, 1.0])), SlotEncoder)
    assert isinstance(make_encoder(torch.tensor([-1.0, -1.0 + 1e-6, -1.0 + 2e-6, 1.0])), SearchEncoder)


def test_shapes_are_kept():
    x = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0))
    for name in ("int", "nf"):
        assert make_encoder(fixed_codebook(name, 3)).codes(x).shape == x.shape
