"""Format awq: the interleave bit for bit, symmetric weights that stay symmetric, version gemv, and refusals."""

import json
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lowbit import Grid, Metadata, PackedTensor, ReferenceKernel, ScaleFormat, Scheme, TensorSpec, Zero
from lowbit.errors import CheckpointError, NoRouteError, WeightError
from lowbit.plugins import registry
from lowbit.tensors import bit_equal
from lowbit.testing import ExporterContract, ImporterContract, KernelContract, PackerContract, Written, samples, weights
from lowbit_formats import awq
from lowbit_formats.awq import AwqExporter, AwqImporter
from lowbit_formats.awq_layout import AwqPacker

IMPORTER, EXPORTER, PACKER = AwqImporter(), AwqExporter(), AwqPacker()
UP = "model.layers.0.mlp.up_proj"
CONFIG = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
SHAPE = (16, 128)


def affine(bits=4, group_size=32, zero=Zero.SYMMETRIC, **fields):
    return Scheme(Grid.AFFINE, bits, group_size, zero, **fields)


EXAMPLES = [
    affine(group_size=group_size, zero=zero, scales=ScaleFormat(dtype))
    for group_size, dtype in ((32, "float16"), (128, "bfloat16"), (None, "float16"))
    for zero in (Zero.SYMMETRIC, Zero.INTEGER)
]


def packed(scheme, seed=0, shape=SHAPE):
    return PACKER.pack(samples.quantized(scheme, shape, seed))


def write(path, tensors, config=CONFIG, file="config.json"):
    path.mkdir()
    document = {"model_type": "llama", "quantization_config": config} if file == "config.json" else config
    (path / file).write_text(json.dumps(document))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")
    return path


def module(scheme=None, **changes):
    buffers = {**packed(scheme or affine()).buffers, **changes}
    return {f"{UP}.{suffix}": tensor for suffix, tensor in buffers.items() if tensor is not None}


def read(path, name=f"{UP}.weight"):
    with IMPORTER.open(path) as checkpoint:
        return checkpoint.read(name)


def export(path, values, config=None):
    entries = {
        name: value.spec if isinstance(value, PackedTensor) else TensorSpec.of(value) for name, value in values.items()
    }
    EXPORTER.write(path, entries, iter(values.items()), Metadata(config or {"model_type": "llama"}))
    return json.loads((path / "config.json").read_text())["quantization_config"]


def assert_packed(found, expected):
    assert found.spec == expected.spec
    for name, buffer in expected.buffers.items():
        assert bit_equal(found.buffers[name], buffer), name


class TestPacker(PackerContract):
    @pytest.fixture
    def packer(self):
        return PACKER

    @pytest.fixture
    def examples(self):
        return [(scheme, SHAPE) for scheme in EXAMPLES]


class TestKernel(KernelContract):
    @pytest.fixture
    def packer(self):
        return PACKER

    @pytest.fixture
    def kernel(self):
        return ReferenceKernel(PACKER)


class TestExporter(ExporterContract):
    @pytest.fixture
    def exporter(self):
        return EXPORTER

    @pytest.fixture
    def importer(self):
        return IMPORTER

    @pytest.fixture
    def values(self):
        """One group size, because the format has one; symmetric and asymmetric, float16 and bfloat16."""
        plain = {
            "model.embed_tokens.weight": weights.gaussian((40, 64), 0, torch.bfloat16),
            "model.layers.0.input_layernorm.weight": weights.gaussian((1, 64), 1)[0],
            "model.layers.0.self_attn.q_proj.weight": weights.gaussian((64, 64), 2, torch.float16),
            "model.norm.weight": torch.ones(64),
        }
        schemes = (affine(), affine(zero=Zero.INTEGER), affine(scales=ScaleFormat("bfloat16")))
        names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(3)]
        return {**plain, **dict(zip(names, map(packed, schemes, range(3)), strict=True))}


class TestImporter(ImporterContract):
    @pytest.fixture
    def importer(self):
        return IMPORTER

    @pytest.fixture
    def written(self, tmp_path):
        values = {
            f"{UP}.weight": packed(affine(zero=Zero.INTEGER)),
            "model.norm.weight": torch.ones(6),
            "model.layers.1.mlp.up_proj.weight": packed(affine(), 1),
        }
        export(tmp_path / "out", values)
        return Written(tmp_path / "out", values, Metadata({"model_type": "llama"}))


@given(st.sampled_from(EXAMPLES), st.integers(1, 9), st.integers(1, 3), st.integers(0, 999))
@settings(deadline=None, max_examples=40)
def test_every_shape_of_whole_words_round_trips(scheme, octets, groups, seed):
    quantized = samples.quantized(scheme, (8 * octets, 128 * groups), seed, "bits")
    back = PACKER.unpack(PACKER.pack(quantized))
    assert all(bit_equal(back.parts[name], part) for name, part in quantized.parts.items())


def test_many_blocks_are_packed_as_one():
    """A weight of several pieces, so that every piece must land in its own columns."""
    quantized = samples.quantized(affine(zero=Zero.INTEGER), (1024, 4096))
    back = PACKER.unpack(PACKER.pack(quantized))
    assert all(bit_equal(back.parts[name], part) for name, part in quantized.parts.items())


def test_the_interleave_of_the_reference():
    """Codes 0 to 7 of one column: nibbles, from bit 0, hold output columns 0 2 4 6 1 3 5 7."""
    quantized = samples.quantized(affine(group_size=8), (8, 8))
    quantized.parts["codes"][:] = torch.arange(8, dtype=torch.uint8)[:, None]
    buffers = PACKER.pack(quantized).buffers
    assert set(buffers["qweight"].flatten().tolist()) == {0x75316420}
    assert set(buffers["qzeros"].flatten().tolist()) == {0x88888888 - (1 << 32)}


@pytest.mark.parametrize(
    ("scheme", "shape", "reason"),
    [
        (affine(bits=8), SHAPE, "codes of 4 bits, not 8"),
        (affine(permutation=True), SHAPE, "no place for a permutation (act-order); the format 'gptq'"),
        (affine(zero=Zero.FLOAT), SHAPE, "has symmetric or integer zeros, not float ones"),
        (affine(), (12, 128), "out_features that are a multiple of 8, got 12"),
        (affine(group_size=48), SHAPE, "48 does not divide in_features 128"),
        (affine(), (0, 128), "a weight needs rows and columns"),
    ],
)
def test_the_layout_refuses_with_a_reason(scheme, shape, reason):
    assert reason in PACKER.why_not(scheme, shape)


def test_zero_points_above_15_are_refused():
    quantized = samples.quantized(affine(zero=Zero.INTEGER), SHAPE)
    quantized.parts["zeros"][0, 0] = -1
    with pytest.raises(WeightError, match="a zero point is -1, and 4 bits store 0 to 15"):
        PACKER.pack(quantized)


def test_symmetric_weights_have_zeros_and_read_back_symmetric(tmp_path):
    value = packed(affine())
    config = export(tmp_path / "out", {f"{UP}.weight": value})
    assert config["zero_point"] is True
    assert set(load_file(tmp_path / "out" / "model.safetensors")[f"{UP}.qzeros"].unique().tolist()) == {-0x77777778}
    assert_packed(read(tmp_path / "out"), value)


def test_integer_zeros_at_the_midpoint_stay_integer_when_lowbit_wrote_them(tmp_path):
    quantized = samples.quantized(affine(zero=Zero.INTEGER), SHAPE)
    quantized.parts["zeros"][:] = 8
    value = PACKER.pack(quantized)
    assert export(tmp_path / "out", {f"{UP}.weight": value})["lowbit"] == {UP: ["zeros"]}
    assert_packed(read(tmp_path / "out"), value)


@pytest.mark.parametrize(("group_size", "width"), [(32, 4), (64, 2), (128, 1), (None, 1)])
@pytest.mark.parametrize("zero", [Zero.SYMMETRIC, Zero.INTEGER])
def test_gemv_is_rearranged_without_a_change(tmp_path, group_size, width, zero):
    """The tensors of AutoAWQ's gemv.py, made here one code at a time."""
    scheme = affine(group_size=group_size, zero=zero)
    quantized = samples.quantized(scheme, SHAPE)
    (rows, columns), groups = SHAPE, scheme.groups(SHAPE)
    zeros = quantized.parts.get("zeros", torch.full((rows, groups), 8))
    qweight, qzeros = torch.zeros(rows, columns // 8, dtype=torch.int64), torch.zeros(rows, width, dtype=torch.int64)
    for column in range(columns):
        qweight[:, column // 8] |= quantized.parts["codes"][:, column].long() << 4 * (column % 8)
    for group in range(groups):
        qzeros[:, group // 8] |= zeros[:, group].long() << 4 * (group % 8)
    scales = torch.zeros(rows, 8 * width, dtype=torch.float16)
    scales[:, :groups] = quantized.parts["scales"]
    tensors = {
        f"{UP}.qweight": qweight.to(torch.int32),
        f"{UP}.qzeros": qzeros.to(torch.int32),
        f"{UP}.scales": scales,
    }
    path = write(tmp_path / "it", tensors, {**CONFIG, "version": "GEMV", "group_size": group_size or -1})
    assert_packed(read(path), PACKER.pack(quantized))
    with IMPORTER.open(path) as checkpoint:
        assert checkpoint.metadata.provenance["awq_version"] == "gemv"


def test_the_old_names_of_keys_and_files_are_read(tmp_path):
    config = {"w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"}
    path = write(tmp_path / "it", module(affine(zero=Zero.INTEGER)), config, "quant_config.json")
    assert_packed(read(path), packed(affine(zero=Zero.INTEGER)))


def test_the_config_has_the_long_names_and_what_stays_plain(tmp_path):
    values = {
        "model.embed_tokens.weight": torch.ones(8, 128),
        f"{UP}.weight": packed(affine(group_size=None)),
        "model.layers.0.mlp.router.weight": torch.ones(4, 128),
    }
    config = export(tmp_path / "out", values, {"torch_dtype": "bfloat16"})
    assert config.pop("meta")["quantizer"][0].startswith("lowbit:")
    assert config == {
        **CONFIG,
        "group_size": -1,
        "modules_to_not_convert": ["model.embed_tokens", "model.layers.0.mlp.router", "lm_head"],
    }
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "float16"
    quantized_head = export(tmp_path / "head", {"lm_head.weight": packed(affine())})
    assert quantized_head["lm_head"] is True
    assert quantized_head["modules_to_not_convert"] == []


def test_a_second_group_size_is_refused():
    entries = {
        f"model.layers.{layer}.mlp.up_proj.weight": packed(affine(group_size=size)).spec
        for layer, size in enumerate((32, 32, 64))
    }
    with pytest.raises(NoRouteError, match=r"layers\.2\.mlp\.up_proj has groups of 64, most have groups of 32"):
        EXPORTER.check(entries, Metadata())


def test_a_plain_name_inside_a_packed_one_is_refused():
    """Loaders look for modules_to_not_convert inside names: vLLM's is_layer_skipped with skip_with_substr."""
    entries = {
        "model.layers.0.mlp.gate.weight": TensorSpec(torch.float32, (4, 128)),
        "model.layers.0.mlp.gate_proj.weight": packed(affine()).spec,
    }
    with pytest.raises(NoRouteError, match=r"AWQ loaders would leave model\.layers\.0\.mlp\.gate_proj unquantized"):
        EXPORTER.check(entries, Metadata())


@pytest.mark.parametrize(
    ("changes", "config", "sentence"),
    [
        ({}, {"version": "gemv_fast"}, "has version 'gemv_fast'; lowbit reads the AWQ versions gemm and gemv"),
        ({}, {"version": "llm-awq"}, "has version 'llm-awq'"),
        ({}, {"bits": 8}, f"{UP} has 8 bits, and lowbit reads AWQ of 4 bits only"),
        ({}, {"group_size": 48}, f"{UP}.qweight is a weight of 16x128, which groups of 48"),
        ({}, {"group_size": 64}, f"{UP}.scales is float16 [4, 16], but a gemm weight of 16x128 with group_size 64"),
        ({}, {"version": "gemv"}, f"{UP}.scales is float16 [4, 16], but a gemv weight of 128x16"),
        ({"qzeros": None}, {}, f"{UP}.qzeros is missing"),
        ({"scales": None}, {}, f"{UP} has qweight, qzeros, but no scales"),
        ({"qweight": torch.ones(4, 4, dtype=torch.int16)}, {}, f"{UP}.qweight must be a 2-D int32 tensor, got int16"),
    ],
)
def test_a_contradiction_is_one_sentence(tmp_path, changes, config, sentence):
    changed = {"group_size": 16} if config.get("version") == "gemv" else {}
    path = write(tmp_path / "it", module(**changes), {**CONFIG, **config, **changed})
    with pytest.raises(CheckpointError, match=re.escape(sentence)):
        IMPORTER.open(path)


def test_scales_that_are_not_finite_are_named(tmp_path):
    path = write(tmp_path / "it", module(scales=torch.full((4, 16), float("inf"), dtype=torch.float16)))
    with IMPORTER.open(path) as checkpoint, pytest.raises(CheckpointError, match=f"{UP}.scales holds NaN or infinity"):
        checkpoint.read(f"{UP}.weight")


def test_the_plugin_registers_everything():
    found = registry(awq)
    assert list(found.packers) == ["awq-gemm"]
    assert list(found.kernels) == ["torch-awq-gemm"]
    assert (list(found.importers), list(found.exporters)) == (["awq"], ["awq"])
