"""Layout plain: every scheme there and back, and the bytes that SPEC.md promises."""

import pytest
import torch
from hypothesis import given, settings

from lowbit import dequantize
from lowbit.bits import pack_bits
from lowbit.errors import WeightError
from lowbit.interfaces import MatmulProblem
from lowbit.kernels import ReferenceKernel
from lowbit.parts import TensorSpec, part_specs
from lowbit.plugins import registry
from lowbit.scheme import Binary, BinaryForm, Grid, Rotation, Scheme, Zero
from lowbit.tensors import QuantizedTensor, bit_equal
from lowbit.testing import KernelContract, PackerContract, samples, strategies
from lowbit_formats import plain

PACKER = plain.PlainPacker()


def with_codes(scheme, codes):
    shape = (codes.shape[0], codes.shape[1] * scheme.vector)
    return QuantizedTensor(scheme, shape, {**samples.quantized(scheme, shape).parts, "codes": codes})


def assert_round_trip(quantized):
    assert PACKER.why_not(quantized.scheme, quantized.shape) is None
    packed = PACKER.pack(quantized)
    assert {name: TensorSpec.of(buffer) for name, buffer in packed.buffers.items()} == PACKER.specs(
        quantized.scheme, quantized.shape
    )
    back = PACKER.unpack(packed)
    assert back.scheme == quantized.scheme
    assert back.shape == quantized.shape
    for name, values in quantized.parts.items():
        assert bit_equal(back.parts[name], values), name


class TestPacker(PackerContract):
    @pytest.fixture
    def packer(self):
        return PACKER

    @pytest.fixture
    def examples(self):
        return samples.REPRESENTATIVES


class TestKernel(KernelContract):
    @pytest.fixture
    def packer(self):
        return PACKER

    @pytest.fixture
    def kernel(self):
        return ReferenceKernel(PACKER)


@settings(max_examples=150, deadline=None)
@given(quantized=strategies.any_quantized())
def test_every_scheme_comes_back_bit_for_bit(quantized):
    assert_round_trip(quantized)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", [1, 7, 8, 17])
def test_codes_are_a_little_endian_bit_stream_in_each_row(bits, columns):
    codes = torch.randint(2**bits, (3, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    packed = PACKER.pack(with_codes(Scheme(Grid.AFFINE, bits), codes)).buffers["qweight"]
    width = (columns + 7) // 8 * bits
    for row, stored in zip(codes.tolist(), packed.tolist(), strict=True):
        stream = sum(code << bits * position for position, code in enumerate(row))
        assert bytes(stored) == stream.to_bytes(width, "little")


def test_codes_above_eight_bits_are_split():
    codes = torch.tensor([[0x3FF, 0x001, 0x2A5, 0x100]], dtype=torch.int32)
    buffers = PACKER.pack(with_codes(Scheme(Grid.CODEBOOK, 10, vector=2), codes)).buffers
    assert buffers["qweight"].tolist() == [[0xFF, 0x01, 0xA5, 0x00, 0, 0, 0, 0]]
    assert buffers["qweight_high"].tolist() == [[0b01_10_00_11, 0]]


def test_binary_planes_take_a_bit_each():
    scheme = Scheme(Grid.BINARY, 1, binary=Binary(1, BinaryForm.PRODUCT, rank=9))
    specs = PACKER.specs(scheme, (4, 16))
    assert specs["left"] == TensorSpec(torch.uint8, (4, 2))
    assert specs["right"] == TensorSpec(torch.uint8, (9, 2))


def test_zeros_keep_every_int16_value():
    scheme = Scheme(Grid.AFFINE, 4, 8, Zero.INTEGER)
    parts = {
        **samples.quantized(scheme, (2, 16)).parts,
        "zeros": torch.tensor([[16, -1], [-(2**15), 2**15 - 1]]).short(),
    }
    assert_round_trip(QuantizedTensor(scheme, (2, 16), parts))


@pytest.mark.parametrize("bits", [3, 8])
def test_pieces_of_a_large_weight_join_without_a_seam(bits):
    codes = torch.randint(2**bits, (700, 2051), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    quantized = with_codes(Scheme(Grid.AFFINE, bits), codes)
    packed = PACKER.pack(quantized)
    assert torch.equal(packed.buffers["qweight"], pack_bits(codes, bits))
    assert torch.equal(PACKER.unpack(packed).parts["codes"], codes)


@pytest.mark.parametrize(
    ("scheme", "code"), [(Scheme(Grid.AFFINE, 3), 8), (Scheme(Grid.CODEBOOK, 9), 512), (Scheme(Grid.CODEBOOK, 9), -1)]
)
def test_a_code_that_would_bleed_into_its_neighbours_is_refused(scheme, code):
    dtype = part_specs(scheme, (1, 8))["codes"].dtype
    codes = torch.tensor([[0, 1, code, 0, 0, 0, 0, 0]], dtype=dtype)
    with pytest.raises(WeightError, match=f"a code is {code}, which does not fit {scheme.bits} bits"):
        PACKER.pack(with_codes(scheme, codes))


def test_refusals_name_the_value():
    assert "0x8" in PACKER.why_not(Scheme(Grid.AFFINE, 4), (0, 8))
    reason = PACKER.why_not(Scheme(Grid.AFFINE, 4, rotation=Rotation(128)), (8, 576))
    assert reason == "rotation blocks of 128 do not divide in_features 576; choose a smaller power of two"
    assert "out_features 576" in PACKER.why_not(Scheme(Grid.AFFINE, 4, rotation=Rotation(0, 128)), (576, 8))


def test_the_registered_kernel_agrees_with_the_grid():
    found = registry(plain)
    assert list(found.packers) == ["plain"]
    quantized = samples.quantized(Scheme(Grid.AFFINE, 3, 64, Zero.INTEGER), (24, 192))
    packed = found.packers["plain"].pack(quantized)
    kernel = found.kernel_for(MatmulProblem("plain", packed.scheme, packed.shape))
    assert torch.equal(kernel.dequantize(packed), dequantize(quantized))
