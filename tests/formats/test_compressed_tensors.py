"""Format compressed-tensors: dense and padded streams, groups and channels, config groups, ignore lists, and refusals."""

import json
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lowbit import Grid, Metadata, PackedTensor, ReferenceKernel, ScaleFormat, Scheme, TensorSpec, Zero
from lowbit.errors import CheckpointError
from lowbit.plugins import registry
from lowbit.tensors import bit_equal
from lowbit.testing import ExporterContract, ImporterContract, KernelContract, PackerContract, Written, samples
from lowbit_formats import compressed_tensors
from lowbit_formats.compressed_tensors import CtExporter, CtImporter
from lowbit_formats.ct_config import build_config, read_groups
from lowbit_formats.ct_layout import CtPacker, padded_width

IMPORTER, EXPORTER, PACKER = CtImporter(), CtExporter(), CtPacker()
UP = "model.layers.0.mlp.up_proj"
SHAPE = (20, 96)
COMMON = {"quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed"}


def affine(bits=4, group_size=32, zero=Zero.SYMMETRIC, **fields):
    return Scheme(Grid.AFFINE, bits, group_size, zero, **fields)


EXAMPLES = [
    affine(bits, group_size, zero, scales=ScaleFormat(dtype))
    for bits, group_size, dtype in [
        (2, 32, "float16"),
        (3, None, "bfloat16"),
        (4, 32, "bfloat16"),
        (5, 96, "float32"),
        (6, None, "float16"),
        (7, 48, "float16"),
        (8, 32, "float16"),
    ]
    for zero in (Zero.SYMMETRIC, Zero.INTEGER)
]


def packed(scheme, seed=0, shape=SHAPE):
    return PACKER.pack(samples.quantized(scheme, shape, seed))


def said(scheme, **fields):
    """The weights of a config group."""
    strategy = {"strategy": "group"} if scheme.group_size else {"strategy": "channel"}
    common = {"num_bits": scheme.bits, "type": "int", "symmetric": scheme.symmetric, "dynamic": False}
    return {**common, **strategy, "group_size": scheme.group_size, **fields}


def config(scheme=None, targets=("Linear",), ignore=("lm_head",), group=None, **fields):
    groups = {"group_0": {"targets": list(targets), "weights": said(scheme or affine()), **(group or {})}}
    return {**COMMON, "ignore": list(ignore), "config_groups": groups, **fields}


def write(path, tensors, quantization):
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": quantization}))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")
    return path


def module(scheme=None, seed=0, name=UP, **changes):
    buffers = {**packed(scheme or affine(), seed).buffers, **changes}
    return {f"{name}.{suffix}": tensor for suffix, tensor in buffers.items() if tensor is not None}


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


class TestPacker(PackerContract):
    @pytest.fixture
    def packer(self):
        return PACKER

    @pytest.fixture
    def examples(self):
        permuted = affine(zero=Zero.INTEGER, permutation=True)
        return [(scheme, SHAPE) for scheme in (*EXAMPLES, permuted)]


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
        """Shapes whose tensors are whole eights of bytes: behind others, weight_shape is aligned by moving it forward."""
        plain = {"model.embed_tokens.weight": torch.ones(40, 96).bfloat16(), "model.norm.weight": torch.ones(96)}
        zeros = (Zero.SYMMETRIC, Zero.INTEGER)
        schemes = [affine(bits, 32 if bits % 2 else None, zero) for bits in range(2, 9) for zero in zeros]
        names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(len(schemes))]
        values = {name: packed(scheme, 1, (64, 128)) for name, scheme in zip(names, schemes, strict=True)}
        return {**plain, **values, "model.layers.0.mlp.gate.weight": torch.ones(4, 96)}


class TestImporter(ImporterContract):
    @pytest.fixture
    def importer(self):
        return IMPORTER

    @pytest.fixture
    def written(self, tmp_path):
        values = {
            f"{UP}.weight": packed(affine(3, 96, Zero.INTEGER)),
            "model.norm.weight": torch.ones(6),
            "model.layers.1.mlp.up_proj.weight": packed(affine(8, None), 1),
        }
        export(tmp_path / "out", values)
        return Written(tmp_path / "out", values, Metadata({"model_type": "llama"}))


@given(st.sampled_from(EXAMPLES), st.integers(1, 40), st.integers(1, 100), st.integers(0, 999))
@settings(deadline=None, max_examples=60)
def test_every_shape_round_trips(scheme, rows, columns, seed):
    quantized = samples.quantized(scheme, (rows, columns), seed, "bits")
    back = PACKER.unpack(PACKER.pack(quantized))
    assert all(bit_equal(back.parts[name], part) for name, part in quantized.parts.items())


def _padded(codes, bits):
    """One row of codes, floor(32 / bits) to a word: the packing before compressed-tensors 0.20, from its definition."""
    per_word = 32 // bits
    words = [0] * padded_width(len(codes), bits)
    for place, code in enumerate(codes.tolist()):
        words[place // per_word] |= code << bits * (place % per_word)
    return torch.tensor([word - (1 << 32) if word >> 31 else word for word in words], dtype=torch.int32)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("zero", [Zero.SYMMETRIC, Zero.INTEGER])
def test_padded_files_are_read_as_dense_ones(tmp_path, bits, zero):
    scheme, shape = affine(bits, 32, zero), (40, 96)
    quantized = samples.quantized(scheme, shape)
    changes = {"weight_packed": torch.stack([_padded(row, bits) for row in quantized.parts["codes"]])}
    if zero is Zero.INTEGER:
        columns = quantized.parts["zeros"].T
        changes["weight_zero_point"] = torch.stack([_padded(column, bits) for column in columns], dim=1)
    expected = PACKER.pack(quantized)
    tensors = {f"{UP}.{suffix}": tensor for suffix, tensor in {**expected.buffers, **changes}.items()}
    path = write(tmp_path / "it", tensors, config(scheme))
    assert_packed(read(path), expected)
    with IMPORTER.open(path) as checkpoint:
        noticed = checkpoint.metadata.provenance.get("compressed_tensors_packing")
        assert noticed == (None if bits in (2, 4, 8) else "1 modules were padded")


def test_the_config_of_one_setting_targets_linears(tmp_path):
    values = {
        "model.embed_tokens.weight": torch.ones(8, 96),
        **{f"model.layers.{layer}.mlp.up_proj.weight": packed(affine(zero=Zero.INTEGER)) for layer in range(2)},
        **{f"model.layers.{layer}.mlp.gate.weight": torch.ones(4, 96) for layer in range(2)},
    }
    found = export(tmp_path / "out", values, {"torch_dtype": "bfloat16"})
    group = {
        "targets": ["Linear"],
        "weights": said(affine(zero=Zero.INTEGER)),
        "input_activations": None,
        "output_activations": None,
        "format": "pack-quantized",
    }
    assert found == {
        **COMMON,
        "ignore": ["model.embed_tokens", r"re:^model\.layers\.\d+\.mlp\.gate$", "lm_head"],
        "config_groups": {"group_0": group},
    }
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored[f"{UP}.weight_shape"].tolist() == [20, 96]
    assert stored[f"{UP}.weight_shape"].dtype is torch.int64


def test_several_settings_target_names_which_read_back(tmp_path):
    values = {}
    for layer in range(3):
        values[f"model.layers.{layer}.mlp.up_proj.weight"] = packed(affine(), layer)
        values[f"model.layers.{layer}.mlp.down_proj.weight"] = packed(affine(8, None) if layer else affine(), 7 + layer)
    found = export(tmp_path / "out", values)
    groups = [(group["targets"], group["weights"]["num_bits"]) for group in found["config_groups"].values()]
    assert groups == [
        ([r"re:^model\.layers\.\d+\.mlp\.up_proj$", "model.layers.0.mlp.down_proj"], 4),
        (["model.layers.1.mlp.down_proj", "model.layers.2.mlp.down_proj"], 8),
    ]
    for name, value in values.items():
        assert_packed(read(tmp_path / "out", name), value)


def test_a_quantized_lm_head_is_a_target_and_not_ignored():
    """vLLM's lm_head is no Linear, so its name must be a target."""
    found = build_config({UP: packed(affine()).spec, "lm_head": packed(affine()).spec}, [])
    assert found["config_groups"]["group_0"]["targets"] == ["Linear", "lm_head"]
    assert found["ignore"] == []


def test_names_decide_before_expressions_and_these_before_classes():
    groups = {
        "a": {"targets": ["Linear"], "weights": said(affine(2))},
        "b": {"targets": ["re:.*up_proj"], "weights": said(affine(3))},
        "c": {"targets": [UP], "weights": said(affine(5))},
    }
    settings_of = read_groups({"format": "pack-quantized", "config_groups": groups, "ignore": ["re:.*gate"]}, "it")
    assert settings_of.setting(UP).bits == 5
    assert settings_of.setting("model.layers.1.mlp.up_proj").bits == 3
    assert settings_of.setting("model.layers.1.mlp.down_proj").bits == 2
    with pytest.raises(CheckpointError, match=r"x\.gate is quantized, but it ignores 're:\.\*gate'"):
        settings_of.setting("x.gate")


def test_strategies_left_out_follow_from_the_group_size():
    weights = {"num_bits": 4, "type": "int", "symmetric": True}
    for size, expected in ((32, 32), (-1, None)):
        groups = {"a": {"targets": ["Linear"], "weights": {**weights, "group_size": size}}}
        found = read_groups({"format": "pack-quantized", "config_groups": groups}, "it")
        assert found.setting(UP).group_size == expected


def test_act_order_of_old_files_is_a_permutation(tmp_path):
    scheme = affine(zero=Zero.INTEGER, permutation=True)
    path = write(tmp_path / "it", module(scheme), config(affine(zero=Zero.INTEGER)))
    assert_packed(read(path), packed(scheme))
    sequential = (torch.arange(96) // 32).int()
    path = write(tmp_path / "other", module(weight_g_idx=sequential), config())
    assert_packed(read(path), packed(affine()))
    assert "no act-order since August 2026" in EXPORTER.why_not(scheme, SHAPE)


def test_partial_groups_are_refused():
    assert "64 does not divide in_features 96" in EXPORTER.why_not(affine(group_size=64), SHAPE)


def test_an_int32_weight_shape_is_read(tmp_path):
    path = write(tmp_path / "it", module(weight_shape=torch.tensor(SHAPE, dtype=torch.int32)), config())
    assert_packed(read(path), packed(affine()))


@pytest.mark.parametrize(
    ("changes", "quantization", "sentence"),
    [
        ({"weight_shape": None}, {}, f"{UP}.weight_shape is missing, but pack-quantized needs int64 [2]"),
        ({"weight_shape": torch.tensor([20, 0])}, {}, f"{UP}.weight_shape is [20, 0]; both must be positive"),
        ({"weight_shape": torch.tensor([20, 64])}, {}, f"{UP}.weight_packed is int32 [20, 12], but a 20x64 weight"),
        ({"weight_scale": torch.ones(20, 1)}, {}, f"{UP}.weight_scale is float32 [20, 1], but a 20x96 weight"),
        ({"weight_scale": torch.ones(20, 3, dtype=torch.int8)}, {}, f"{UP}.weight_scale must be a 2-D float16 or"),
        ({"weight_scale": None}, {}, f"{UP} has weight_packed, weight_shape, but no weight_scale"),
        (
            {"weight_zero_point": torch.ones(3, 3, dtype=torch.int32)},
            {},
            f"{UP}.weight_zero_point is there, but the config says symmetric is true",
        ),
        ({}, {"scheme": affine(zero=Zero.INTEGER)}, f"{UP}.weight_zero_point is missing"),
        ({}, {"scheme": affine(8)}, f"{UP}.weight_packed is int32 [20, 12], but a 20x96 weight of 8 bits"),
        ({"weight_g_idx": torch.full((96,), 3, dtype=torch.int32)}, {}, f"{UP}.weight_g_idx names group 3 of 3"),
        ({}, {"targets": ("re:.*down_proj",)}, f"{UP} is quantized, but no config group of"),
        ({}, {"ignore": (UP,)}, f"{UP} is quantized, but the quantization_config of"),
        ({}, {"targets": ("re:(",)}, "has the pattern '(', which is no regular expression"),
        ({}, {"format": "float-quantized"}, "has format 'float-quantized'; lowbit reads integer weights packed"),
        ({}, {"group": {"format": "nvfp4-pack-quantized"}}, "has format 'nvfp4-pack-quantized'"),
        ({}, {"group": {"input_activations": {"num_bits": 8}}}, "has input_activations {'num_bits': 8}"),
        ({}, {"group": {"weights": None}}, "must quantize weights, got weights None"),
        ({}, {"group": {"weights": said(affine(), strategy="tensor")}}, "has strategy 'tensor'"),
        ({}, {"group": {"weights": said(affine(), type="float")}}, "has type 'float'"),
        ({}, {"group": {"targets": "Linear"}}, "must be a list of names, got 'Linear'"),
        ({}, {"kv_cache_scheme": {"num_bits": 8}}, "has a kv_cache_scheme, which lowbit would lose"),
        ({}, {"config_groups": []}, "must have config_groups, an object of objects, got []"),
    ],
)
def test_a_contradiction_is_one_sentence(tmp_path, changes, quantization, sentence):
    path = write(tmp_path / "it", module(**changes), config(**quantization))
    with pytest.raises(CheckpointError, match=re.escape(sentence)) as raised:
        IMPORTER.open(path)
    assert "\n" not in str(raised.value)


def test_scales_that_are_not_finite_are_named(tmp_path):
    scales = torch.full((20, 3), float("nan"), dtype=torch.float16)
    path = write(tmp_path / "it", module(weight_scale=scales), config())
    with IMPORTER.open(path) as checkpoint, pytest.raises(CheckpointError, match=f"{UP}.weight_scale holds NaN"):
        checkpoint.read(f"{UP}.weight")


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        (affine(1), "codes of 2, 3, 4, 5, 6, 7, 8 bits, not 1"),
        (affine(zero=Zero.MINIMUM), "has symmetric or integer zeros, not minimum ones"),
        (Scheme(Grid.CODEBOOK, 4, 32), "holds affine codes, not codebook ones"),
        (affine(scales=ScaleFormat("float8_e4m3fn")), "float16 or bfloat16 or float32 scales, not float8_e4m3fn"),
    ],
)
def test_the_layout_refuses_with_a_reason(scheme, reason):
    assert reason in PACKER.why_not(scheme, SHAPE)


def test_the_plugin_registers_everything():
    found = registry(compressed_tensors)
    assert list(found.packers) == ["ct-pack"]
    assert list(found.kernels) == ["torch-ct-pack"]
    assert (list(found.importers), list(found.exporters)) == (["compressed-tensors"], ["compressed-tensors"])
