"""A proof without floats says yes only where every dequantized bit agrees, and notices every single difference."""

from dataclasses import replace

import pytest
import torch

from lowbit import Grid, QuantizedTensor, ScaleFormat, Scheme, Zero, dequantize
from lowbit.lift import lift
from lowbit.proof import same_numbers
from lowbit.testing import samples

SHAPE = (6, 512)


def affine(bits, group_size, zero=Zero.SYMMETRIC, **fields):
    return Scheme(Grid.AFFINE, bits, group_size, zero, **fields)


PAIRS = [
    (affine(4, 128), affine(4, 32)),
    (affine(3, 128), affine(4, 32)),
    (affine(2, None), affine(8, 128)),
    (affine(8, 64), affine(8, 32)),
    (affine(4, 128, Zero.INTEGER), affine(5, 32)),
    (affine(7, 128, Zero.INTEGER), affine(8, 32)),
    (affine(4, 128, Zero.INTEGER), affine(4, 64, Zero.INTEGER)),
    (affine(4, 128), affine(4, 128, Zero.INTEGER)),
    (affine(4, 64, scales=ScaleFormat("bfloat16")), affine(4, 32)),
    (replace(affine(2, 256), levels=3), affine(4, 32)),
    (affine(4, 128), affine(4, 64, Zero.MINIMUM)),
    (affine(8, 32), affine(8, 32, Zero.MINIMUM)),
    (affine(4, 128, Zero.INTEGER), affine(4, 32, Zero.MINIMUM, scales=ScaleFormat("float32"))),
]


def changed(weight, part, place, change):
    parts = {name: value.clone() for name, value in weight.parts.items()}
    parts[part][place] += change
    return QuantizedTensor(weight.scheme, weight.shape, parts)


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_what_was_lifted_is_proved_and_one_change_is_not(source, target):
    weight = samples.quantized(source, SHAPE, 1)
    lifted = lift(weight, target)
    assert same_numbers(weight, lifted)
    assert same_numbers(lifted, weight) or target.zero is Zero.MINIMUM  # no lift leads back from there
    assert torch.equal(dequantize(weight), dequantize(lifted))
    code = int(lifted.parts["codes"][5, 511])
    assert not same_numbers(weight, changed(lifted, "codes", (5, 511), 1 if code == 0 else -1))
    assert not same_numbers(weight, changed(lifted, "scales", (0, -1), lifted.parts["scales"][0, -1]))
    if "minimums" in lifted.parts:
        assert not same_numbers(weight, changed(lifted, "minimums", (5, 0), 0.001))
    if "zeros" in lifted.parts:
        assert not same_numbers(weight, changed(lifted, "zeros", (3, 0), 1))


def test_codes_that_agree_modulo_256_do_not_agree():
    first, second = samples.quantized(affine(8, 32), (1, 32), 0), samples.quantized(affine(2, 32), (1, 32), 0)
    first.parts["codes"].fill_(0)
    second.parts["codes"].fill_((0 - 126) % 256)  # -128 and +128
    second.parts["scales"].copy_(first.parts["scales"])
    assert not same_numbers(first, second)
    assert not same_numbers(second, first)
    second.parts["codes"].fill_(0)
    first.parts["codes"].fill_(126)
    assert same_numbers(first, second)
    first.parts["codes"].fill_(125)
    assert not same_numbers(first, second)


@pytest.mark.parametrize(("scheme", "shape"), samples.REPRESENTATIVES)
def test_one_scheme_of_any_kind(scheme, shape):
    weight, other = samples.quantized(scheme, shape, 1), samples.quantized(scheme, shape, 2)
    assert same_numbers(weight, samples.quantized(scheme, shape, 1))
    assert not same_numbers(weight, other)


@pytest.mark.parametrize(
    "other",
    [
        affine(4, 128, Zero.MINIMUM),
        affine(4, 128, Zero.FLOAT),
        affine(4, 96),
        affine(4, 128, permutation=True),
        affine(4, 32, scales=ScaleFormat(bits=6, super_group=8)),
        Scheme(Grid.CODEBOOK, 4, 128),
    ],
)
def test_where_only_floats_can_tell_nothing_is_claimed(other):
    assert not same_numbers(samples.quantized(affine(4, 128), SHAPE, 1), samples.quantized(other, SHAPE, 1))
