"""Exact re-expression: for every pair of schemes that ``why_not`` allows, the dequantized bits are the same."""

from dataclasses import replace

import pytest
import torch

from lowbit import Grid, Outliers, QuantizedTensor, ScaleFormat, Scheme, Zero, dequantize
from lowbit.errors import SchemeError
from lowbit.grids import empty_parts
from lowbit.lift import candidates, lift, why_not

SHAPE = (6, 1024)
K4 = ScaleFormat(bits=6, super_group=8)
K2 = ScaleFormat(bits=4, super_group=16)
K3 = ScaleFormat(bits=6, super_group=16, signed=True)


ONE_LEVEL = ScaleFormat()
F32 = ScaleFormat("float32")


def affine(bits, group_size, zero=Zero.SYMMETRIC, scales=ONE_LEVEL):
    return Scheme(Grid.AFFINE, bits, group_size, zero, scales)


def weight(scheme, seed=0):
    """Random codes, signed scales, zeros over their whole range."""
    generator = torch.Generator().manual_seed(seed)
    parts = empty_parts(scheme, SHAPE)
    for name, part in parts.items():
        if name == "codes":
            part.random_(0, scheme.code_count, generator=generator)
        elif name == "zeros" and not part.is_floating_point():
            part.random_(0, 2**scheme.bits, generator=generator)
        elif part.is_floating_point():
            part.copy_(torch.randn(part.shape, generator=generator) * 0.02)
        else:
            part.random_(0, 2 ** (scheme.scales.bits - scheme.scales.signed), generator=generator)
    return QuantizedTensor(scheme, SHAPE, parts)


EXACT = [
    (affine(4, 128), affine(4, 32)),
    (affine(4, None), affine(4, 32)),
    (affine(3, 64), affine(4, 32)),
    (affine(2, 64), affine(4, 32)),
    (affine(4, 128, Zero.INTEGER), affine(5, 32)),
    (affine(7, 32, Zero.INTEGER), affine(8, 32)),
    (affine(4, 128), affine(4, 128, Zero.INTEGER)),
    (affine(4, 64), affine(4, 64, Zero.MINIMUM)),
    (affine(4, 64, scales=ScaleFormat("bfloat16")), affine(4, 64)),
    (affine(4, 64), affine(4, 64, scales=ScaleFormat("float32"))),
    (affine(4, 256, Zero.INTEGER), affine(4, 32, Zero.MINIMUM, K4)),
    (affine(4, None, Zero.INTEGER), affine(5, 32, Zero.MINIMUM, K4)),
    (affine(2, 256, Zero.INTEGER), affine(2, 16, Zero.MINIMUM, K2)),
    (affine(4, 256), affine(4, 32, Zero.MINIMUM, K4)),
    (affine(3, 256), affine(3, 16, scales=K3)),
    (affine(4, 32, Zero.MINIMUM, K4), affine(5, 32, Zero.MINIMUM, K4)),
    (affine(4, 32, Zero.MINIMUM, K4), affine(4, 32, Zero.MINIMUM, ScaleFormat("float32"))),
    (affine(3, 16, scales=K3), affine(3, 16, scales=ScaleFormat("float32"))),
    (affine(4, 64, Zero.FLOAT), affine(4, 32, Zero.FLOAT)),
    (replace(affine(2, 256), levels=3), affine(4, 32)),
    (replace(affine(2, 256), levels=3), affine(2, 32, Zero.MINIMUM)),
]


@pytest.mark.parametrize(("source", "target"), EXACT, ids=lambda scheme: scheme.summary().replace(" ", "_"))
def test_every_dequantized_bit_is_the_same(source, target):
    assert why_not(source, target, SHAPE) is None
    quantized = weight(source)
    lifted = lift(quantized, target)
    assert lifted.scheme == target
    lifted.validate()
    assert torch.equal(dequantize(quantized), dequantize(lifted))


@pytest.mark.parametrize(
    ("source", "target", "reason"),
    [
        (affine(4, 32), affine(4, 64), "groups of 64 do not lie inside groups of 32"),
        (affine(4, 128), affine(3, 128), "4-bit codes do not fit 3 bits"),
        (affine(4, 128, Zero.INTEGER), affine(4, 128), "need 5 symmetric bits"),
        (affine(4, 128, Zero.INTEGER), affine(4, 32, Zero.MINIMUM), "not a float16 number in general"),
        (affine(4, 128, Zero.INTEGER), affine(4, 32, Zero.MINIMUM, K4), "super-groups of 256 weights"),
        (affine(4, 32, Zero.MINIMUM), affine(5, 32), "a minimum zero is no symmetric zero"),
        (affine(4, 32, Zero.MINIMUM, K4), affine(4, 32, Zero.MINIMUM), "needs float32 scales"),
        (affine(4, 256, Zero.MINIMUM), affine(4, 32, Zero.MINIMUM, K4), "not re-expressed with two levels"),
        (affine(8, 256, Zero.INTEGER), affine(8, 32, Zero.MINIMUM, K4), "do not fit sub-minimums of 6"),
        (affine(4, 64, scales=F32), affine(4, 64, Zero.MINIMUM, F32), "rounded before a minimum is added"),
        (affine(4, 64, scales=ScaleFormat("float32")), affine(4, 64), "float16 scales do not hold float32 scales"),
        (affine(4, 64), Scheme(Grid.CODEBOOK, 4, 64), "affine codes are not re-expressed as codebook"),
        (replace(affine(4, 64), outliers=Outliers(0.1)), affine(4, 64), "outliers differs"),
    ],
)
def test_what_cannot_be_exact_is_refused_with_a_reason(source, target, reason):
    assert reason in why_not(source, target, SHAPE)


def test_a_scale_outside_the_target_range_is_named():
    source = affine(4, 64, scales=ScaleFormat("bfloat16"))
    quantized = weight(source)
    quantized.parts["scales"][2, 3] = 1e-30
    with pytest.raises(SchemeError, match=r"scale 9\.98402e-31 is no float16 number"):
        lift(quantized, affine(4, 64))


@pytest.mark.parametrize("source", [affine(4, 128), affine(3, None, Zero.INTEGER), affine(4, 32, Zero.MINIMUM, K4)])
def test_every_candidate_is_exact(source):
    quantized = weight(source)
    found = list(candidates(source, SHAPE))
    assert found
    for target in found:
        assert torch.equal(dequantize(quantized), dequantize(lift(quantized, target))), target.summary()
