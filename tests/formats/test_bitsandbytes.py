"""Format bitsandbytes: nibbles and blocks against a reader written from their description, the JSON, and what is refused."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lowbit.convert import convert
from lowbit.diff import differences
from lowbit.errors import CheckpointError, SchemeError, WeightError
from lowbit.kernels import ReferenceKernel
from lowbit.metadata import Metadata, SideFile
from lowbit.parts import TensorSpec
from lowbit.plan import Target
from lowbit.plugins import registry
from lowbit.scheme import Grid, Outliers, ScaleFormat, Scheme
from lowbit.tensors import PackedTensor, QuantizedTensor
from lowbit.testing import ExporterContract, ImporterContract, KernelContract, PackerContract, Written, samples
from lowbit_formats import bitsandbytes, hf, native, plain
from lowbit_formats.bitsandbytes import STATE, BitsAndBytesExporter, BitsAndBytesImporter
from lowbit_formats.bitsandbytes_layout import BLOCK_SIZES, DOUBLE, SINGLE, TABLES, Bnb4bitPacker

IMPORTER, EXPORTER = BitsAndBytesImporter(), BitsAndBytesExporter()
NF4, FP4 = Bnb4bitPacker("nf4"), Bnb4bitPacker("fp4")
UP = "model.layers.0.mlp.up_proj"
METADATA = Metadata(
    {"model_type": "llama", "torch_dtype": "bfloat16"},
    (SideFile("tokenizer.json", content=b"{}"),),
    {"source": "a test"},
)


def scheme(block=64, scales=SINGLE):
    return Scheme(Grid.CODEBOOK, 4, block, scales=scales, flat=True)


EXAMPLES = [
    (scheme(), (6, 96)),
    (scheme(32), (3, 7)),
    (scheme(64, DOUBLE), (5, 128)),
    (scheme(32, DOUBLE), (300, 32)),
    (scheme(4096), (1, 1)),
]
make_sample = samples.quantized  # before any test replaces it


def sample(packer, block, scales, shape, seed=0):
    return with_table(make_sample(scheme(block, scales), shape, seed), packer)


def with_table(quantized, packer):
    """A layout's codebook is fixed: only tensors that have it can be packed."""
    if quantized.scheme.grid is not Grid.CODEBOOK or quantized.scheme.bits != 4 or quantized.scheme.vector > 1:
        return quantized
    return QuantizedTensor(
        quantized.scheme, quantized.shape, {**quantized.parts, "codebook": packer.table.reshape(16, 1)}
    )


def values():
    return {
        "model.embed_tokens.weight": torch.ones(10, 64, dtype=torch.bfloat16),
        f"{UP}.weight": NF4.pack(sample(NF4, 64, SINGLE, (6, 64), 1)),
        f"{UP}.bias": torch.ones(8, dtype=torch.bfloat16),
        "model.layers.0.mlp.down_proj.weight": NF4.pack(sample(NF4, 32, DOUBLE, (50, 33), 2)),
        "model.layers.1.mlp.up_proj.weight": FP4.pack(sample(FP4, 128, DOUBLE, (5, 77), 3)),
        "model.norm.weight": torch.ones(64, dtype=torch.bfloat16),
    }


def write(path, tensors, metadata=METADATA, **options):
    entries = {
        name: value.spec if isinstance(value, PackedTensor) else TensorSpec.of(value) for name, value in tensors.items()
    }
    EXPORTER.write(path, entries, iter(tensors.items()), metadata, **options)
    return path


def stored(folder):
    return load_file(folder / "model.safetensors")


def change(folder, tensors):
    """Replace or remove (None) stored tensors."""
    found = {**stored(folder), **tensors}
    save_file({name: tensor for name, tensor in found.items() if tensor is not None}, folder / "model.safetensors")


def change_state(folder, name, **fields):
    document = json.loads(bytes(stored(folder)[name].tolist()))
    text = json.dumps({**document, **fields})
    change(folder, {name: torch.tensor(list(text.encode()), dtype=torch.uint8)})


def refusal(folder):
    with pytest.raises(CheckpointError) as caught, IMPORTER.open(folder) as checkpoint:
        dict(checkpoint.stream())
    assert "\n" not in str(caught.value)
    return str(caught.value)


class OneTable:
    """Lets the contract's samples have the packer's codebook."""

    @pytest.fixture(params=[NF4, FP4], ids=lambda packer: packer.layout)
    def packer(self, request):
        return request.param

    @pytest.fixture(autouse=True)
    def fixed_codebook(self, packer, monkeypatch):
        monkeypatch.setattr(samples, "quantized", lambda *args, **how: with_table(make_sample(*args, **how), packer))

    @pytest.fixture
    def examples(self):
        return EXAMPLES


class TestPacker(OneTable, PackerContract):
    pass


class TestKernel(OneTable, KernelContract):
    @pytest.fixture
    def kernel(self, packer):
        return ReferenceKernel(packer)


class TestImporter(ImporterContract):
    @pytest.fixture
    def importer(self):
        return IMPORTER

    @pytest.fixture(params=[1000, 10**9], ids=["shards", "one file"])
    def written(self, request, tmp_path):
        return Written(write(tmp_path / "m", values(), shard_size=request.param), values(), METADATA)


class TestExporter(OneTable, ExporterContract):
    @pytest.fixture
    def exporter(self):
        return EXPORTER

    @pytest.fixture
    def importer(self):
        return IMPORTER

    @pytest.fixture
    def packers(self, packer):
        return [packer]

    @pytest.fixture
    def metadata(self):
        return METADATA


@pytest.mark.parametrize("packer", [NF4, FP4], ids=lambda packer: packer.layout)
@pytest.mark.parametrize("shape", [(4, 64), (3, 7)])
def test_the_even_code_is_in_the_high_nibble(packer, shape):
    quantized = sample(packer, 32, SINGLE, shape)
    found = packer.pack(quantized).buffers["weight"].flatten().tolist()
    nibbles = [nibble for byte in found for nibble in (byte >> 4, byte & 15)]
    count = shape[0] * shape[1]
    assert nibbles[:count] == quantized.parts["codes"].flatten().tolist()
    assert all(packer.table[padding] == 0 for padding in nibbles[count:])


@pytest.mark.parametrize("packer", [NF4, FP4], ids=lambda packer: packer.layout)
def test_weights_are_the_table_times_absmax_of_flat_blocks(packer):
    quantized = sample(packer, 32, SINGLE, (5, 77))
    buffers = {name: buffer.numpy() for name, buffer in packer.pack(quantized).buffers.items()}
    codes = np.stack((buffers["weight"] >> 4, buffers["weight"] & 15), axis=1).flatten()[: 5 * 77]
    expected = buffers["quant_map"][codes] * buffers["absmax"].repeat(32)[: 5 * 77]
    assert np.array_equal(ReferenceKernel(packer).dequantize(packer.pack(quantized)).flatten().numpy(), expected)


def test_double_quantization_decodes_absmax_first():
    quantized = sample(NF4, 32, DOUBLE, (300, 33))
    packed = NF4.pack(quantized)
    buffers = {name: buffer.numpy() for name, buffer in packed.buffers.items()}
    assert len(buffers["absmax"]) == 310  # ceil(9900 / 32), in two nested blocks
    assert len(buffers["nested_absmax"]) == 2
    nested = buffers["nested_absmax"].repeat(256)[:310]
    absmax = buffers["nested_quant_map"][buffers["absmax"]] * nested + buffers["nested_offset"]
    codes = np.stack((buffers["weight"] >> 4, buffers["weight"] & 15), axis=1).flatten()
    expected = buffers["quant_map"][codes] * absmax.repeat(32)[:9900]
    assert np.array_equal(ReferenceKernel(NF4).dequantize(packed).flatten().numpy(), expected)


def test_fp4_is_a_sign_two_bits_of_exponent_and_one_of_mantissa():
    normal = [(1 + (code & 1) / 2) * 2.0 ** {0: 0, 1: 3, 2: 2, 3: 1}[code >> 1] for code in range(2, 8)]
    expected = torch.tensor([0, 0.0625, *normal]) / 12
    assert torch.equal(TABLES["fp4"], torch.cat((expected, -expected)))


def test_the_files_are_those_of_bitsandbytes(tmp_path):
    folder = write(tmp_path / "m", values())
    down = "model.layers.0.mlp.down_proj"
    names = {name.removeprefix(f"{down}.") for name in stored(folder) if name.startswith(down)}
    inner = {f"weight.{name}" for name in ("absmax", "quant_map", "nested_absmax", "nested_quant_map")}
    assert names == {"weight", f"{STATE}nf4", *inner}
    document = json.loads(bytes(stored(folder)[f"{down}.{STATE}nf4"].tolist()))
    offset = document.pop("nested_offset")
    assert offset == float(values()[f"{down}.weight"].buffers["nested_offset"])
    assert document == {
        "quant_type": "nf4",
        "blocksize": 32,
        "dtype": "bfloat16",
        "shape": [50, 33],
        "nested_blocksize": 256,
        "nested_dtype": "float32",
    }


def test_the_config_is_that_of_transformers(tmp_path):
    said = json.loads((write(tmp_path / "m", values()) / "config.json").read_text())["quantization_config"]
    assert said["quant_method"] == "bitsandbytes"
    assert said["load_in_4bit"] is True
    assert said["bnb_4bit_quant_type"] == "nf4"
    assert said["bnb_4bit_use_double_quant"] is False
    assert said["bnb_4bit_compute_dtype"] == "bfloat16"
    assert said["llm_int8_skip_modules"] == ["model.embed_tokens", "lm_head"]


def test_a_model_without_a_dtype_is_computed_in_float32(tmp_path):
    only = {f"{UP}.weight": values()[f"{UP}.weight"]}
    folder = write(tmp_path / "m", only, Metadata({"model_type": "llama"}))
    assert (
        json.loads((folder / "config.json").read_text())["quantization_config"]["bnb_4bit_compute_dtype"] == "float32"
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8])
def test_weights_stored_as_another_dtype_are_the_same_bytes(tmp_path, dtype):
    folder = write(tmp_path / "m", values())
    column = stored(folder)[f"{UP}.weight"].flatten().view(dtype)[:, None]
    change(folder, {f"{UP}.weight": column})
    with IMPORTER.open(folder) as checkpoint:
        assert torch.equal(
            checkpoint.read(f"{UP}.weight").buffers["weight"], values()[f"{UP}.weight"].buffers["weight"]
        )


def test_a_table_that_was_rounded_is_replaced_by_bitsandbytes_own(tmp_path):
    folder = write(tmp_path / "m", values())
    change(folder, {f"{UP}.weight.quant_map": TABLES["nf4"] + 1e-7})
    with IMPORTER.open(folder) as checkpoint:
        assert torch.equal(checkpoint.read(f"{UP}.weight").buffers["quant_map"], TABLES["nf4"])


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"quant_type": "fp4"}, "says quant_type 'fp4'"),
        ({"blocksize": 0}, "blocksize must be a positive integer, got 0"),
        ({"blocksize": True}, "blocksize must be a positive integer, got True"),
        ({"blocksize": 48}, "blocks of 32, 64"),
        ({"blocksize": 32}, "absmax is float32 [6]"),
        ({"shape": [2, 3, 64]}, "shape [2, 3, 64]"),
        ({"shape": None}, "shape None"),
        ({"shape": [6, 66]}, "absmax is float32 [6]"),
        ({"shape": [8, 44]}, "weight is uint8 [192, 1]"),
        ({"nested_blocksize": 256}, "nested_offset must be a finite number, got None"),
        ({"nested_blocksize": 256, "nested_offset": float("nan")}, "nested_offset must be a finite number, got nan"),
        ({"nested_blocksize": 256, "nested_offset": 10**400}, "nested_offset must be a finite number, got 1000"),
        ({"nested_blocksize": 128, "nested_offset": 0.5}, "for every 256 of them"),
        ({"nested_blocksize": 256, "nested_offset": 0.5}, "nested_quant_map is missing"),
    ],
)
def test_a_quant_state_that_makes_no_sense_is_refused_by_name(tmp_path, fields, reason):
    folder = write(tmp_path / "m", values())
    change_state(folder, f"{UP}.{STATE}nf4", **fields)
    message = refusal(folder)
    assert UP in message
    assert reason in message


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({f"{UP}.{STATE}nf4": None}, "no weight.quant_state"),
        ({f"{UP}.{STATE}nf4": torch.zeros(3, dtype=torch.uint8)}, "is no valid JSON"),
        ({f"{UP}.{STATE}nf4": torch.zeros(3)}, "must hold JSON in uint8"),
        ({f"{UP}.weight": None}, "no weight"),
        ({f"{UP}.weight.quant_map": None}, "up_proj.weight.quant_map is not; the checkpoint is incomplete"),
        ({f"{UP}.weight.nested_absmax": torch.ones(1)}, "knows no double quantization"),
        ({f"{UP}.weight": torch.zeros(96, 1, dtype=torch.int16)}, "weight is int16 [96, 1]"),
        ({f"{UP}.weight.absmax": None}, "absmax is missing"),
        ({f"{UP}.weight.absmax": torch.full((6,), torch.nan)}, "absmax holds NaN or infinity"),
        ({f"{UP}.weight.quant_map": torch.arange(16.0)}, "is not the table of its quant_type"),
        ({f"{UP}.weight.quant_map": torch.arange(15.0)}, "quant_map is float32 [15]"),
    ],
)
def test_tensors_that_make_no_weight_are_refused_by_name(tmp_path, tensors, reason):
    folder = write(tmp_path / "m", values())
    change(folder, tensors)
    message = refusal(folder)
    assert UP in message
    assert reason in message


def test_eight_bit_checkpoints_are_refused_by_name(tmp_path):
    folder = write(tmp_path / "m", values())
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= {"load_in_8bit": True, "load_in_4bit": False}
    (folder / "config.json").write_text(json.dumps(config))
    assert "LLM.int8" in refusal(folder)


@pytest.mark.parametrize(
    ("other", "shape", "reason"),
    [
        (Scheme(Grid.AFFINE, 4, 64), (4, 64), "4-bit codebooks"),
        (Scheme(Grid.CODEBOOK, 3, 64, scales=SINGLE, flat=True), (4, 64), "4-bit codebooks"),
        (Scheme(Grid.CODEBOOK, 4, 64, scales=SINGLE), (4, 64), "not row groups of 64"),
        (scheme(16), (4, 64), "not flat groups of 16"),
        (scheme(64, ScaleFormat("float16")), (4, 64), "not as float16"),
        (scheme(64, ScaleFormat("float32", bits=8, super_group=64)), (4, 64), "8-bit linear codes of 64 groups"),
        (Scheme(Grid.CODEBOOK, 4, 64, scales=SINGLE, flat=True, outliers=Outliers(0.1)), (4, 64), "no add-ons"),
        (scheme(), (0, 64), "rows and columns"),
    ],
)
def test_what_bitsandbytes_cannot_hold_is_refused_with_a_reason(other, shape, reason):
    assert reason in NF4.why_not(other, shape)


@pytest.mark.parametrize("block", BLOCK_SIZES)
def test_every_block_size_is_held(block):
    assert NF4.why_not(scheme(block), (64, 64)) is None


def test_another_codebook_and_a_code_too_large_are_refused():
    quantized = sample(NF4, 64, SINGLE, (4, 64))
    with pytest.raises(SchemeError, match="fixed codebook, FP4"):
        FP4.pack(quantized)
    quantized.parts["codes"][1, 2] = 16
    with pytest.raises(WeightError, match="a code is 16"):
        NF4.pack(quantized)


def test_to_native_and_back_is_exact(tmp_path):
    components = registry(plain, native, hf, bitsandbytes)
    source = write(tmp_path / "bnb", values())
    assert convert(source, tmp_path / "native", Target("native"), components).error.exact
    assert convert(tmp_path / "native", tmp_path / "back", Target("bitsandbytes"), components).error.exact
    with components.open(source) as first, components.open(tmp_path / "back") as second:
        assert all(difference.exact for difference in differences(first, second, components))
    assert stored(source).keys() == stored(tmp_path / "back").keys()
    assert all(torch.equal(tensor, stored(tmp_path / "back")[name]) for name, tensor in stored(source).items())
