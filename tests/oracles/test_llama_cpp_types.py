"""Every GGUF type against ggml's own C: the same floats, bit for bit, and rows that llama.cpp accepts."""

import pytest
import torch

from lowbit.grids import dequantize
from lowbit.interfaces import Calibration
from lowbit.kernels import ReferenceKernel
from lowbit.tensors import PackedTensor, bit_equal
from lowbit.testing import weights
from lowbit_formats.ggml import GgmlQuantizer
from lowbit_formats.ggml.options import TYPES, GgmlOptions
from lowbit_formats.gguf import PACKERS

SHAPE = (16, 1024)
every_packer = pytest.mark.parametrize("packer", PACKERS, ids=lambda packer: packer.layout)


def random_blocks(packer, seed):
    """Blocks of random bytes, scales of NaN and infinity among them; ternary codes stay ternary."""
    spec = packer.spec(packer.scheme, SHAPE)
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, spec.buffers["blocks"].shape, dtype=torch.uint8, generator=generator)
    if packer.type.name == "TQ2_0":
        codes = blocks.view(-1, packer.type.nbytes)[:, :64]
        codes &= ~(codes & codes >> 1 & 0x55)  # code 3 becomes 2
    return PackedTensor(spec, {"blocks": blocks})


def with_finite_scales(packer, packed):
    blocks = packed.buffers["blocks"].clone()
    cut = blocks.view(-1, packer.type.nbytes)
    for at in packer.floats:
        cut[:, at + 1] &= 0xBF  # clears the top bit of the exponent: below 2.0
    if not packer.floats:
        cut[:, 0].clamp_(max=250)
    return PackedTensor(packed.spec, {"blocks": blocks})


ZEROS_OF_EITHER_SIGN = ("Q2_0", "Q1_0")
"""Q2_0's codes are the symmetric grid's mirrored, and a sum of sign planes starts at +0."""


def same(packer, ours, theirs):
    """Bit for bit, but for the sign of zeros in two types."""
    if packer.type.name in ZEROS_OF_EITHER_SIGN:
        ours, theirs = ours + 0.0, theirs + 0.0
    return bit_equal(ours, theirs)


@every_packer
def test_sizes_agree(packer, ggml):
    traits = ggml.traits(packer.type.id)
    assert traits.type_name.decode() == packer.type.name.lower().replace("_k", "_K")
    assert (traits.blck_size, traits.type_size) == (packer.type.weights, packer.type.nbytes)


@every_packer
def test_same_floats_in_c(packer, ggml):
    for seed in range(8):
        packed = with_finite_scales(packer, random_blocks(packer, seed))
        theirs = torch.from_numpy(ggml.dequantize(packer.type.id, packed.buffers["blocks"].numpy(), SHAPE[1]))
        assert same(packer, dequantize(packer.unpack(packed)), theirs)
        assert same(packer, ReferenceKernel(packer).dequantize(packed), theirs)


@every_packer
def test_validation_agrees(packer, ggml):
    """Random blocks hold NaN and infinity sooner or later; ggml refuses exactly those that the exporter refuses."""
    verdicts = set()
    for seed in range(64):
        packed = random_blocks(packer, seed)
        row = PackedTensor(packer.spec(packer.scheme, (1, SHAPE[1])), {"blocks": packed.buffers["blocks"][:1]})
        valid = ggml.valid(packer.type.id, row.buffers["blocks"].numpy())
        assert valid is (packer.not_finite(row) is None)
        verdicts.add(valid)
    assert verdicts == {True, False}


@pytest.mark.parametrize("calibrated", [False, True], ids=["plain", "imatrix"])
@pytest.mark.parametrize("name", TYPES)
def test_llama_cpp_accepts_what_we_quantize(name, calibrated, ggml):
    packer = next(packer for packer in PACKERS if packer.type.name.lower() == name)
    calibration = Calibration(importance=torch.rand(SHAPE[1])) if calibrated else None
    for kind, make in weights.AWKWARD.items():
        quantized = GgmlQuantizer().quantize(make(SHAPE, 32, 0), GgmlOptions(name), calibration)
        blocks = packer.pack(quantized).buffers["blocks"].numpy()
        assert ggml.valid(packer.type.id, blocks), kind
        theirs = torch.from_numpy(ggml.dequantize(packer.type.id, blocks, SHAPE[1]))
        assert same(packer, dequantize(quantized), theirs), kind
