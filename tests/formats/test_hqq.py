"""Format hqq: W_q unpacked as its description says, the settings that are tensors, and everything that is refused by name."""

import json
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lowbit.convert import convert
from lowbit.errors import CheckpointError
from lowbit.kernels import ReferenceKernel
from lowbit.plan import Target
from lowbit.plugins import registry
from lowbit.scheme import Grid, ScaleFormat, Scheme, Zero
from lowbit.testing import ImporterContract, KernelContract, PackerContract, Written, samples
from lowbit_formats import hf, hqq, native, plain
from lowbit_formats.hqq import HqqImporter
from lowbit_formats.hqq_layout import HqqPacker, hqq_scheme

IMPORTER, PACKER = HqqImporter(), HqqPacker()
PACKING = {8: "8bit_u8", 6: "8bit_u8", 5: "8bit_u8", 4: "4bit_u8", 3: "3bit_32", 2: "2bit_u8", 1: "1bit_u8"}
SHAPES = {8: (3, 64), 6: (3, 64), 5: (3, 64), 4: (6, 64), 3: (7, 96), 2: (4, 64), 1: (8, 64)}
EXAMPLES = [(hqq_scheme(bits, 32, shape, "float16"), shape) for bits, shape in SHAPES.items()]
EXAMPLES += [
    (hqq_scheme(4, 64, (4, 96), "bfloat16"), (4, 96)),  # groups that cross rows
    (hqq_scheme(2, 32, (4, 64), "float32", levels=3), (4, 64)),
]
UP = "model.layers.0.mlp.up_proj"


def text(value):
    return torch.tensor([ord(letter) for letter in value], dtype=torch.uint8)


def module(bits=4, group_size=32, shape=(6, 64), seed=0, dtype="float16", settings=None):
    """The tensors of a module by suffix, and the packed weight that they are."""
    packed = PACKER.pack(samples.quantized(hqq_scheme(bits, group_size, shape, dtype), shape, seed))
    tensors = {
        **packed.buffers,
        "nbits": torch.tensor(bits, dtype=torch.int32),
        "group_size": torch.tensor(group_size, dtype=torch.int32),
        "axis": torch.tensor(1, dtype=torch.int32),
        "shape": torch.tensor(shape),
        "packing": text(PACKING[bits]),
        "unpack_view_dtype": text("torch.uint8"),
        "compute_dtype": text(f"torch.{dtype}"),
    }
    flags = {"view_as_float": 0, "quant_scale": 0, "quant_zero": 0, "offload_meta": 0, "encoded_state_dict": 1}
    flags |= {"stores_quant_config": 1, "channel_wise": 1, "optimize": 1, "round_zero": 1}
    tensors |= {name: torch.tensor(value, dtype=torch.uint8) for name, value in flags.items()}
    return {**tensors, **(settings or {})}, packed


def write(folder, tensors, config=None):
    folder.mkdir(exist_ok=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None},
        folder / "model.safetensors",
    )
    said = {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4}}, "skip_modules": ["lm_head"]}
    (folder / "config.json").write_text(
        json.dumps({"model_type": "llama", "quantization_config": said} if config is None else config)
    )
    return folder


def write_module(folder, **arguments):
    tensors, packed = module(**arguments)
    return write(folder, {f"{UP}.{suffix}": tensor for suffix, tensor in tensors.items()}), packed


def refusal(folder):
    with pytest.raises(CheckpointError) as caught, IMPORTER.open(folder) as checkpoint:
        dict(checkpoint.stream())
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestPacker(PackerContract):
    @pytest.fixture
    def packer(self):
        return PACKER

    @pytest.fixture
    def examples(self):
        return EXAMPLES


class TestKernel(KernelContract):
    @pytest.fixture
    def kernel(self, packer):
        return ReferenceKernel(packer)

    @pytest.fixture
    def packer(self):
        return PACKER

    @pytest.fixture
    def examples(self):
        return EXAMPLES[3:8]


class TestImporter(ImporterContract):
    @pytest.fixture
    def importer(self):
        return IMPORTER

    @pytest.fixture
    def written(self, tmp_path):
        first, second = module(seed=1), module(3, 32, (7, 96), 2, "bfloat16")
        tensors = {f"a.{suffix}": tensor for suffix, tensor in first[0].items()}
        tensors |= {f"b.{suffix}": tensor for suffix, tensor in second[0].items()}
        bias = torch.ones(6, dtype=torch.float16)
        folder = write(tmp_path / "m", {**tensors, "a.bias": bias})
        values = {"a.weight": first[1], "b.weight": second[1], "a.bias": bias}
        with IMPORTER.open(folder) as checkpoint:  # the library that wrote the file chose the order
            return Written(folder, {name: values[name] for name in checkpoint.entries})


@pytest.mark.parametrize(("bits", "shape"), SHAPES.items())
def test_fields_of_an_element_are_groups_a_quotient_apart_highest_first(bits, shape):
    quantized = samples.quantized(hqq_scheme(bits, 32, shape, "float16"), shape, bits)
    words = PACKER.pack(quantized).buffers["W_q"].numpy()
    fields, groups = {8: 1, 6: 1, 5: 1, 4: 2, 3: 10, 2: 4, 1: 8}[bits], shape[0] * shape[1] // 32
    assert words.shape == (-(-groups // fields), 32)
    codes = quantized.parts["codes"].numpy().reshape(groups, 32)
    for group in range(groups):
        field, row = divmod(group, len(words))
        assert np.array_equal(words[row] >> bits * (fields - 1 - field) & (1 << bits) - 1, codes[group])


@pytest.mark.parametrize(("scheme", "shape"), EXAMPLES[3:8])
def test_a_weight_is_code_minus_zero_times_scale_of_its_group(scheme, shape):
    packed = PACKER.pack(samples.quantized(scheme, shape))
    codes = PACKER.unpack(packed).parts["codes"].float().reshape(-1, scheme.group_size)
    expected = (codes - packed.buffers["zero"].float()) * packed.buffers["scale"].float()
    assert torch.equal(ReferenceKernel(PACKER).dequantize(packed), expected.reshape(shape))


@pytest.mark.parametrize("bits", SHAPES)
def test_every_width_is_read(tmp_path, bits):
    folder, packed = write_module(tmp_path / "m", bits=bits, shape=SHAPES[bits])
    with IMPORTER.open(folder) as checkpoint:
        assert dict(checkpoint.entries) == {f"{UP}.weight": packed.spec}
        found = checkpoint.read(f"{UP}.weight")
        assert all(torch.equal(found.buffers[name], packed.buffers[name]) for name in packed.buffers)
        assert checkpoint.metadata.config == {"model_type": "llama"}


def test_ternary_is_three_levels_of_two_bits(tmp_path):
    folder, _ = write_module(tmp_path / "m", bits=2, shape=(4, 64), settings={"nbits": torch.tensor(1.58)})
    with IMPORTER.open(folder) as checkpoint:
        scheme = checkpoint.entries[f"{UP}.weight"].scheme
    assert (scheme.bits, scheme.levels) == (2, 3)


def test_groups_that_do_not_divide_rows_are_flat(tmp_path):
    folder, packed = write_module(tmp_path / "m", group_size=64, shape=(4, 96))
    assert packed.scheme.flat
    with IMPORTER.open(folder) as checkpoint:
        assert checkpoint.entries[f"{UP}.weight"] == packed.spec


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_codes_viewed_as_floats_are_the_same_bytes(tmp_path, dtype):
    tensors, packed = module()
    folder = write(
        tmp_path / "m",
        {f"a.{name}": tensor for name, tensor in tensors.items()} | {"a.W_q": tensors["W_q"].view(dtype)},
    )
    with IMPORTER.open(folder) as checkpoint:
        assert torch.equal(checkpoint.read("a.weight").buffers["W_q"], packed.buffers["W_q"])


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"axis": torch.tensor(0)}, "axis is 0: lowbit reads groups along in_features (axis 1) only"),
        ({"quant_scale": torch.tensor(1)}, "quant_scale is set: lowbit reads no quantized scales"),
        ({"quant_zero": torch.tensor(1)}, "quant_zero is set"),
        ({"offload_meta": torch.tensor(1)}, "offload_meta is set"),
        ({"channel_wise": torch.tensor(0)}, "not of a whole tensor"),
        ({"nbits": torch.tensor(7)}, "7 bits with packing '4bit_u8'"),
        ({"nbits": torch.tensor(2)}, "2 bits with packing '4bit_u8'"),
        ({"packing": text("4bit_xy")}, "packing '4bit_xy'"),
        ({"packing": torch.zeros(3)}, "must be text in uint8"),
        ({"shape": torch.tensor([2, 3, 64])}, "shape is [2, 3, 64]"),
        ({"shape": torch.tensor([6, 32])}, "W_q is uint8 [6, 32]"),
        ({"group_size": torch.tensor(0)}, "group_size is 0"),
        ({"group_size": torch.tensor([32, 32])}, "must be one finite number, got [32, 32]"),
        ({"group_size": torch.tensor(torch.nan)}, "must be one finite number, got [nan]"),
        ({"shape": torch.tensor([6.0, 64.0])}, "shape is [6.0, 64.0]"),
        ({"W_q": torch.zeros(6, 32, dtype=torch.int8)}, "W_q must be a 2-D"),
        ({"group_size": torch.tensor(36)}, "36 does not divide"),
        ({"group_size": None}, "has no group_size"),
        ({"zero": None}, "zero is missing"),
        ({"scale": None}, "no scale"),
        ({"scale": torch.ones(12, 1, dtype=torch.int8)}, "scale must be a 2-D float16"),
        ({"zero": torch.ones(12, 1)}, "zero is float32 [12, 1]"),
        ({"scale": torch.full((12, 1), torch.inf, dtype=torch.float16)}, "scale holds NaN or infinity"),
        ({"zero": torch.full((12, 1), torch.nan, dtype=torch.float16)}, "zero holds NaN or infinity"),
        ({"W_q": torch.zeros(6, 33, dtype=torch.uint8)}, "W_q is uint8 [6, 33]"),
    ],
)
def test_what_lowbit_does_not_read_is_refused_by_name(tmp_path, settings, reason):
    folder, _ = write_module(tmp_path / "m", settings=settings)
    message = refusal(folder)
    assert UP in message
    assert reason in message


def test_folders_that_hqq_wrote_itself_are_known_by_their_tensors(tmp_path):
    tensors, packed = module()
    tensors = {f"a.{suffix}": tensor for suffix, tensor in tensors.items()}
    folder = write(tmp_path / "m", tensors, {"model_type": "llama"})
    with registry(hf, hqq).open(folder) as checkpoint:
        assert checkpoint.entries == {"a.weight": packed.spec}
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    weight_map = dict.fromkeys(tensors, "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with registry(hf, hqq).open(folder) as checkpoint:
        assert checkpoint.entries == {"a.weight": packed.spec}
    assert IMPORTER.why_not(write(tmp_path / "plain", {"a.weight": torch.ones(2, 2)}, {})) is not None


def test_a_pickled_model_of_hqq_is_refused_and_not_opened(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "qmodel.pt").write_bytes(pickle.dumps({}))
    assert IMPORTER.why_not(tmp_path) is None
    assert "never unpickles" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("scheme", "shape", "reason"),
    [
        (Scheme(Grid.AFFINE, 4, 64), (4, 64), "float zero"),
        (Scheme(Grid.AFFINE, 7, 64, Zero.FLOAT), (4, 64), "8 bits"),
        (Scheme(Grid.AFFINE, 4, None, Zero.FLOAT), (4, 64), "of a stated size"),
        (Scheme(Grid.AFFINE, 4, 48, Zero.FLOAT), (4, 64), "48 does not divide"),
        (Scheme(Grid.AFFINE, 4, 48, Zero.FLOAT, flat=True), (4, 64), "48 does not divide"),
        (Scheme(Grid.AFFINE, 4, 64, Zero.FLOAT), (3, 64), "packs 2 groups"),
        (Scheme(Grid.AFFINE, 4, 64, Zero.FLOAT, permutation=True), (4, 64), "no add-ons"),
        (Scheme(Grid.AFFINE, 4, 64, Zero.FLOAT, ScaleFormat("float8_e4m3fn")), (4, 64), "one of float16"),
    ],
)
def test_what_the_layout_cannot_hold_is_refused_with_a_reason(scheme, shape, reason):
    assert reason in PACKER.why_not(scheme, shape)


def test_hqq_becomes_plain_floats_and_native(tmp_path):
    components = registry(plain, native, hf, hqq)
    folder, packed = write_module(tmp_path / "m")
    assert convert(folder, tmp_path / "native", Target("native"), components).error.exact
    assert convert(tmp_path / "native", tmp_path / "hf", Target("hf"), components).error.exact
    found = load_file(tmp_path / "hf" / "model.safetensors")[f"{UP}.weight"]
    assert torch.equal(found, ReferenceKernel(PACKER).dequantize(packed))
