"""The gguf package's own dequantizers: every block of random bytes means the same floats here, bit for bit."""

import ctypes
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.kernels import ReferenceKernel
from lowbit.tensors import PackedTensor, bit_equal
from lowbit_formats.gguf import PACKERS
from lowbit_formats.gguf.block_types import FILE_TYPES, FLOATS, TYPES

NOT_IN_GGUF = {"Q2_0", "Q1_0"}  # gguf 0.19 lists Q1_0 but cannot dequantize it, and does not know Q2_0
BOTH = [packer for packer in PACKERS if packer.type.name not in NOT_IN_GGUF]


def random_blocks(packer, rows, blocks, seed):
    """Blocks of random bytes with finite scales; codes of ternary types stay ternary."""
    shape = (rows, blocks * packer.type.weights)
    generator = torch.Generator().manual_seed(seed)
    spec = packer.spec(packer.scheme, shape)
    raw = torch.randint(0, 256, spec.buffers["blocks"].shape, dtype=torch.uint8, generator=generator)
    cut = raw.view(rows, blocks, -1)
    for at in packer.floats:
        cut[:, :, at + 1] &= 0xBF  # clears the top bit of the exponent: below 2.0
    if packer.type.name == "MXFP4":
        cut[:, :, 0] = cut[:, :, 0].clamp(max=250)
    if packer.type.name == "TQ2_0":
        cut[:, :, :64] &= cut[:, :, :64] << 1 | 0x55  # code 3 becomes 1
        cut[:, :, :64] &= ~(cut[:, :, :64] >> 1 & 0x55)
    return PackedTensor(spec, {"blocks": raw})


@pytest.mark.parametrize("packer", BOTH, ids=lambda packer: packer.layout)
@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 4), blocks=st.integers(1, 3), seed=st.integers(0, 2**32 - 1))
def test_same_floats_as_the_gguf_package(packer, rows, blocks, seed):
    packed = random_blocks(packer, rows, blocks, seed)
    theirs = gguf.dequantize(packed.buffers["blocks"].numpy(), gguf.GGMLQuantizationType[packer.type.name])
    assert bit_equal(ReferenceKernel(packer).dequantize(packed), torch.from_numpy(theirs))


@pytest.mark.parametrize("packer", PACKERS, ids=lambda packer: packer.layout)
def test_same_floats_as_ggml_in_c(packer):
    """ggml's ``to_float`` for every type; of Q2_0 only the sign of zeros may differ, because its codes are mirrored."""
    ggml = ggml_library()
    traits = ggml.ggml_get_type_traits(packer.type.id).contents
    assert (traits.block, traits.nbytes) == (packer.type.weights, packer.type.nbytes)
    packed = random_blocks(packer, 8, 1024 // packer.type.weights, seed=0)
    blocks, found = packed.buffers["blocks"], torch.empty(8, 1024)
    assert ggml.ggml_validate_row_data(
        packer.type.id, ctypes.c_void_p(blocks.data_ptr()), ctypes.c_size_t(blocks.numel())
    )
    ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)(traits.to_float)(
        blocks.data_ptr(), found.data_ptr(), found.numel()
    )
    ours = ReferenceKernel(packer).dequantize(packed)
    assert torch.equal(ours, found)
    assert bit_equal(ours, found) or packer.type.name == "Q2_0"


class Traits(ctypes.Structure):
    """The start of ggml's ``struct ggml_type_traits``."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("block", ctypes.c_int64),
        ("interleave", ctypes.c_int64),
        ("nbytes", ctypes.c_size_t),
        ("quantized", ctypes.c_bool),
        ("to_float", ctypes.c_void_p),
    )


def ggml_library():
    """The library that llama-cpp-python brings."""
    llama_cpp = pytest.importorskip("llama_cpp")
    library = ctypes.CDLL(str(next((Path(llama_cpp.__file__).parent / "lib").glob("*ggml-base.*"))))
    library.ggml_get_type_traits.restype = ctypes.POINTER(Traits)
    library.ggml_validate_row_data.restype = ctypes.c_bool
    return library


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4"])
def test_blocks_that_gguf_quantized_pack_to_the_same_bytes(name):
    packer = next(packer for packer in PACKERS if packer.type.name == name)
    weights = np.random.default_rng(0).standard_normal((8, 512)).astype(np.float32)
    blocks = torch.from_numpy(gguf.quantize(weights, gguf.GGMLQuantizationType[name]))
    packed = PackedTensor(packer.spec(packer.scheme, (8, 512)), {"blocks": blocks})
    assert torch.equal(packer.pack(packer.unpack(packed)).buffers["blocks"], blocks)


def test_the_table_of_types_agrees():
    theirs = {type.name: (type.value, *sizes) for type, sizes in gguf.GGML_QUANT_SIZES.items()}
    mine = {name: (type.id, type.weights, type.nbytes) for name, type in TYPES.items()}
    assert {name: mine[name] for name in theirs} == theirs


def test_file_types_agree():
    known = {name: value.value for name, value in gguf.LlamaFileType.__members__.items()}
    for name, value in FILE_TYPES.items():
        spelled = {"F32": "ALL_F32", "Q3_K": "MOSTLY_Q3_K_S", "Q4_K": "MOSTLY_Q4_K_S", "Q5_K": "MOSTLY_Q5_K_S"}
        theirs = known.get(spelled.get(name, f"MOSTLY_{name}"), known.get(f"MOSTLY_{name}_MOE"))
        assert theirs in (value, None)
    assert FLOATS["BF16"] == torch.bfloat16
