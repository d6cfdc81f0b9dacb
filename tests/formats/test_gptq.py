"""Format gptq: layouts bit for bit, both versions of zeros, act-order, overrides, and every contradiction refused."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowbit import Grid, Metadata, PackedTensor, Scheme, TensorSpec, Zero
from lowbit.errors import CheckpointError, NoRouteError
from lowbit.plugins import registry
from lowbit.tensors import bit_equal
from lowbit.testing import ExporterContract, ImporterContract, Written, samples
from lowbit_formats import gptq
from lowbit_formats.gptq import GptqExporter, GptqImporter
from lowbit_formats.gptq_layout import GptqPacker, GptqV2Packer
from lowbit_formats.int_words import pack_words, unpack_words

IMPORTER, EXPORTER, V1, V2 = GptqImporter(), GptqExporter(), GptqPacker(), GptqV2Packer()
UP = "model.layers.0.mlp.up_proj"
CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
SHAPE = (32, 128)


def packed(scheme, seed=0, shape=SHAPE):
    return (V1 if scheme.symmetric else V2).pack(samples.quantized(scheme, shape, seed))


def affine(bits=4, group_size=32, zero=Zero.SYMMETRIC, **fields):
    return Scheme(Grid.AFFINE, bits, group_size, zero, **fields)


def write(path, tensors, config=CONFIG, file="config.json"):
    """Write a folder by hand: whatever a test says, right or wrong."""
    path.mkdir()
    document = {"model_type": "llama", "quantization_config": config} if file == "config.json" else config
    (path / file).write_text(json.dumps(document))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")
    return path


def module(scheme=None, seed=0, name=UP, **changes):
    """Return the tensors of one packed module by file name, some of them replaced; None leaves one out."""
    buffers = {**packed(scheme or affine(), seed).buffers, **changes}
    return {f"{name}.{suffix}": tensor for suffix, tensor in buffers.items() if tensor is not None}


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


class TestExporter(ExporterContract):
    @pytest.fixture
    def exporter(self):
        return EXPORTER

    @pytest.fixture
    def importer(self):
        return IMPORTER

    @pytest.fixture
    def packers(self):
        return [V1, V2]


class TestImporter(ImporterContract):
    @pytest.fixture
    def importer(self):
        return IMPORTER

    @pytest.fixture
    def written(self, tmp_path):
        values = {
            f"{UP}.weight": packed(affine(3, 64, Zero.INTEGER)),
            "model.norm.weight": torch.ones(6),
            "lm_head.weight": packed(affine(8, None), 1),
        }
        export(tmp_path / "out", values)
        return Written(tmp_path / "out", values, Metadata({"model_type": "llama"}))


@pytest.mark.parametrize("label", ["gptq", "gptq_v2", None])
@pytest.mark.parametrize("field", [7, 8])
@pytest.mark.parametrize("symmetric", [True, None])
def test_the_version_of_a_symmetric_file_is_seen_not_believed(tmp_path, label, field, symmetric):
    expected = packed(affine())
    zeros = pack_words(torch.full((4, 32), field, dtype=torch.uint8), 4)
    config = {**CONFIG, "checkpoint_format": label, "sym": symmetric}
    path = write(tmp_path / "it", module(qzeros=zeros), config)
    assert_packed(read(path), expected)
    with IMPORTER.open(path) as checkpoint:
        wrong = (field == 7) == (label == "gptq_v2")
        assert ("gptq_zeros" in checkpoint.metadata.provenance) == wrong
        if wrong:
            assert checkpoint.metadata.provenance["gptq_zeros"] == f"1 of 1 modules have version {field - 6}"


def test_zeros_that_contradict_sym_are_named(tmp_path):
    zeros = pack_words(torch.full((4, 32), 5, dtype=torch.uint8), 4)
    path = write(tmp_path / "it", module(qzeros=zeros))
    sentence = f"{UP}.qzeros holds 5 everywhere, but the quantization_config says sym is true, which means 7 or 8"
    with pytest.raises(CheckpointError, match=re.escape(sentence)):
        IMPORTER.open(path)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_asymmetric_v1_follows_its_label(tmp_path, bits):
    scheme = affine(bits, zero=Zero.INTEGER)
    expected = packed(scheme)
    zeros = unpack_words(expected.buffers["qzeros"], bits, 32).clamp(min=1)
    expected.buffers["qzeros"][:] = pack_words(zeros, bits)
    tensors = module(scheme, qzeros=pack_words(zeros - 1, bits))
    path = write(tmp_path / "it", tensors, {**CONFIG, "bits": bits, "sym": False, "checkpoint_format": "gptq"})
    assert_packed(read(path), expected)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("writer", [{"meta": {"quantizer": ["gptqmodel:4.0"]}}, {"provider": "auto-round"}])
def test_zero_points_of_zero_are_given_back_by_their_writers_rule(tmp_path, bits, writer):
    """GPTQModel subtracts one from every field of a word at once, borrows and all: z = 0, 8, 8 becomes 15, 6, 7."""
    scheme = affine(bits, zero=Zero.INTEGER)
    expected = packed(scheme)
    zeros = torch.randint(2**bits, (4, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    zeros[0, 0] = 0
    expected.buffers["qzeros"][:] = pack_words(zeros, bits)
    borrowed = expected.buffers["qzeros"] - pack_words(torch.ones(1, 32, dtype=torch.uint8), bits)
    config = {**CONFIG, "bits": bits, "sym": False}
    assert_packed(read(write(tmp_path / "it", module(scheme, qzeros=borrowed), {**config, **writer})), expected)
    nobody = write(tmp_path / "nobody", module(scheme, qzeros=borrowed), config)
    with pytest.raises(CheckpointError, match=rf"{UP}.qzeros holds the field {2**bits - 1}, a zero point of 0"):
        IMPORTER.open(nobody)


THREE_BITS = {
    "a field at a time": (0xDB6DB6DB, 0xB6DB6DB6, 0x6DB6DB6D),
    "whole words, constants swapped": (0x00000000, 0xB6DB6DB7, 0x49249249),
    "version 2": (0x24924924, 0x49249249, 0x92492492),
}


@pytest.mark.parametrize("words", THREE_BITS.values(), ids=THREE_BITS.keys())
@pytest.mark.parametrize("symmetric", [True, None])
def test_every_dialect_of_symmetric_three_bits_is_known(tmp_path, words, symmetric):
    row = torch.tensor(words).to(torch.int32)
    path = write(tmp_path / "it", module(affine(3), qzeros=row.repeat(4, 1)), {**CONFIG, "bits": 3, "sym": symmetric})
    assert_packed(read(path), packed(affine(3)))


def test_asymmetric_three_bits_of_gptqmodel_are_refused(tmp_path):
    config = {**CONFIG, "bits": 3, "sym": False, "meta": {"quantizer": "gptqmodel:4.0"}}
    path = write(tmp_path / "it", module(affine(3, zero=Zero.INTEGER)), config)
    with pytest.raises(CheckpointError, match=rf"{UP}.qzeros holds 3-bit zero points .* save the model as gptq_v2"):
        IMPORTER.open(path)
    assert_packed(
        read(write(tmp_path / "v2", module(affine(3, zero=Zero.INTEGER)), {**config, "checkpoint_format": "gptq_v2"})),
        packed(affine(3, zero=Zero.INTEGER)),
    )


def test_the_borrow_of_the_reference():
    """z = 0, 8, 8, ... is 0x7777776f in a file of GPTQModel."""
    zeros = pack_words(torch.tensor([[0] + [8] * 7], dtype=torch.uint8), 4)
    assert int(zeros - pack_words(torch.ones(1, 8, dtype=torch.uint8), 4)) == 0x7777776F


def test_an_asymmetric_file_with_midpoint_zeros_is_symmetric(tmp_path):
    path = write(tmp_path / "it", module(), {**CONFIG, "sym": False})
    assert_packed(read(path), packed(affine()))


def test_integer_zeros_at_the_midpoint_stay_integer_when_lowbit_wrote_them(tmp_path):
    quantized = samples.quantized(affine(zero=Zero.INTEGER, permutation=True), SHAPE)
    quantized.parts["zeros"][:] = 8
    quantized.parts["group_index"][:] = torch.arange(128) // 32
    value = V2.pack(quantized)
    config = export(tmp_path / "out", {f"{UP}.weight": value})
    assert config["lowbit"] == {UP: ["zeros", "permutation"]}
    assert_packed(read(tmp_path / "out"), value)


def test_symmetric_and_asymmetric_modules_share_one_version(tmp_path):
    values = {
        "model.layers.0.mlp.up_proj.weight": packed(affine()),
        "model.layers.1.mlp.up_proj.weight": packed(affine(), 1),
        "model.layers.2.mlp.up_proj.weight": packed(affine(zero=Zero.INTEGER), 2),
    }
    config = export(tmp_path / "out", values)
    assert (config["checkpoint_format"], config["sym"]) == ("gptq_v2", True)
    assert config["dynamic"] == {
        r"+:^model\.layers\.2\.mlp\.up_proj$": {"bits": 4, "group_size": 32, "desc_act": False, "sym": False}
    }
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert set(stored[f"{UP}.qzeros"].unique().tolist()) == {0x88888888 - (1 << 32)}
    for name, value in values.items():
        assert_packed(read(tmp_path / "out", name), value)


def test_the_config_has_every_key_that_loaders_ask_for(tmp_path):
    values = {
        "model.embed_tokens.weight": torch.ones(8, 128),
        **{f"model.layers.{layer}.mlp.{name}.weight": packed(affine()) for layer in range(2) for name in ("up_proj",)},
        **{f"model.layers.{layer}.mlp.gate.weight": torch.ones(4, 128) for layer in range(2)},
        "lm_head.weight": packed(affine(), 3),
    }
    config = export(tmp_path / "out", values, {"model_type": "llama", "dtype": "bfloat16"})
    meta = config.pop("meta")
    assert meta["quantizer"][0].startswith("lowbit:")
    assert config == {
        **CONFIG,
        "lm_head": True,
        "checkpoint_format": "gptq",
        "format": "gptq",
        "pack_dtype": "int32",
        "true_sequential": True,
        "damp_percent": 0.01,
        "dynamic": {r"-:^model\.layers\.\d+\.mlp\.gate$": {}},
        "modules_in_block_to_quantize": [["mlp.up_proj"]],
    }
    whole = json.loads((tmp_path / "out" / "config.json").read_text())
    assert whole["dtype"] == "float16"  # loaders cast scales to the model's dtype
    copy = json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    assert copy == {**config, "meta": meta}
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(stored[f"{UP}.g_idx"], (torch.arange(128) // 32).int())


def test_overrides_are_matched_in_their_order(tmp_path):
    names = [f"model.layers.{layer}.mlp.up_proj" for layer in range(3)]
    schemes = [affine(8, None), affine(3, 64), affine()]
    tensors = {}
    for seed, (name, scheme) in enumerate(zip(names, schemes, strict=True)):
        tensors |= module(scheme, seed, name)
    dynamic = {
        r".*\.0\.mlp": {"bits": 8, "group_size": -1},
        r"+:.*\.[01]\.mlp.*": {"bits": 3, "group_size": 64},
        r"-:.*down.*": {},
    }
    path = write(tmp_path / "it", tensors, {**CONFIG, "dynamic": dynamic})
    for seed, (name, scheme) in enumerate(zip(names, schemes, strict=True)):
        assert_packed(read(path, f"{name}.weight"), packed(scheme, seed))
    dynamic = {"-:.*up_proj": {}, **dynamic}
    with pytest.raises(CheckpointError, match=r"up_proj is quantized, but .* leaves it out by dynamic '-:\.\*up_proj'"):
        IMPORTER.open(write(tmp_path / "other", tensors, {**CONFIG, "dynamic": dynamic}))


def test_a_quantize_config_of_its_own_is_enough(tmp_path):
    path = write(tmp_path / "it", module(), {"bits": 4, "group_size": 32, "desc_act": False}, "quantize_config.json")
    assert IMPORTER.why_not(path) is None
    assert_packed(read(path), packed(affine()))
    with IMPORTER.open(path) as checkpoint:
        assert checkpoint.metadata.side_files == ()


def test_without_g_idx_groups_are_in_order(tmp_path):
    assert_packed(read(write(tmp_path / "it", module(g_idx=None))), packed(affine()))


def test_act_order_comes_back_as_a_permutation(tmp_path):
    expected = packed(affine(permutation=True))
    path = write(tmp_path / "it", module(affine(permutation=True)), {**CONFIG, "desc_act": True})
    assert_packed(read(path), expected)


def test_act_order_that_orders_nothing_is_no_permutation(tmp_path):
    assert_packed(read(write(tmp_path / "it", module(), {**CONFIG, "desc_act": True})), packed(affine()))


def _index(column, group):
    index = (torch.arange(128) // 32).int()
    index[column] = group
    return index


NAN = torch.full((4, 32), float("nan"), dtype=torch.float16)


@pytest.mark.parametrize(
    ("changes", "config", "sentence"),
    [
        (
            {"g_idx": _index(5, 3)},
            {},
            f"{UP}.g_idx puts column 5 into group 3, but the quantization_config says desc_act",
        ),
        ({"g_idx": _index(5, 4)}, {"desc_act": True}, f"{UP}.g_idx names group 4, but scales has 4 groups"),
        ({"g_idx": _index(5, -1)}, {"desc_act": True}, f"{UP}.g_idx names group -1"),
        ({"g_idx": torch.zeros(64, dtype=torch.int32)}, {}, f"{UP}.g_idx is int32 [64]"),
        ({"g_idx": None}, {"desc_act": True}, f"{UP} has no g_idx, but the quantization_config says desc_act is true"),
        ({"scales": None}, {}, f"{UP} has qweight, qzeros, g_idx, but no scales"),
        ({"qzeros": None}, {}, f"{UP}.qzeros is missing, but a 32x128 weight"),
        (
            {"scales": torch.ones(4, 32)},
            {},
            f"{UP}.scales must be a 2-D float16 or bfloat16 tensor, got float32 [4, 32]",
        ),
        ({"qweight": torch.ones(16, 32)}, {}, f"{UP}.qweight must be a 2-D int32 tensor"),
        ({"qweight": torch.ones(7, 32, dtype=torch.int32)}, {"bits": 3}, f"{UP}.qweight has shape [7, 32]"),
        ({}, {"group_size": 64}, f"{UP}.scales is float16 [4, 32], but a 32x128 weight of 4 bits and group_size 64"),
        ({}, {"bits": 8}, f"{UP}.scales is float16 [4, 32], but a 32x64 weight of 8 bits"),
        ({}, {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'; lowbit reads gptq and gptq_v2"),
        ({}, {"checkpoint_format": ["gptq"]}, "checkpoint_format ['gptq']"),
        ({}, {"dynamic": {"(": {}}}, "has the pattern '(', which is no regular expression"),
        ({}, {"dynamic": [1]}, "dynamic must map patterns to objects"),
        ({}, {"bits": None}, "must give bits from 2 to 8, got None"),
    ],
)
def test_a_contradiction_is_one_sentence(tmp_path, changes, config, sentence):
    path = write(tmp_path / "it", module(**changes), {**CONFIG, **config})
    with pytest.raises(CheckpointError, match=re.escape(sentence)) as raised:
        IMPORTER.open(path)
    assert "\n" not in str(raised.value)


def test_scales_that_are_not_finite_are_named(tmp_path):
    path = write(tmp_path / "it", module(scales=NAN))
    with IMPORTER.open(path) as checkpoint, pytest.raises(CheckpointError, match=f"{UP}.scales holds NaN or infinity"):
        checkpoint.read(f"{UP}.weight")


def test_a_weight_that_is_there_twice_is_refused(tmp_path):
    path = write(tmp_path / "it", {**module(), f"{UP}.weight": torch.ones(2, 2)})
    with pytest.raises(CheckpointError, match=f"{UP}.weight is there twice, plain and quantized"):
        IMPORTER.open(path)


def test_other_folders_are_left_to_others(tmp_path):
    path = write(tmp_path / "it", module(), {**CONFIG, "quant_method": "awq"})
    assert "quant_method 'awq', not 'gptq'" in IMPORTER.why_not(path)
    with pytest.raises(CheckpointError, match="quant_method 'awq'"):
        IMPORTER.open(path)


def test_the_exporter_refuses_before_work(tmp_path):
    assert "2, 3, 4 or 8 bits, not 5" in EXPORTER.why_not(affine(bits=5), SHAPE)
    entries = {"model.norm.weight": TensorSpec(torch.float32, (4,))}
    with pytest.raises(NoRouteError, match="no weight is quantized; give --quantizer, or choose the format 'hf'"):
        EXPORTER.check(entries, Metadata())
    with pytest.raises(CheckpointError, match=r"experts\.up_proj is quantized, and format 'gptq' quantizes names"):
        EXPORTER.check({"experts.up_proj": packed(affine()).spec}, Metadata())
    both = {f"{UP}.weight": packed(affine()).spec, f"{UP}.scales": TensorSpec(torch.float16, (1,))}
    with pytest.raises(CheckpointError, match=f"{UP}.scales would be in the files twice"):
        EXPORTER.check(both, Metadata())


def test_the_plugin_registers_everything():
    found = registry(gptq)
    assert {"gptq", "gptq_v2"} == set(found.packers)
    assert {"torch-gptq", "torch-gptq_v2"} == set(found.kernels)
    assert {rule.loader for rule in found.exporters["gptq"].loaders()} >= {"vllm", "sglang", "transformers"}
    assert list(found.importers) == ["gptq"]


def test_a_config_without_quantized_tensors_is_refused(tmp_path):
    path = write(tmp_path / "it", {"model.norm.weight": torch.ones(3)})
    with pytest.raises(CheckpointError, match=r"says that it is quantized, but has no tensor \*\.qweight"):
        IMPORTER.open(path)
