"""``lowbit.trellis`` against bit strings and Python's own integers; state functions against numpy's float16."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowbit import Grid, Scheme, Trellis
from lowbit.testing import samples, strategies
from lowbit.testing.weights import generator
from lowbit.trellis import decode_states, decode_tiles, unpack_states, weight_order

MASK = 0xFFFFFFFF


def slow_states(words, trellis):
    """Return the states of one tile: cut a string of '0' and '1' that repeats for ever."""
    stream = "".join(format(word & 0xFFFF, "016b") for word in words)[: trellis.tile_bits]
    circle, states, end = stream * (2 + trellis.state_bits // len(stream)), [], 0
    for step in range(trellis.steps):
        end += trellis.step_bits[step % len(trellis.step_bits)]
        start = (end - trellis.state_bits) % len(stream)
        states.append(int(circle[start : start + trellis.state_bits], 2))
    return states


def half(bits):
    return np.array([bits], dtype=np.uint16).view(np.float16)[0]


def byte_sum(x):
    return sum(x.to_bytes(4, "little"))


def slow_value(state, code):
    """Return the value of a state for the codes that are computed (QTIP, arXiv 2406.11235, section 3; exllamav3)."""
    if code == "1mad":
        return np.float32(byte_sum((state * 34038481 + 76625530) & MASK) - 510) / np.float32(147.800537109375)
    if code == "2mad":
        x = (state * 264435761 + 1013904223) & MASK
        x = ((x * 1664525 >> 32) + x) & MASK
        return np.float32(byte_sum(x) - 510) / np.float32(147.800537109375)
    if code == "mul1":  # half(0x6400 + n) is 1024 + n; a fused multiply-add rounds once, and float64 holds it exactly
        total = half(0x6400 + byte_sum(state * 0x83DCD12D & MASK))
        return np.float32(np.float16(np.float64(total) * np.float64(half(0x1EEE)) + np.float64(half(0xC931))))
    x = (state * 89226354 + 64248484) & MASK if code == "3inst" else state * 0xCBAC1FED & MASK
    x = (x & 0x8FFF8FFF) ^ 0x3B603B60
    return np.float32(half(x >> 16) + half(x & 0xFFFF))


def words_of(trellis, tiles, seed):
    shape = (tiles[0] * trellis.tile[0], tiles[1] * trellis.tile[1])
    return samples.quantized(Scheme(Grid.TRELLIS, 0, trellis=trellis), shape, seed).parts["codes"]


@given(strategies.trellises(), st.integers(0, 99))
def test_states_are_windows_of_a_circular_bit_string(trellis, seed):
    codes = words_of(trellis, (2, 1), seed)
    found = unpack_states(codes, trellis)
    assert found.shape == (2, 1, trellis.steps)
    for tile in range(2):
        assert found[tile, 0].tolist() == slow_states(codes[tile, 0].tolist(), trellis)


@pytest.mark.parametrize("state_bits", [1, 15, 17, 24])
def test_windows_of_any_length(state_bits):
    trellis = Trellis("mul1", (1,), state_bits)
    codes = words_of(trellis, (1, 1), 3)
    assert unpack_states(codes, trellis)[0, 0].tolist() == slow_states(codes[0, 0].tolist(), trellis)


def test_a_window_longer_than_its_stream_goes_round_more_than_once():
    trellis = Trellis("mul1", (1,), 20, tile=(2, 4))
    codes = words_of(trellis, (1, 1), 3)
    assert unpack_states(codes, trellis)[0, 0].tolist() == slow_states(codes[0, 0].tolist(), trellis)


@pytest.mark.parametrize("code", ["1mad", "2mad", "3inst", "mcg", "mul1"])
def test_computed_codes_agree_on_all_65536_states(code):
    found = decode_states(torch.arange(1 << 16), Trellis(code, (2,)))
    expected = np.array([slow_value(state, code) for state in range(1 << 16)], dtype=np.float32)
    np.testing.assert_array_equal(found.numpy(), expected)


@pytest.mark.parametrize(
    ("code", "rms"),
    [("1mad", 1.0), ("2mad", 1.0), ("mul1", 1.0003), ("3inst", 1.24371088)],
)
def test_computed_codes_look_gaussian(code, rms):
    """Means near 0 and the root mean squares that QTIP and exllamav3 state (3INST) or that follow (the byte sums)."""
    values = decode_states(torch.arange(1 << 16), Trellis(code, (2,))).double()
    assert abs(float(values.mean())) < 0.01
    assert math.sqrt(float(values.square().mean())) == pytest.approx(rms, rel=0.01)


@given(st.integers(1, 15), st.integers(0, 99))
def test_hyb_hashes_a_state_to_a_pair_and_a_sign(table_bits, seed):
    trellis = Trellis("hyb", (4,), step_weights=2, table_bits=table_bits)
    codebook = torch.randn(2**table_bits, 2, generator=generator(seed))
    states = torch.randint(1 << 16, (200,), generator=generator(seed))
    found = decode_states(states, trellis, codebook).reshape(-1, 2)
    for state, pair in zip(states.tolist(), found, strict=True):
        hashed = (state + 1) * state & MASK
        first, second = codebook[(hashed >> (15 - table_bits)) % 2**table_bits].tolist()
        assert pair.tolist() == [-first if hashed & 0x8000 else first, second]


def test_lut_reads_its_table():
    trellis = Trellis("lut", (2,), 8, 2, 8)
    codebook = torch.randn(256, 2, generator=generator(0))
    states = torch.tensor([3, 255, 0])
    assert decode_states(states, trellis, codebook).tolist() == codebook[states].flatten().tolist()


@given(strategies.trellises(), st.integers(0, 99))
def test_tiles_hold_every_decoded_weight_where_the_order_says(trellis, seed):
    codes = words_of(trellis, (2, 3), seed)
    codebook = torch.randn(2**trellis.table_bits, trellis.step_weights, generator=generator(seed))
    tiles = decode_tiles(codes, trellis, codebook if trellis.table_bits else None)
    assert tiles.shape == (2, 3, *trellis.tile)
    values = decode_states(unpack_states(codes, trellis), trellis, codebook)
    for step, place in enumerate(weight_order(trellis).tolist()):
        found = tiles[..., place // trellis.tile[1], place % trellis.tile[1]]
        assert torch.equal(found, values[..., step])


def test_the_order_of_exl3():
    """The walk of exllamav3 over a 16x16 tile, whose r counts in_features and c out_features."""
    expected = []
    for t in range(32):
        r0, c0 = (t % 4) * 2, t // 4
        rows, columns = (r0, r0 + 1, r0 + 8, r0 + 9), (c0, c0 + 8)
        expected += [16 * c + r for c in columns for r in rows]
    assert weight_order(Trellis("mul1", (2,), order="mma_b")).tolist() == expected
    assert sorted(expected) == list(range(256))


def test_many_tiles_decode_like_few():
    trellis = Trellis("3inst", (2, 3))
    codes = words_of(trellis, (70, 65), 1)  # more than a million weights: several pieces
    assert torch.equal(decode_tiles(codes, trellis)[40:41, 7:8], decode_tiles(codes[40:41, 7:8], trellis))
