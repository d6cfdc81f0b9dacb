"""Format exl3 against a slow decoder written from exllamav3's facts: Python integers, numpy float16, matrices of Hadamard."""

import json
import math
from itertools import accumulate

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lowbit.convert import convert
from lowbit.errors import CheckpointError, SchemeError
from lowbit.grids import dequantize
from lowbit.kernels import ReferenceKernel
from lowbit.parts import TensorSpec
from lowbit.plan import Target
from lowbit.plugins import registry
from lowbit.scheme import Grid, Scheme, Trellis
from lowbit.tensors import PackedTensor
from lowbit.testing import ImporterContract, KernelContract, PackerContract, Written, samples
from lowbit.trellis import decode_tiles, weight_order
from lowbit_formats import exl3, hf, native, plain
from lowbit_formats.exl3 import MULTIPLIERS, Exl3Importer
from lowbit_formats.exl3_layout import SCHEMES, Exl3Packer, exl3_scheme

IMPORTER, PACKER = Exl3Importer(), Exl3Packer()
UP = "model.layers.0.mlp.up_proj"
RATES = [
    (2, "3inst"),
    (4, "mcg"),
    (6, "mul1"),
    (8, "mul1"),
    (10, "mcg"),
    (14, "3inst"),
    (16, "mul1"),
    (5, "mul1"),
    (15, "mul1"),
]
make_sample = samples.quantized  # before any test replaces it


def unscaled(*args, **how):
    """EXL3 has no place for a scale of the whole tensor, so it is 1."""
    quantized = make_sample(*args, **how)
    if quantized.scheme in SCHEMES:
        quantized.parts["scales"].fill_(1)
    return quantized


def packed(half_bits, code, shape=(128, 256), seed=0):
    return PACKER.pack(unscaled(exl3_scheme(half_bits, code), shape, seed))


def module(half_bits=4, code="mul1", shape=(128, 256), seed=0):
    value = packed(half_bits, code, shape, seed)
    flag = {code: torch.tensor(MULTIPLIERS[code] - 2**32, dtype=torch.int32)} if code in MULTIPLIERS else {}
    return {**value.buffers, **flag}, value


def write(folder, tensors, **config):
    folder.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    said = {"quant_method": "exl3", "version": "1.5.1", "bits": 2.0, "head_bits": 6, "tensor_storage": {}}
    config = {"model_type": "llama", "hidden_size": 256, **config}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": said}))
    (folder / "quantization_config.json").write_text(json.dumps(said))
    return folder


def write_module(folder, settings=None, config=None, **arguments):
    tensors, value = module(**arguments)
    named = {
        f"{UP}.{suffix}": tensor for suffix, tensor in {**tensors, **(settings or {})}.items() if tensor is not None
    }
    return write(folder, named, **(config or {})), value


# The slow decoder


def slow_value(state, code):
    """The fp16 value of a 16-bit state (codebook.cuh)."""
    if code == "mul1":
        product = state * 0x83DCD12D & 0xFFFFFFFF
        total = np.array([0x6400 + sum(product.to_bytes(4, "little"))], np.uint16).view(np.float16)[0]
        scale, bias = np.array([0x1EEE, 0xC931], np.uint16).view(np.float16)
        return np.float16(
            float(total) * float(scale) + float(bias)
        )  # exact in float64, so rounded once, as __hfma does
    product = (state * 0xCBAC1FED if code == "mcg" else state * 89226354 + 64248484) & 0xFFFFFFFF
    low, high = np.array([product & 0x8FFF8FFF ^ 0x3B603B60], np.uint32).view(np.float16)
    return np.float16(low + high)


def slow_tile(words, widths, code):
    """One 16x16 tile [k, n] of uint16 words (frac.cu: windows end at prefix sums; quantize.py: tensor_core_perm)."""
    bits = "".join(f"{word:032b}" for word in words.astype("<u2").view("<u4"))
    tile = np.zeros((16, 16), np.float16)
    for weight, end in enumerate(accumulate(widths[weight % len(widths)] for weight in range(256))):
        state = int("".join(bits[place % len(bits)] for place in range(end - 16, end)), 2)
        lane, register = divmod(weight, 8)
        k = lane % 4 * 2 + [0, 1, 8, 9, 0, 1, 8, 9][register]
        tile[k, lane // 4 + register // 4 * 8] = slow_value(state, code)
    return tile


def slow_weight(buffers, half_bits, code):
    """W of exllamav3, [in, out], in float64; and the decoded tiles before rotation."""
    widths = (half_bits // 2, half_bits // 2 + 1) if half_bits % 2 else (half_bits // 2,)
    trellis = buffers["trellis"].numpy().view(np.uint16)
    inner = np.block([[slow_tile(words, widths, code) for words in row] for row in trellis])
    hadamard = np.ones((1, 1))
    while len(hadamard) < 128:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    left, right = (np.kron(np.eye(size // 128), hadamard / math.sqrt(128)) for size in inner.shape)
    suh, svh = (buffers[name].numpy().astype(np.float64) for name in ("suh", "svh"))
    return suh[:, None] * (left @ inner.astype(np.float64) @ right) * svh, inner


@pytest.mark.parametrize(("half_bits", "code"), RATES)
def test_weights_are_those_of_the_slow_decoder(half_bits, code):
    value = packed(half_bits, code, (128, 128), seed=half_bits)
    expected, inner = slow_weight(value.buffers, half_bits, code)
    quantized = PACKER.unpack(value)
    tiles = decode_tiles(quantized.parts["codes"], quantized.scheme.trellis)
    assert np.array_equal(tiles.permute(0, 2, 1, 3).reshape(128, 128).numpy(), inner.T.astype(np.float32))
    # 14 butterfly passes and 4 products in float32, each off by half a unit in the last place of sums of 128 x 128 terms
    bound = 18 * 2.0**-24 * 128 * np.abs(inner).max() * np.abs(value.buffers["suh"].numpy().astype(np.float64)).max()
    bound *= np.abs(value.buffers["svh"].numpy().astype(np.float64)).max()
    assert np.abs(dequantize(quantized).numpy() - expected.T).max() <= bound


def test_rectangular_weights_keep_their_tiles_apart():
    value = packed(4, "mul1", (128, 256), seed=9)
    _, inner = slow_weight(value.buffers, 4, "mul1")
    quantized = PACKER.unpack(value)
    tiles = decode_tiles(quantized.parts["codes"], quantized.scheme.trellis)
    assert tiles.shape == (8, 16, 16, 16)
    assert np.array_equal(tiles.permute(0, 2, 1, 3).reshape(128, 256).numpy(), inner.T.astype(np.float32))


@given(st.integers(0, 65535), st.sampled_from(("3inst", "mcg", "mul1")))
def test_every_state_has_the_value_of_the_slow_decoder(state, code):
    """A tile whose every window is the same state: 16 bits a step cannot be, so one step of a 1-weight tile."""
    trellis = Trellis(code, (16,), tile=(1, 1))
    codes = torch.tensor([[[state]]], dtype=torch.int32).to(torch.int16)
    assert decode_tiles(codes, trellis).item() == float(slow_value(state, code))


def test_the_order_mma_b_visits_every_weight_once():
    order = weight_order(Trellis("mul1", (2,), order="mma_b"))
    assert sorted(order.tolist()) == list(range(256))
    assert order[:8].tolist() == [0, 1, 8, 9, 128, 129, 136, 137]
    assert weight_order(Trellis("mul1", (2,))).tolist() == list(range(256))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"order": "columns"}, "order must be one of rows, mma_b"),
        ({"order": "mma_b", "tile": (16, 32)}, "mma_b walks tiles of 16x16"),
    ],
)
def test_other_orders_are_refused(arguments, reason):
    with pytest.raises(SchemeError, match=reason):
        Trellis("mul1", (2,), **arguments)


def test_the_order_survives_a_file():
    scheme = exl3_scheme(5, "mul1")
    assert Scheme.from_json(json.loads(json.dumps(scheme.to_json()))) == scheme


class Unscaled:
    @pytest.fixture
    def packer(self):
        return PACKER

    @pytest.fixture(autouse=True)
    def unit_scale(self, monkeypatch):
        monkeypatch.setattr(samples, "quantized", unscaled)

    @pytest.fixture
    def examples(self):
        return [(exl3_scheme(half_bits, code), (128, 256)) for half_bits, code in RATES[2::3]]


class TestPacker(Unscaled, PackerContract):
    pass


class TestKernel(Unscaled, KernelContract):
    @pytest.fixture
    def kernel(self, packer):
        return ReferenceKernel(packer)

    @pytest.fixture
    def examples(self):
        return [(exl3_scheme(4, "mul1"), (128, 256))]


class TestImporter(ImporterContract):
    @pytest.fixture
    def importer(self):
        return IMPORTER

    @pytest.fixture
    def written(self, tmp_path):
        tensors, value = module()
        named = {f"{UP}.{suffix}": tensor for suffix, tensor in tensors.items()}
        bias = torch.ones(128, dtype=torch.float16)
        folder = write(tmp_path / "m", {**named, f"{UP}.bias": bias})
        values = {f"{UP}.weight": value, f"{UP}.bias": bias}
        with IMPORTER.open(folder) as checkpoint:  # the library that wrote the file chose the order
            return Written(folder, {name: values[name] for name in checkpoint.entries})


@pytest.mark.parametrize(("half_bits", "code"), RATES)
def test_every_rate_and_code_is_read(tmp_path, half_bits, code):
    folder, value = write_module(tmp_path / "m", half_bits=half_bits, code=code)
    with IMPORTER.open(folder) as checkpoint:
        assert dict(checkpoint.entries) == {f"{UP}.weight": value.spec}
        found = checkpoint.read(f"{UP}.weight")
        assert all(torch.equal(found.buffers[name], value.buffers[name]) for name in value.buffers)
        assert checkpoint.metadata.config == {"model_type": "llama", "hidden_size": 256}
        assert checkpoint.metadata.side_files == ()


def test_packed_signs_of_old_files_become_scales_of_one(tmp_path):
    tensors, value = module()
    bits = torch.randint(0, 2, (256,), generator=torch.Generator().manual_seed(0))
    words = (bits.reshape(16, 16) << torch.arange(16)).sum(1)
    old = {"su": words.to(torch.int16), "sv": torch.zeros(8, dtype=torch.int16)}
    tensors = {"trellis": tensors["trellis"], "mul1": tensors["mul1"], **old}
    folder = write(tmp_path / "m", {f"{UP}.{suffix}": tensor for suffix, tensor in tensors.items()})
    with IMPORTER.open(folder) as checkpoint:
        found = checkpoint.read(f"{UP}.weight")
    assert found.spec == value.spec
    assert torch.equal(found.buffers["suh"], (1 - 2 * bits).half())
    assert torch.equal(found.buffers["svh"], torch.ones(128, dtype=torch.float16))


def test_a_head_of_its_own_is_not_tied(tmp_path):
    tensors, _ = module(shape=(256, 256))
    named = {f"lm_head.{suffix}": tensor for suffix, tensor in tensors.items()}
    with IMPORTER.open(write(tmp_path / "m", named, vocab_size=256, tie_word_embeddings=True)) as checkpoint:
        assert checkpoint.metadata.config["tie_word_embeddings"] is False


@pytest.mark.parametrize(
    "config",
    [{"hidden_size": 200}, {"intermediate_size": 4095}, {"vocab_size": 250}, {"text_config": {"vocab_size": 250}}],
)
def test_padded_matrices_are_refused(tmp_path, config):
    tensors, _ = module(shape=(256, 256))
    folder = write(tmp_path / "m", {f"lm_head.{suffix}": tensor for suffix, tensor in tensors.items()}, **config)
    with pytest.raises(CheckpointError, match="padded"):
        IMPORTER.open(folder)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"mcg": torch.tensor(0)}, "flagged as mcg and as mul1"),
        ({"mul1": torch.tensor(7, dtype=torch.int32)}, "mul1 is [7], and lowbit knows the multiplier 0x83dcd12d"),
        ({"suh": None}, "suh is missing"),
        ({"trellis": None}, "up_proj.trellis is not; the checkpoint is incomplete"),
        ({"mul1": torch.tensor(torch.nan)}, "mul1 is [nan]"),
        ({"svh": torch.ones(256, dtype=torch.float16)}, "svh is float16 [256]"),
        ({"suh": torch.ones(256)}, "suh is float32 [256]"),
        ({"suh": None, "su": torch.zeros(17, dtype=torch.int16)}, "su is int16 [17]"),
        ({"suh": torch.full((256,), torch.nan, dtype=torch.float16)}, "suh holds NaN or infinity"),
        ({"svh": torch.full((128,), torch.inf, dtype=torch.float16)}, "svh holds NaN or infinity"),
        ({"trellis": torch.zeros(16, 8, 33, dtype=torch.int16)}, "33 words in a tile"),
        ({"trellis": torch.zeros(16, 8, 8, dtype=torch.int16)}, "8 words in a tile"),
        ({"trellis": torch.zeros(16, 8, 32)}, "must be a 3-D int16 tensor"),
        ({"trellis": torch.zeros(128, 32, dtype=torch.int16)}, "must be a 3-D int16 tensor"),
        ({"trellis": torch.zeros(16, 7, 32, dtype=torch.int16)}, "multiples of 128, got 112x256"),
        ({"trellis": torch.zeros(16, 8, 40, dtype=torch.int16), "mul1": None}, "not trellis 2.5-bit"),
    ],
)
def test_tensors_that_make_no_weight_are_refused_by_name(tmp_path, settings, reason):
    folder, _ = write_module(tmp_path / "m", settings)
    with pytest.raises(CheckpointError) as caught, IMPORTER.open(folder) as checkpoint:
        dict(checkpoint.stream())
    assert UP in str(caught.value)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme(Grid.AFFINE, 4, 64),
        Scheme(Grid.TRELLIS, 0, flat=True, trellis=Trellis("mul1", (2,))),
        Scheme(Grid.TRELLIS, 0, flat=True, trellis=Trellis("1mad", (2,), order="mma_b")),
    ],
)
def test_what_exl3_cannot_hold_is_refused_with_a_reason(scheme):
    assert "EXL3 holds trellis weights" in PACKER.why_not(scheme, (128, 128))


def test_a_scale_of_the_whole_tensor_has_no_place():
    quantized = unscaled(exl3_scheme(4, "mcg"), (128, 128))
    quantized.parts["scales"].fill_(0.5)
    with pytest.raises(SchemeError, match=r"this one is 0\.5"):
        PACKER.pack(quantized)


def test_exl3_becomes_plain_floats_and_native(tmp_path):
    components = registry(plain, native, hf, exl3)
    folder, value = write_module(tmp_path / "m")
    assert convert(folder, tmp_path / "native", Target("native"), components).error.exact
    assert convert(tmp_path / "native", tmp_path / "hf", Target("hf"), components).error.exact
    found = load_file(tmp_path / "hf" / "model.safetensors")[f"{UP}.weight"]
    assert torch.equal(found, ReferenceKernel(PACKER).dequantize(value))
    assert TensorSpec.of(found) == TensorSpec(torch.float32, (128, 256))
    assert isinstance(value, PackedTensor)
