"""``lowbit.bits`` against Python's big integers. Packing has no tolerance."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowbit.bits import pack_bits, packed_width, unpack_bits
from lowbit.testing.weights import generator


def big_integer(codes, bits):
    """Return the bytes of one row: code i in bits [bits * i, bits * i + bits) of one long little-endian integer."""
    total = sum(code << (bits * i) for i, code in enumerate(codes))
    return list(total.to_bytes(packed_width(len(codes), bits), "little"))


def random_codes(rows, columns, bits, seed=0):
    return torch.randint(2**bits, (rows, columns), dtype=torch.uint8, generator=generator(seed))


@given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 70), st.integers(0, 99))
def test_rows_are_long_integers(bits, rows, columns, seed):
    codes = random_codes(rows, columns, bits, seed)
    packed = pack_bits(codes, bits)
    assert (packed.dtype, packed.shape) == (torch.uint8, (rows, packed_width(columns, bits)))
    assert packed.tolist() == [big_integer(row, bits) for row in codes.tolist()]
    assert torch.equal(unpack_bits(packed, bits, columns), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_all_ones_fill_their_bits_and_no_more(bits):
    codes = torch.full((2, 9), 2**bits - 1, dtype=torch.uint8)
    assert pack_bits(codes, bits).tolist() == [big_integer(row, bits) for row in codes.tolist()]
    assert torch.equal(unpack_bits(pack_bits(codes, bits), bits, 9), codes)


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("shape", [(700, 1000), (3, 300_000)])
def test_chunks_do_not_show(bits, shape):
    codes = random_codes(*shape, bits)
    packed = pack_bits(codes, bits)
    assert torch.equal(unpack_bits(packed, bits, shape[1]), codes)
    for row in (0, shape[0] // 2, shape[0] - 1):
        assert torch.equal(packed[row : row + 1], pack_bits(codes[row : row + 1], bits))


@pytest.mark.parametrize("bits", [1, 3, 8])
@pytest.mark.parametrize("shape", [(0, 16), (4, 0)])
def test_empty(bits, shape):
    packed = pack_bits(torch.empty(shape, dtype=torch.uint8), bits)
    assert packed.shape == (shape[0], packed_width(shape[1], bits))
    assert unpack_bits(packed, bits, shape[1]).shape == shape


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_strides_and_inputs_are_respected(bits):
    codes = random_codes(40, 24, bits)
    kept, packed = codes.clone(), pack_bits(codes.T, bits)
    assert torch.equal(packed, pack_bits(codes.T.contiguous(), bits))
    assert torch.equal(codes, kept)
    wide = packed.repeat_interleave(2, dim=1)[:, ::2]
    assert torch.equal(unpack_bits(wide, bits, 40), codes.T)


def test_widths():
    assert [packed_width(columns, 3) for columns in (0, 1, 8, 9)] == [0, 3, 3, 6]


@pytest.mark.parametrize("bits", [0, 9])
def test_other_widths_are_refused(bits):
    with pytest.raises(ValueError, match=f"bits must be 1 to 8, got {bits}"):
        pack_bits(torch.zeros(1, 8, dtype=torch.uint8), bits)
    with pytest.raises(ValueError, match=f"bits must be 1 to 8, got {bits}"):
        unpack_bits(torch.zeros(1, 8, dtype=torch.uint8), bits, 8)
