"""Stochastic rounding is unbiased, belongs to elements, and is the arithmetic that its module writes down; so is the second level."""

import dataclasses

import numpy as np
import pytest
import torch

from lowbit import dequantize
from lowbit.testing.contracts.checks import assert_same_quantized
from lowbit_kbit import quantizer as module
from lowbit_kbit.codebooks import fixed_codebook
from lowbit_kbit.options import KbitOptions
from lowbit_kbit.quantizer import KbitQuantizer
from lowbit_kbit.rounding import mix, stochastic_codes

QUANTIZER = KbitQuantizer()
F32 = np.float32


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mix_of_one(value):
    value ^= value >> 16
    value = value * 0x7FEB352D % 2**32
    value ^= value >> 15
    value = value * 0x846CA68B % 2**32
    return value ^ value >> 16


def code_of(x, place, entries, seed):
    bits = mix_of_one(place % 2**32 ^ mix_of_one(place >> 32 ^ mix_of_one(seed % 2**32)))
    u = F32(bits >> 8) * F32(2.0**-24)
    inner = sum(entry <= x for entry in entries[1:])
    if inner == len(entries) - 1:
        return inner
    limit = entries[inner] + u * (entries[inner + 1] - entries[inner])
    return inner + int(limit < x)


@pytest.mark.parametrize("seed", [0, 7, 2**33 + 5])
def test_codes_are_those_of_the_text(seed):
    codebook = fixed_codebook("nf", 3)
    x = torch.cat((gaussian(300) * 0.6, codebook, torch.tensor([1.5, -1.5, 0.0])))
    places = torch.arange(len(x)) * 977_777_777
    expected = [code_of(F32(v), int(p), codebook.numpy(), seed) for v, p in zip(x, places, strict=True)]
    assert stochastic_codes(x, places, codebook, seed).tolist() == expected


def test_the_mixer_is_a_permutation_that_spreads_bits():
    values = mix(torch.arange(1 << 16))
    assert len(values.unique()) == 1 << 16
    assert int(values.max()) < 1 << 32
    counts = torch.bincount(values >> 28, minlength=16).double()
    assert ((counts - 4096).abs() < 5 * 4096**0.5).all()


def test_the_mean_over_seeds_is_the_weight():
    weight = gaussian(8, 64)
    options = KbitOptions(2, 64, "int", "absmax", "float32", rounding="stochastic")
    draws = torch.stack(
        [dequantize(QUANTIZER.quantize(weight, dataclasses.replace(options, seed=s))) for s in range(400)]
    )
    inside = weight.abs() <= 0.74 * weight.abs().amax(1, keepdim=True)  # the outermost entries of int2 are at 0.75
    error = (draws.mean(0) - weight)[inside].abs()
    gap = (weight.abs().amax(1, keepdim=True) / 2).expand_as(weight)[inside]
    chance = ((weight[inside] / gap + 0.5) % 1).clamp(0, 1)  # of the upper entry
    assert (error <= gap * (5 * (chance * (1 - chance) / 400).sqrt() + 4 / 400)).all()
    nearest = dequantize(QUANTIZER.quantize(weight, dataclasses.replace(options, rounding="nearest")))
    assert error.mean() < 0.2 * (nearest - weight)[inside].abs().mean()


def test_weights_on_entries_stay_there():
    codebook = fixed_codebook("fp", 3)
    x = codebook.unique().repeat(200)
    found = codebook[stochastic_codes(x, torch.arange(len(x)), codebook, 3).long()]
    assert torch.equal(found, x)


def test_pieces_and_rows_change_nothing(monkeypatch):
    weight = gaussian(32, 80)
    options = KbitOptions(3, 32, "nf", "signed", rounding="stochastic", seed=5)
    whole = QUANTIZER.quantize(weight, options)
    monkeypatch.setattr(module, "PIECE", 3 * 80)
    assert_same_quantized(QUANTIZER.quantize(weight, options), whole, "small pieces")
    other = QUANTIZER.quantize(weight, dataclasses.replace(options, seed=6))
    assert not torch.equal(other.parts["codes"], whole.parts["codes"])
    assert torch.equal(other.parts["scales"], whole.parts["scales"])


@pytest.mark.parametrize("scale", ["absmax", "signed", "search"])
@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_second_level_is_that_of_the_text(scale, bits, dtype):
    weight = gaussian(5, 150) * torch.tensor([1.0, 30.0, 1e-3, 0.0, 5.0])[:, None]
    weight[4, :32] = 0
    options = KbitOptions(4, 32, "nf", scale, dtype, scale_bits=bits, candidates=4)
    result = QUANTIZER.quantize(weight, options)
    plain = QUANTIZER.quantize(weight, dataclasses.replace(options, scale_bits=None, scale_dtype="float32"))
    wanted = plain.parts["scales"].numpy()
    largest = 2 ** (bits - 1) - 1 if scale == "signed" else 2**bits - 1
    steps = torch.tensor(np.abs(wanted).max(1) * F32(1 / largest)).to(getattr(torch, dtype))
    assert torch.equal(result.parts["super_scales"][:, 0], steps)
    step = steps.float().numpy()
    with np.errstate(divide="ignore", invalid="ignore"):
        units = np.rint(wanted * np.where(step > 0, F32(1) / step, F32(0))[:, None])
    assert np.array_equal(result.parts["scales"].numpy(), np.clip(units, -largest, largest))
    scales = result.parts["scales"].float() * steps.float()[:, None]
    factors = torch.where(scales == 0, 0, 1 / scales).repeat_interleave(32, 1)[:, :150]
    edges = (result.parts["codebook"][1:, 0] + result.parts["codebook"][:-1, 0]) * 0.5
    assert torch.equal(result.parts["codes"], torch.bucketize(weight * factors, edges).to(torch.uint8))


def test_eight_bit_scales_cost_almost_nothing():
    weight = gaussian(64, 1024)
    for scale in ("signed", "search"):
        options = KbitOptions(4, 32, "learned", scale, "float32")
        error = [
            float((dequantize(QUANTIZER.quantize(weight, each)) - weight).square().mean())
            for each in (options, dataclasses.replace(options, scale_bits=8))
        ]
        assert error[1] < 1.01 * error[0]


def test_user_entries_are_used_as_they_are():
    options = KbitOptions(2, 32, "user", "signed", "float32", entries="1/-1/-0.25/0.25")
    result = QUANTIZER.quantize(gaussian(4, 64), options)
    assert result.parts["codebook"].flatten().tolist() == [1, -1, -0.25, 0.25]
    assert QUANTIZER.quantize(
        gaussian(4, 64), dataclasses.replace(options, scale="search", scale_bits=8)
    ).scheme.scales.signed
