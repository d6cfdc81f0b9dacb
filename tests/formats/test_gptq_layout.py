"""Layouts gptq and gptq_v2: packers, reference kernels, and the words of a published example."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit import Grid, ReferenceKernel, ScaleFormat, Scheme, Zero
from lowbit.errors import WeightError
from lowbit.tensors import bit_equal
from lowbit.testing import KernelContract, PackerContract, samples
from lowbit_formats.gptq_layout import GptqPacker, GptqV2Packer

V1, V2 = GptqPacker(), GptqV2Packer()
EXAMPLES = [
    Scheme(Grid.AFFINE, bits, group_size, zero, ScaleFormat(dtype), permutation=permutation)
    for bits, group_size, dtype, permutation in [
        (2, 64, "float16", False),
        (3, 32, "float16", True),
        (4, 128, "bfloat16", False),
        (4, 48, "float16", True),  # a short last group
        (8, None, "float16", False),
    ]
    for zero in (Zero.SYMMETRIC, Zero.INTEGER)
]
SHAPE = (32, 128)


def packed(scheme, seed=0, shape=SHAPE):
    return (V1 if scheme.symmetric else V2).pack(samples.quantized(scheme, shape, seed))


def affine(bits=4, group_size=32, zero=Zero.SYMMETRIC, **fields):
    return Scheme(Grid.AFFINE, bits, group_size, zero, **fields)


class TestV1Packer(PackerContract):
    @pytest.fixture
    def packer(self):
        return V1

    @pytest.fixture
    def examples(self):
        return [(scheme, SHAPE) for scheme in EXAMPLES if scheme.symmetric]


class TestV2Packer(PackerContract):
    @pytest.fixture
    def packer(self):
        return V2

    @pytest.fixture
    def examples(self):
        return [(scheme, SHAPE) for scheme in EXAMPLES if not scheme.symmetric]


class TestV1Kernel(KernelContract):
    @pytest.fixture
    def packer(self):
        return V1

    @pytest.fixture
    def kernel(self):
        return ReferenceKernel(V1)


class TestV2Kernel(KernelContract):
    @pytest.fixture
    def packer(self):
        return V2

    @pytest.fixture
    def kernel(self):
        return ReferenceKernel(V2)


@given(st.sampled_from(EXAMPLES), st.integers(1, 4), st.integers(1, 5), st.data())
@settings(deadline=None, max_examples=40)
def test_every_shape_of_whole_words_round_trips(scheme, rows, columns, data):
    packer, shape = V1 if scheme.symmetric else V2, (32 * rows, 32 * columns)
    quantized = samples.quantized(scheme, shape, data.draw(st.integers(0, 999)), "bits")
    back = packer.unpack(packer.pack(quantized))
    assert all(bit_equal(back.parts[name], part) for name, part in quantized.parts.items())


@pytest.mark.parametrize(
    ("scheme", "shape", "reason"),
    [
        (affine(zero=Zero.INTEGER), SHAPE, "a zero point of 0 has no portable code"),
        (affine(zero=Zero.MINIMUM), SHAPE, "has symmetric zeros, not minimum ones"),
        (affine(bits=1), SHAPE, "codes of 2, 3, 4, 5, 6, 7, 8 bits, not 1"),
        (affine(scales=ScaleFormat("float32")), SHAPE, "float16 or bfloat16 scales, not float32"),
        (affine(scales=ScaleFormat(bits=6, super_group=8)), SHAPE, "not scales in two levels"),
        (affine(bits=2, levels=3), SHAPE, "no place for only 3 levels"),
        (affine(), (30, 128), "out_features that are a multiple of 8 at 4 bits, got 30"),
        (affine(bits=3), (32, 100), "in_features that are a multiple of 32 at 3 bits, got 100"),
        (affine(), (0, 128), "a weight needs rows and columns, got 0x128"),
    ],
)
def test_v1_refuses_with_a_reason(scheme, shape, reason):
    assert reason in V1.why_not(scheme, shape)


def test_v2_refuses_symmetric_weights_which_have_one_layout():
    assert "symmetric weights have the layout 'gptq'" in V2.why_not(affine(), SHAPE)


def test_a_zero_point_that_no_field_holds_is_refused():
    quantized = samples.quantized(affine(zero=Zero.INTEGER), SHAPE)
    quantized.parts["zeros"][3, 1] = 16
    with pytest.raises(WeightError, match="a zero point is 16, and 4 bits store 0 to 15"):
        V2.pack(quantized)


def test_the_words_of_the_reference():
    """The constants of every AutoGPTQ file: 0x77777777 at 4 bits, 0x55555555 at 2, 0x7f7f7f7f at 8."""
    for bits, word in ((2, 0x55555555), (4, 0x77777777), (8, 0x7F7F7F7F)):
        assert set(packed(affine(bits)).buffers["qzeros"].unique().tolist()) == {word}
