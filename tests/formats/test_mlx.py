"""Format mlx: MLX's layout against a reader written from its description, the settings of modules, and exact transcoding."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lowbit.convert import convert
from lowbit.errors import CheckpointError, NoRouteError
from lowbit.grids import dequantize
from lowbit.kernels import ReferenceKernel
from lowbit.metadata import Metadata, SideFile
from lowbit.parts import TensorSpec
from lowbit.plan import Target
from lowbit.plugins import registry
from lowbit.scheme import Grid, ScaleFormat, Scheme, Zero
from lowbit.tensors import PackedTensor
from lowbit.testing import ExporterContract, ImporterContract, KernelContract, PackerContract, Written, samples
from lowbit_formats import hf, mlx, native, plain
from lowbit_formats.mlx import MlxExporter, MlxImporter
from lowbit_formats.mlx_layout import BITS, GROUP_SIZES, MlxPacker, mlx_scheme
from lowbit_formats.native import NativeExporter
from lowbit_formats.plain import PlainPacker

IMPORTER, EXPORTER, PACKER = MlxImporter(), MlxExporter(), MlxPacker()
EXAMPLES = [
    (mlx_scheme(bits, group, dtype), (3, 2 * group))
    for bits, group, dtype in zip(
        BITS, (*GROUP_SIZES, *GROUP_SIZES), ("float16", "bfloat16", "float32") * 2, strict=True
    )
]
UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"
METADATA = Metadata(
    {"model_type": "llama", "torch_dtype": "float16"},
    (SideFile("tokenizer.json", content=b"{}"),),
    {"source": "a test"},
)


def packed(bits, group_size, shape, seed=0, dtype="float16"):
    return PACKER.pack(samples.quantized(mlx_scheme(bits, group_size, dtype), shape, seed))


def values():
    return {
        "model.embed_tokens.weight": packed(4, 64, (10, 128), 1),
        f"{UP}.weight": packed(4, 64, (6, 64), 2),
        f"{UP}.bias": torch.ones(6, dtype=torch.float16),
        f"{DOWN}.weight": packed(3, 32, (4, 96), 3),
        "model.norm.weight": torch.ones(64, dtype=torch.float16),
    }


def write(path, tensors, metadata=METADATA, exporter=EXPORTER, **options):
    entries = {
        name: value.spec if isinstance(value, PackedTensor) else TensorSpec.of(value) for name, value in tensors.items()
    }
    exporter.write(path, entries, iter(tensors.items()), metadata, **options)
    return path


def change_config(folder, **changes):
    """Replace fields of both copies of the settings; None removes one."""
    config = json.loads((folder / "config.json").read_text())
    for key in ("quantization", "quantization_config"):
        for field, value in changes.items():
            config[key].pop(field, None)
            if value is not None:
                config[key][field] = value
    (folder / "config.json").write_text(json.dumps(config))


def change_tensors(folder, **changes):
    """Replace or remove (None) stored tensors; dots are written as two underscores."""
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        tensors.pop(name.replace("__", "."), None)
        if tensor is not None:
            tensors[name.replace("__", ".")] = tensor
    save_file(tensors, folder / "model.safetensors")


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
        return EXAMPLES[:3]


class TestImporter(ImporterContract):
    @pytest.fixture
    def importer(self):
        return IMPORTER

    @pytest.fixture(params=[1000, 10**9], ids=["shards", "one file"])
    def written(self, request, tmp_path):
        return Written(write(tmp_path / "m", values(), shard_size=request.param), values(), METADATA)


class TestExporter(ExporterContract):
    @pytest.fixture
    def exporter(self):
        return EXPORTER

    @pytest.fixture
    def importer(self):
        return IMPORTER

    @pytest.fixture
    def packers(self):
        return [PACKER]

    @pytest.fixture
    def metadata(self):
        return METADATA


@pytest.mark.parametrize("bits", BITS)
def test_code_i_is_at_bit_k_i_of_the_row(bits):
    quantized = samples.quantized(mlx_scheme(bits, 32), (4, 96), bits)
    words = PACKER.pack(quantized).buffers["weight"].numpy()
    assert words.dtype == np.uint32
    for row, codes in zip(words, quantized.parts["codes"].tolist(), strict=True):
        stream = sum(int(word) << 32 * place for place, word in enumerate(row))
        assert [stream >> bits * i & (1 << bits) - 1 for i in range(96)] == codes


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_weight_is_scale_times_code_plus_bias(dtype):
    quantized = samples.quantized(mlx_scheme(5, 64, dtype), (3, 128))
    codes, scales, biases = (quantized.parts[name].float().numpy() for name in ("codes", "scales", "minimums"))
    expected = codes * scales.repeat(64, axis=1) + biases.repeat(64, axis=1)
    assert np.array_equal(ReferenceKernel(PACKER).dequantize(PACKER.pack(quantized)).numpy(), expected)


def test_the_config_says_the_usual_setting_and_the_exceptions(tmp_path):
    config = json.loads((write(tmp_path / "m", values()) / "config.json").read_text())
    said = {"group_size": 64, "bits": 4, "mode": "affine", DOWN: {"group_size": 32, "bits": 3, "mode": "affine"}}
    assert config["quantization"] == config["quantization_config"] == said
    assert set(load_file(tmp_path / "m" / "model.safetensors")) >= {f"{UP}.weight", f"{UP}.scales", f"{UP}.biases"}


def test_a_config_of_old_versions_has_one_key_and_no_mode(tmp_path):
    folder = write(tmp_path / "m", values())
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"], config["quantization"]["mode"]
    config["quantization"] |= {"model.norm": False, "lm_head": False}
    (folder / "config.json").write_text(json.dumps(config))
    with IMPORTER.open(folder) as checkpoint:
        assert checkpoint.metadata.config == METADATA.config
        assert checkpoint.entries[f"{DOWN}.weight"].scheme == mlx_scheme(3, 32)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"mode": "mxfp4"}, "mode 'mxfp4'"),
        ({"bits": 3}, r"embed_tokens.weight is uint32 \[10, 16\], but 3 bits and groups of 64"),
        ({"bits": 7}, "MLX has codes of 2, 3, 4, 5, 6, 8 bits, not 7"),
        ({"bits": "4"}, "bits from 2 to 8, got '4'"),
        ({"group_size": 48}, "groups of 32, 64, 128 weights, not of 48"),
        ({"group_size": -1}, "group_size -1"),
        ({DOWN: {"bits": 3, "group_size": 64}}, r"down_proj.weight is uint32 \[4, 9\]"),
        ({DOWN: {"bits": 3}}, f"{DOWN} in the quantization_config of .* positive group_size"),
    ],
)
def test_settings_that_contradict_the_tensors_are_refused(tmp_path, changes, reason):
    folder = write(tmp_path / "m", values())
    change_config(folder, **changes)
    with pytest.raises(CheckpointError, match=reason):
        IMPORTER.open(folder)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({f"{UP}.biases": None}, "biases is missing"),
        ({f"{UP}.scales": None}, "up_proj.scales is not; the checkpoint is incomplete"),
        ({f"{UP}.weight": None}, "weight is missing"),
        ({f"{UP}.biases": torch.ones(6, 1)}, r"biases is float32 \[6, 1\]"),
        (
            {f"{UP}.scales": torch.ones(6, 1, dtype=torch.int32)},
            "scales must be a 2-D float16 or bfloat16 or float32 tensor",
        ),
        ({f"{UP}.scales": torch.ones(2, 6, 1, dtype=torch.float16)}, "scales must be a 2-D"),
        ({f"{UP}.scales": torch.full((6, 1), torch.inf, dtype=torch.float16)}, "scales holds NaN or infinity"),
        ({f"{UP}.biases": torch.full((6, 1), torch.nan, dtype=torch.float16)}, "biases holds NaN or infinity"),
    ],
)
def test_tensors_that_make_no_weight_are_refused_by_name(tmp_path, changes, reason):
    folder = write(tmp_path / "m", values())
    change_tensors(folder, **changes)
    message = refusal(folder)
    assert UP in message
    assert reason.replace("\\", "") in message


@pytest.mark.parametrize(
    ("scheme", "shape", "reason"),
    [
        (Scheme(Grid.AFFINE, 4, 64), (4, 64), "minimum zeros, not symmetric"),
        (Scheme(Grid.CODEBOOK, 4, 64), (4, 64), "affine codes, not codebook"),
        (mlx_scheme(7, 64), (4, 64), "not 7"),
        (mlx_scheme(4, 16), (4, 64), "not of 16"),
        (mlx_scheme(4, 64), (4, 96), "64 does not divide in_features 96"),
        (Scheme(Grid.AFFINE, 4, 32, Zero.MINIMUM, ScaleFormat(bits=6, super_group=8)), (4, 256), "two levels"),
    ],
)
def test_what_mlx_cannot_hold_is_refused_with_a_reason(scheme, shape, reason):
    assert reason in PACKER.why_not(scheme, shape)


def test_a_packed_tensor_of_another_layout_is_refused_before_work(tmp_path):
    quantized = samples.quantized(mlx_scheme(4, 64), (4, 64))
    with pytest.raises(NoRouteError, match=r"layout"):
        write(tmp_path / "m", {"a.weight": PlainPacker().pack(quantized)})
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_symmetric_weights_become_mlx_exactly(tmp_path, bits):
    components = registry(plain, native, hf, mlx)
    quantized = samples.quantized(Scheme(Grid.AFFINE, bits, 128), (8, 256), bits)
    source = write(tmp_path / "native", {f"{UP}.weight": PlainPacker().pack(quantized)}, exporter=NativeExporter())
    report = convert(source, tmp_path / "mlx", Target("mlx"), components)
    assert report.error.exact
    with components.open(tmp_path / "mlx") as checkpoint:
        entry = checkpoint.entries[f"{UP}.weight"]
        assert entry.scheme == mlx_scheme(bits, 128)
        found = checkpoint.read(f"{UP}.weight")
    assert torch.equal(dequantize(PACKER.unpack(found)), dequantize(quantized))


def test_the_hf_importer_leaves_mlx_folders_alone(tmp_path):
    components = registry(hf, mlx)
    with components.open(write(tmp_path / "m", values())) as checkpoint:
        assert checkpoint.entries[f"{UP}.weight"].layout == "mlx-affine"
    assert hf.HfImporter().why_not(tmp_path / "m") is not None
