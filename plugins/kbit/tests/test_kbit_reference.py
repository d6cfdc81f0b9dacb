"""Bit for bit: codes and scales equal those of a slow reference that follows the text of ``lowbit_kbit.arithmetic``, written in
another way: numpy float32 scalars, one weight at a time."""

import math
import struct
from itertools import pairwise
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit import Calibration
from lowbit.testing import weights
from lowbit_kbit.codebooks import fixed_codebook
from lowbit_kbit.options import KbitOptions
from lowbit_kbit.quantizer import KbitQuantizer
from lowbit_kbit.search import HIGHEST, LOWEST, REFITS

F32 = np.float32
QUANTIZER = KbitQuantizer()


def round_to(value, dtype):
    """Round a float32 to a scale's dtype and back, with the standard library only."""
    if dtype == "float16":
        return F32(struct.unpack("<e", struct.pack("<e", float(value)))[0])
    if dtype == "bfloat16":
        bits = struct.unpack("<I", struct.pack("<f", float(value)))[0]
        bits += 0x7FFF + (bits >> 16 & 1)  # to nearest, ties to even
        return F32(struct.unpack("<f", struct.pack("<I", bits & 0xFFFF0000))[0])
    return F32(value)


def stored(extreme, dtype):
    value = round_to(extreme, dtype)
    return F32(0) if abs(value) < F32(2.0**-126) else value


def reciprocal(scale):
    return F32(0) if abs(scale) < F32(2.0**-126) else F32(1) / scale


def extreme_of(group, signed):
    best = F32(0)
    for w in group:
        if abs(w) > abs(best) or (abs(w) == abs(best) and w > best):
            best = w
    return best if signed else abs(best)


def code_of(x, codebook):
    below = 0
    for lower, upper in pairwise(codebook):
        below += int((lower + upper) * F32(0.5) < x)
    return below


def tree(values):
    """Sum in the order of a butterfly: the upper half onto the lower."""
    values = values + [F32(0)] * ((1 << (len(values) - 1).bit_length()) - len(values))
    while len(values) > 1:
        half = len(values) // 2
        values = [a + b for a, b in zip(values[:half], values[half:], strict=True)]
    return values[0]


def searched(group, extreme, codebook, factors, importance):
    unit = [w * reciprocal(extreme) for w in group]

    def fit(inverse):
        entries = [codebook[code_of(u * inverse, codebook)] for u in unit]
        weighted = [q * h for q, h in zip(entries, importance, strict=True)]
        along = tree([q * u for q, u in zip(weighted, unit, strict=True)])
        energy = tree([a * q for a, q in zip(weighted, entries, strict=True)])
        return (along / energy, along * along / energy) if energy else (F32("nan"), F32("nan"))

    best, best_score = F32(1), F32(0)
    for inverse in [F32(1 / factor) for factor in factors] + [None] * REFITS:
        scale, score = fit(reciprocal(best) if inverse is None else inverse)
        if score > best_score:
            best, best_score = scale, score
    return extreme * best


def reference(weight, options, codebook, importance=None):
    """Return codes and scales (as float32) of a float32 numpy weight."""
    columns = weight.shape[1]
    size = options.group_size or columns
    mirrored = all(a == -b for a, b in zip(codebook, codebook[::-1], strict=True))
    signed = options.scale == "signed" or (options.scale == "search" and not mirrored)
    low = LOWEST[options.bits]
    ladder = [low * (HIGHEST / low) ** (i / (options.candidates - 1)) for i in range(options.candidates)]
    factors = [1.0, *ladder] if mirrored else [1.0, *ladder, *(-f for f in ladder)]
    largest = F32(torch.finfo(getattr(torch, options.scale_dtype)).max)
    codes, scales = [], []
    for row in weight:
        for start in range(0, columns, size):
            group = list(row[start : start + size])
            extreme = extreme_of(group, signed)
            scale = stored(extreme, options.scale_dtype)
            if options.scale == "search":
                h = [F32(1)] * len(group) if importance is None else list(importance[start : start + size])
                found = searched(group, extreme, codebook, factors, h)
                scale = stored(np.clip(found, -largest, largest), options.scale_dtype)
            codes += [code_of(w * reciprocal(scale), codebook) for w in group]
            scales.append(scale)
    return codes, scales


def assert_agrees(weight, options, importance=None):
    measured = None if importance is None else Calibration(importance=importance)
    result = QUANTIZER.quantize(weight, options, measured)
    relative = None
    if importance is not None:
        exact = importance.double()
        relative = (exact / exact.mean()).clamp_min(1e-4).float().numpy()
    codebook = list(result.parts["codebook"][:, 0].numpy())
    with np.errstate(all="ignore"):
        codes, scales = reference(weight.float().numpy(), options, codebook, relative)
    assert result.parts["codes"].flatten().tolist() == codes
    assert np.array_equal(
        result.parts["scales"].float().flatten().numpy().view(np.uint32), np.array(scales, F32).view(np.uint32)
    )


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    bits=st.integers(2, 8),
    group_size=st.sampled_from((16, 17, 32, 48, 64, None)),
    codebook=st.sampled_from(("int", "nf", "fp", "learned")),
    scale=st.sampled_from(("absmax", "signed")),
    scale_dtype=st.sampled_from(("float16", "bfloat16", "float32")),
    rows=st.integers(1, 3),
    columns=st.integers(1, 70),
    dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
    gain=st.sampled_from((1e-6, 0.02, 1.0, 300.0)),
    seed=st.integers(0, 999),
)
def test_codes_and_scales_are_those_of_the_text(
    bits, group_size, codebook, scale, scale_dtype, rows, columns, dtype, gain, seed
):
    options = KbitOptions(bits, group_size, codebook, scale, scale_dtype)
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * gain
    assert_agrees(weight.to(dtype), options)


@settings(deadline=None, max_examples=25, derandomize=True)
@given(
    bits=st.integers(2, 6),
    codebook=st.sampled_from(("int", "nf", "fp", "learned")),
    scale_dtype=st.sampled_from(("float16", "bfloat16", "float32")),
    columns=st.integers(1, 40),
    important=st.booleans(),
    seed=st.integers(0, 999),
)
def test_searched_scales_are_those_of_the_text(bits, codebook, scale_dtype, columns, important, seed):
    generator = torch.Generator().manual_seed(seed)
    options = KbitOptions(bits, 24, codebook, "search", scale_dtype, candidates=5)
    weight = torch.randn(2, columns, generator=generator) * torch.randn(2, columns, generator=generator)
    importance = torch.rand(columns, generator=generator).square() if important else None
    assert_agrees(weight, options, importance)


@pytest.mark.parametrize("codebook", ["int", "nf", "fp"])
@pytest.mark.parametrize("kind", [*weights.AWKWARD, "ties"])
@pytest.mark.parametrize("scale", ["absmax", "signed", "search"])
def test_awkward_weights_too(codebook, kind, scale):
    options = KbitOptions(3, 16, codebook, scale, candidates=4)
    if kind == "ties":  # every weight sits on a midpoint, and +absmax meets -absmax
        edges = fixed_codebook(codebook, 3)
        edges = (edges[1:] + edges[:-1]) / 2
        weight = torch.cat((torch.tensor([-1.0, 1.0]), edges, edges.flip(0)))[None].repeat(2, 1)
    else:
        weight = weights.AWKWARD[kind]((2, 48), 16, 0)
    assert_agrees(weight, options)


@pytest.mark.parametrize("scale_dtype", ["bfloat16", "float32"])
def test_scales_too_small_for_a_reciprocal_become_zero(scale_dtype):
    weight = torch.tensor([[2.0**-126, 2.0**-127], [2.0**-127, -(2.0**-140)], [-(2.0**-126), 0.0]]).repeat(1, 8)
    options = KbitOptions(4, 16, "int", "signed", scale_dtype)
    assert_agrees(weight, options)
    assert QUANTIZER.quantize(weight, options).parts["scales"].float().flatten().tolist() == [
        2.0**-126,
        0.0,
        -(2.0**-126),
    ]


@pytest.mark.parametrize("bits", range(2, 9))
def test_codebooks_are_those_of_their_formulas(bits):
    count = 2**bits
    uniform = [(2 * i + 1) / count - 1 for i in range(count)]
    assert fixed_codebook("int", bits).tolist() == uniform
    quantiles = [NormalDist().inv_cdf((i + 0.5) / count) for i in range(count)]
    expected = torch.tensor([q / quantiles[-1] for q in quantiles])
    torch.testing.assert_close(fixed_codebook("nf", bits), expected, rtol=2e-7, atol=1e-8)
    levels = sorted({_small_float(code, bits) for code in range(count // 2)})
    assert len(levels) == count // 2
    expected = torch.tensor([level / levels[-1] for level in levels])
    assert torch.equal(fixed_codebook("fp", bits)[count // 2 :], expected)
    assert torch.equal(fixed_codebook("fp", bits), -fixed_codebook("fp", bits).flip(0))


def _small_float(code, bits):
    """Decode sign-less E2M(k-3) (E1M0 at 2 bits) with an exponent bias of 1."""
    mantissa_bits = max(0, bits - 3)
    exponent, mantissa = divmod(code, 2**mantissa_bits)
    leading, power = (1, exponent - 1) if exponent else (0, 0)
    return math.ldexp(leading + mantissa / 2**mantissa_bits, power)


def test_known_codebooks():
    """E2M1 as OCP writes it, and the k-bit normal floats that bitsandbytes' branch prints."""
    assert fixed_codebook("fp", 4)[8:].mul(6).round(decimals=5).tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert fixed_codebook("nf", 2).tolist() == pytest.approx([-1, -0.277, 0.277, 1], abs=5e-4)
    assert fixed_codebook("nf", 3)[4:].tolist() == pytest.approx([0.1025, 0.3186, 0.578, 1], abs=5e-4)
