"""Bit streams in int32 words: both axes, every width, every length, against arithmetic on Python integers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.errors import WeightError
from lowbit_formats.int_words import (
    constant_words,
    only_code,
    pack_across,
    pack_down,
    pack_words,
    turn_into,
    turned,
    unpack_across,
    unpack_down,
    unpack_words,
    word_count,
)

BITS = range(1, 9)


def codes(rows, columns, bits, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2**bits, (rows, columns), dtype=torch.uint8, generator=generator)


def stream_words(row, bits):
    """The words of one stream, from the definition: code i in bits [b*i, b*i + b) of one large integer."""
    number = sum(int(code) << bits * place for place, code in enumerate(row))
    unsigned = [number >> 32 * word & 0xFFFFFFFF for word in range(word_count(len(row), bits))]
    return [word - (1 << 32) if word >> 31 else word for word in unsigned]


@given(st.integers(1, 3), st.integers(1, 70), st.sampled_from(BITS), st.integers(0, 999))
@settings(deadline=None, max_examples=60)
def test_words_follow_the_definition_and_come_back(rows, columns, bits, seed):
    values = codes(rows, columns, bits, seed)
    words = pack_words(values, bits)
    assert words.tolist() == [stream_words(row, bits) for row in values]
    assert torch.equal(unpack_words(words, bits, columns), values)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (33, 70), (700, 4096)])
def test_both_axes_hold_the_same_streams(rows, columns, bits):
    values = codes(rows, columns, bits)
    across, down = pack_across(values, bits), pack_down(values, bits)
    assert torch.equal(across, pack_words(values, bits))
    assert torch.equal(down, across.T)
    assert down.is_contiguous()
    assert torch.equal(unpack_across(across, bits, columns), values)
    assert torch.equal(unpack_down(down, bits, columns), values)


@pytest.mark.parametrize("pack", [pack_across, pack_down])
def test_a_code_that_does_not_fit_is_refused(pack):
    values = codes(4, 64, 3)
    values[2, 5] = 8
    with pytest.raises(WeightError, match="a code is 8, which does not fit 3 bits"):
        pack(values, 3)


@pytest.mark.parametrize("bits", BITS)
def test_one_code_everywhere_is_recognised(bits):
    highest = 2**bits - 1
    words = constant_words(highest, bits, 37).repeat(5, 1)
    assert only_code(words, bits, 37) == highest
    other = torch.full((5, 37), highest, dtype=torch.uint8)
    other[4, 36] = 0
    assert only_code(pack_words(other, bits), bits, 37) is None
    assert only_code(words[:0], bits, 37) is None


@given(
    st.integers(0, 40),
    st.integers(1, 40),
    st.integers(0, 3),
    st.sampled_from([torch.int32, torch.float16, torch.bfloat16, torch.uint8]),
    st.booleans(),
)
@settings(deadline=None, max_examples=100)
def test_matrices_turn_into_slices_of_others(rows, columns, start, dtype, compiled):
    source = torch.randint(0, 99, (rows, columns + 7), generator=torch.Generator().manual_seed(rows)).to(dtype)
    piece = source[:, start : start + columns]
    target = torch.full((columns + 2, rows + 5), 77).to(dtype)
    expected = target.clone()
    expected[1 : 1 + columns, 3 : 3 + rows] = piece.T
    with pytest.MonkeyPatch.context() as patch:
        if not compiled:
            patch.setenv("LOWBIT_CC", "")
        turn_into(target[1 : 1 + columns, 3 : 3 + rows], piece)
        assert torch.equal(turned(piece.T), piece)
    assert torch.equal(target, expected)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("columns", [1, 8, 31, 32, 64, 96])
def test_words_of_one_code(bits, columns):
    code = 2**bits - 1
    assert torch.equal(
        constant_words(code, bits, columns), pack_words(torch.full((1, columns), code, dtype=torch.uint8), bits)
    )
    assert only_code(constant_words(code, bits, columns), bits, columns) == code
