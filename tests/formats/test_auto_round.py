"""Format auto-round: every packing it reads, the one it writes, settings of single modules, and exact transcoding."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowbit import Grid, Metadata, PackedTensor, Scheme, TensorSpec, Zero
from lowbit.errors import CheckpointError
from lowbit.plugins import registry
from lowbit.tensors import bit_equal
from lowbit.testing import ExporterContract, ImporterContract, Written, samples
from lowbit_formats import auto_round
from lowbit_formats.auto_round import AutoRoundExporter, AutoRoundImporter
from lowbit_formats.awq_layout import AwqPacker
from lowbit_formats.gptq_layout import GptqPacker, GptqV2Packer
from lowbit_formats.int_words import pack_words, unpack_words

IMPORTER, EXPORTER, V1, V2, AWQ = AutoRoundImporter(), AutoRoundExporter(), GptqPacker(), GptqV2Packer(), AwqPacker()
UP = "model.layers.0.mlp.up_proj"
CONFIG = {
    "quant_method": "auto-round",
    "packing_format": "auto_round:auto_gptq",
    "bits": 4,
    "group_size": 32,
    "sym": True,
}
SHAPE = (32, 128)


def affine(bits=4, group_size=32, zero=Zero.SYMMETRIC, **fields):
    return Scheme(Grid.AFFINE, bits, group_size, zero, **fields)


def packed(packer, scheme=None, seed=0):
    return packer.pack(samples.quantized(scheme or affine(), SHAPE, seed))


def write(path, value, config, name=UP, **changes):
    """Write a folder as auto-round does: the tensors of one module, without g_idx."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": config}))
    tensors = {**value.buffers, **changes}
    tensors.pop("g_idx", None)
    save_file({f"{name}.{suffix}": tensor for suffix, tensor in tensors.items()}, path / "model.safetensors")
    return path


def read(path, name=f"{UP}.weight"):
    with IMPORTER.open(path) as checkpoint:
        return checkpoint.read(name)


def export(path, values, model=None):
    entries = {
        name: value.spec if isinstance(value, PackedTensor) else TensorSpec.of(value) for name, value in values.items()
    }
    EXPORTER.write(path, entries, iter(values.items()), Metadata(model or {"model_type": "llama"}))
    return json.loads((path / "config.json").read_text())["quantization_config"]


def assert_packed(found, expected):
    assert found.spec == expected.spec
    for name, buffer in expected.buffers.items():
        assert bit_equal(found.buffers[name], buffer), name


class TestExporter(ExporterContract):
    @pytest.fixture
    def exporter(self):
        return EXPORTER

    @pytest.fixture
    def importer(self):
        return IMPORTER

    @pytest.fixture
    def values(self):
        plain = {
            "model.embed_tokens.weight": torch.ones(40, 64, dtype=torch.bfloat16),
            "model.layers.0.mlp.gate.weight": torch.ones(4, 64),
            "model.norm.weight": torch.ones(64),
        }
        schemes = (affine(), affine(2, 64), affine(3, None), affine(8, 128))
        names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(4)]
        return {**plain, **{name: packed(V1, scheme) for name, scheme in zip(names, schemes, strict=True)}}


class TestImporter(ImporterContract):
    @pytest.fixture
    def importer(self):
        return IMPORTER

    @pytest.fixture
    def written(self, tmp_path):
        values = {
            f"{UP}.weight": packed(V1, affine(2)),
            "model.norm.weight": torch.ones(6),
            "lm_head.weight": packed(V1, affine(8, None), 1),
        }
        export(tmp_path / "out", values)
        return Written(tmp_path / "out", values, Metadata({"model_type": "llama"}))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("packing", ["auto_round:auto_gptq", "auto_round:gptq", "auto_round", "auto_round:gptqmodel"])
def test_symmetric_files_of_every_packing_are_read(tmp_path, bits, packing):
    """Fields of z - 1 or of z, as the packing has it; both are the layout gptq."""
    value = packed(V1, affine(bits))
    field = 2 ** (bits - 1) - (packing in ("auto_round:auto_gptq", "auto_round:gptq"))
    zeros = pack_words(torch.full((4, 32), field, dtype=torch.uint8), bits)
    path = write(tmp_path / "it", value, {**CONFIG, "bits": bits, "packing_format": packing}, qzeros=zeros)
    assert_packed(read(path), value)


@pytest.mark.parametrize("bits", [2, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("packing", ["auto_round:auto_gptq", "auto_round"])
def test_asymmetric_files_follow_their_packing(tmp_path, bits, packing):
    """Version 1 is a whole word less, with borrows where z is 0; in 5 to 7 bits each field is masked."""
    value = packed(V2, affine(bits, zero=Zero.INTEGER))
    zeros = unpack_words(value.buffers["qzeros"], bits, 32)
    zeros[0, 0] = 0
    value.buffers["qzeros"][:] = pack_words(zeros, bits)
    if packing == "auto_round":
        zeros = value.buffers["qzeros"]
    elif bits in (5, 6, 7):
        zeros = pack_words(zeros - 1 & 2**bits - 1, bits)
    else:
        zeros = value.buffers["qzeros"] - pack_words(torch.ones(1, 32, dtype=torch.uint8), bits)
    config = {**CONFIG, "bits": bits, "sym": False, "packing_format": packing}
    assert_packed(read(write(tmp_path / "it", value, config, qzeros=zeros)), value)


def test_asymmetric_three_bits_without_a_zero_of_zero_are_read(tmp_path):
    value = packed(V2, affine(3, zero=Zero.INTEGER))
    zeros = unpack_words(value.buffers["qzeros"], 3, 32).clamp(min=1)
    value.buffers["qzeros"][:] = pack_words(zeros, 3)
    config = {**CONFIG, "bits": 3, "sym": False}
    assert_packed(read(write(tmp_path / "it", value, config, qzeros=pack_words(zeros - 1, 3))), value)
    zeros[0, 0] = 8  # stored as 7: a zero point of 0, if it were one
    path = write(tmp_path / "other", value, config, qzeros=pack_words(zeros - 1, 3))
    with pytest.raises(CheckpointError, match=f"{UP}.qzeros holds the field 7, a zero point of 0"):
        IMPORTER.open(path)


@pytest.mark.parametrize("zero", [Zero.SYMMETRIC, Zero.INTEGER])
def test_awq_packing_is_read(tmp_path, zero):
    value = packed(AWQ, affine(zero=zero))
    config = {**CONFIG, "sym": zero is Zero.SYMMETRIC, "packing_format": "auto_round:auto_awq"}
    assert_packed(read(write(tmp_path / "it", value, config)), value)


@pytest.mark.parametrize("method", ["auto-round", "auto_round", "intel/auto-round"])
def test_its_names_are_known(tmp_path, method):
    assert IMPORTER.why_not(write(tmp_path / "it", packed(V1), {**CONFIG, "quant_method": method})) is None


@pytest.mark.parametrize(
    "extra",
    [
        {UP: {"bits": 2, "group_size": 64}},
        {r".*\.0\.mlp.*": {"bits": 2, "group_size": 64}},
        {"model.layers.0.mlp.up": {"bits": 16}, UP: {"bits": 2, "group_size": 64}},  # a name is no expression
    ],
)
def test_settings_of_single_modules(tmp_path, extra):
    value = packed(V1, affine(2, 64))
    assert_packed(read(write(tmp_path / "it", value, {**CONFIG, "extra_config": extra})), value)


def test_the_config_that_is_written(tmp_path):
    values = {
        "model.embed_tokens.weight": torch.ones(8, 128),
        **{f"model.layers.{layer}.mlp.up_proj.weight": packed(V1) for layer in range(2)},
        "model.layers.1.mlp.down_proj.weight": packed(V1, affine(8, None)),
        "model.layers.1.mlp.gate.weight": torch.ones(4, 128),
        "lm_head.weight": packed(V1, seed=3),
    }
    config = export(tmp_path / "out", values)
    assert config.pop("provider").startswith("lowbit ")
    assert config == {
        **CONFIG,
        "data_type": "int",
        "block_name_to_quantize": "model.layers",
        "extra_config": {
            "lm_head": {"bits": 4, "group_size": 32, "sym": True},
            "model.layers.1.mlp.down_proj": {"bits": 8, "group_size": -1, "sym": True},
            "model.layers.1.mlp.gate": {"bits": 16, "data_type": "float"},
        },
    }
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {name.rpartition(".")[2] for name in stored} == {"weight", "qweight", "qzeros", "scales"}
    for name, value in values.items():
        if isinstance(value, PackedTensor):
            assert_packed(read(tmp_path / "out", name), value)


@pytest.mark.parametrize(
    ("scheme", "shape", "reason"),
    [
        (affine(permutation=True), SHAPE, "no g_idx for a permutation (act-order); the format 'gptq' stores it"),
        (affine(5), SHAPE, "2, 3, 4 or 8 bits for all loaders, not 5"),
        (affine(8), (24, 128), "out_features that are a multiple of 32, got 24"),
        (affine(), (32, 40), "in_features that are a multiple of 32, got 40"),
    ],
)
def test_the_exporter_refuses_with_a_reason(scheme, shape, reason):
    assert reason in EXPORTER.why_not(scheme, shape)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (
            {"packing_format": "auto_round:fp8"},
            "packing_format 'auto_round:fp8', which lowbit does not read; it reads auto",
        ),
        ({"packing_format": 3}, "packing_format 3"),
        ({"data_type": "mx_fp"}, "has data_type 'mx_fp'; lowbit reads auto-round's integer weights only"),
        ({"act_bits": 8}, "has act_bits 8"),
        ({"rotation_config": {"a": 1}}, "has rotation_config {'a': 1}"),
        ({"extra_config": {UP: {"bits": 16}}}, f"{UP} is quantized, but extra_config of"),
        ({"extra_config": {"(": {"bits": 2}}}, "has the pattern '(', which is no regular expression"),
        ({"extra_config": {UP: 2}}, "extra_config must map modules to objects"),
        ({"bits": 8}, f"{UP}.scales is float16 [4, 32], but a 32x64 weight of 8 bits"),
    ],
)
def test_a_contradiction_is_one_sentence(tmp_path, config, sentence):
    path = write(tmp_path / "it", packed(V1), {**CONFIG, **config})
    with pytest.raises(CheckpointError, match=re.escape(sentence)):
        IMPORTER.open(path)


def test_the_plugin_registers_a_format_and_no_layout():
    found = registry(auto_round)
    assert (list(found.packers), list(found.importers), list(found.exporters)) == ([], ["auto-round"], ["auto-round"])
