"""Bit for bit: scales, zeros, minimums and codes equal those of the formulas, written again with numpy float32 scalars, one weight
at a time; and a symmetric weight is a GGUF weight, byte for byte."""

import struct

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit import dequantize
from lowbit.testing import weights
from lowbit_autoround.options import AutoRoundOptions
from lowbit_autoround.quantizer import AutoRoundQuantizer

F32 = np.float32
QUANTIZER = AutoRoundQuantizer()


def round_to(value, dtype):
    """Round a float32 to a scale's dtype and back, with the standard library only."""
    if dtype == "float16":
        return F32(struct.unpack("<e", struct.pack("<e", float(value)))[0])
    if dtype == "bfloat16":
        bits = struct.unpack("<I", struct.pack("<f", float(value)))[0]
        bits += 0x7FFF + (bits >> 16 & 1)  # to nearest, ties to even
        return F32(struct.unpack("<f", struct.pack("<I", bits & 0xFFFF0000))[0])
    return F32(value)


def stored_scale(value, dtype):
    rounded = round_to(value, dtype)
    if rounded == 0 and value != 0 and dtype == "float16":
        return F32(2.0**-24) if value > 0 else F32(-(2.0**-24))
    return F32(0) if rounded == 0 else rounded


def half_even(value):
    return int(np.rint(value))


def divide(value, scale):
    return value / (scale or F32(1))


def symmetric(group, bits, dtype):
    half = 2 ** (bits - 1)
    low, high = min(group), max(group)
    extreme = high if high >= -low else low
    scale = stored_scale(extreme / F32(-half), dtype)
    codes = [min(max(half_even(divide(w, scale)), -half), half - 1) + half for w in group]
    return codes, scale, None


def integer(group, bits, dtype):
    last = 2**bits - 1
    low, high = min(F32(0), *group), max(F32(0), *group)
    scale = stored_scale((high - low) / F32(last), dtype)
    zero = min(max(half_even(divide(-low, scale)), 0), last)
    codes = [min(max(half_even(divide(w, scale)) + zero, 0), last) for w in group]
    return codes, scale, zero


def minimum(group, bits, dtype):
    last = 2**bits - 1
    low = min(group)
    scale = stored_scale((max(group) - low) / F32(last), dtype)
    low = round_to(low, dtype)
    codes = [min(max(half_even(divide(w - low, scale)), 0), last) for w in group]
    return codes, scale, low + F32(0)


FORMULAS = {"symmetric": symmetric, "integer": integer, "minimum": minimum}


def assert_agrees(weight, kind, bits, group_size, dtype):
    zero = "integer" if kind == "symmetric" else kind
    options = AutoRoundOptions(bits, group_size, kind == "symmetric", zero, dtype)
    result = QUANTIZER.quantize(weight, options)
    codes, scales, offsets = [], [], []
    with np.errstate(all="ignore"):
        for row in weight.float().numpy():
            for start in range(0, len(row), group_size or len(row)):
                group = list(row[start : start + (group_size or len(row))])
                group_codes, scale, offset = FORMULAS[kind](group, bits, dtype)
                codes, scales, offsets = codes + group_codes, [*scales, scale], [*offsets, offset]
    assert result.parts["codes"].flatten().tolist() == codes
    assert_same_floats(result.parts["scales"], scales)
    if kind == "integer":
        assert result.parts["zeros"].flatten().tolist() == offsets
    if kind == "minimum":
        assert_same_floats(result.parts["minimums"], offsets)


def assert_same_floats(found, expected):
    assert np.array_equal(found.float().flatten().numpy().view(np.uint32), np.array(expected, F32).view(np.uint32))


kinds = pytest.mark.parametrize("kind", FORMULAS)


@settings(deadline=None, max_examples=80, derandomize=True)
@given(
    kind=st.sampled_from(list(FORMULAS)),
    bits=st.integers(2, 8),
    group_size=st.sampled_from((1, 7, 16, 32, 48, None)),
    scale_dtype=st.sampled_from(("float16", "bfloat16", "float32")),
    rows=st.integers(1, 3),
    columns=st.integers(1, 70),
    dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
    gain=st.sampled_from((1e-7, 1e-5, 0.02, 1.0, 300.0)),
    shift=st.sampled_from((0.0, 1.0, -3.0)),
    seed=st.integers(0, 999),
)
def test_every_part_is_that_of_the_formulas(
    kind, bits, group_size, scale_dtype, rows, columns, dtype, gain, shift, seed
):
    weight = (torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) + shift) * gain
    assert_agrees(weight.to(dtype), kind, bits, group_size, scale_dtype)


@kinds
@pytest.mark.parametrize("awkward", [*weights.AWKWARD, "ties"])
def test_awkward_weights_too(kind, awkward):
    if awkward == "ties":
        weight = torch.tensor([[-8.0, 8.0, 0.5, 1.5, -0.5, 2.5, -3.5, 0.0]] * 2)
    else:
        weight = weights.AWKWARD[awkward]((2, 48), 16, 0)
    assert_agrees(weight, kind, 4, 16, "float16")


@kinds
def test_one_bit(kind):
    if kind != "symmetric":
        assert_agrees(torch.randn(3, 40, generator=torch.Generator().manual_seed(0)), kind, 1, 16, "float16")


@pytest.mark.parametrize(("bits", "kind"), [(4, gguf.GGMLQuantizationType.Q4_0), (8, gguf.GGMLQuantizationType.Q8_0)])
def test_a_symmetric_weight_is_a_gguf_weight(bits, kind):
    """The blocks of Q4_0 and Q8_0, built by hand from codes and scales, mean the same floats to the gguf package."""
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    result = QUANTIZER.quantize(weight, AutoRoundOptions(bits, 32))
    codes = result.parts["codes"].view(-1, 32)
    scales = result.parts["scales"].view(-1, 1).view(torch.uint8)
    if bits == 4:  # byte j: weight j in the low nibble, weight j + 16 in the high one, both offset by 8
        payload = codes[:, :16] | codes[:, 16:] << 4
    else:
        payload = codes ^ 0x80  # int8 two's complement
    blocks = torch.cat((scales, payload), 1).numpy()
    decoded = gguf.quants.dequantize(blocks, kind).reshape(weight.shape)
    assert np.array_equal(decoded, dequantize(result).numpy())


def test_scales_are_those_that_ggml_chooses_for_q4_0():
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    blocks = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType.Q4_0).reshape(-1, 18)
    ours = QUANTIZER.quantize(weight, AutoRoundOptions(4, 32)).parts["scales"].flatten()
    assert np.array_equal(blocks[:, :2].copy().view(np.float16).flatten(), ours.numpy())
