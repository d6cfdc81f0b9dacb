"""compressed-tensors' own compressor and decompressor, its config classes, and transformers loading what lowbit writes."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file

from lowbit import Grid, Metadata, PackedTensor, ScaleFormat, Scheme, TensorSpec, Zero, dequantize
from lowbit.tensors import bit_equal
from lowbit.testing import samples
from lowbit_formats.compressed_tensors import CtExporter, CtImporter
from lowbit_formats.ct_layout import CtPacker

pytest.importorskip("compressed_tensors", minversion="0.20", reason="needs compressed-tensors 0.20")

PACKER = CtPacker()
UP = "model.layers.0.mlp.up_proj"
SHAPE = (40, 96)
CASES = [
    (bits, group_size, zero)
    for bits in range(2, 9)
    for group_size in (32, None)
    for zero in (Zero.SYMMETRIC, Zero.INTEGER)
]


def scheme_of(bits, group_size, zero, dtype="float16"):
    return Scheme(Grid.AFFINE, bits, group_size, zero, ScaleFormat(dtype))


def write(folder, values):
    entries = {
        name: value.spec if isinstance(value, PackedTensor) else TensorSpec.of(value) for name, value in values.items()
    }
    CtExporter().write(folder, entries, iter(values.items()), Metadata({"model_type": "llama"}))
    return json.loads((folder / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize(("bits", "group_size", "zero"), CASES)
def test_the_package_decompresses_what_lowbit_writes(tmp_path, bits, group_size, zero):
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig

    quantized = samples.quantized(scheme_of(bits, group_size, zero, "float32"), SHAPE, bits)
    config = write(tmp_path / "out", {f"{UP}.weight": PACKER.pack(quantized)})
    stored = load_file(tmp_path / "out" / "model.safetensors")
    state = {name.removeprefix(f"{UP}."): tensor for name, tensor in stored.items()}
    (group,) = QuantizationConfig.model_validate(config).config_groups.values()
    found = PackedQuantizationCompressor.decompress(state, group)["weight"]
    assert found.dtype is torch.float32
    assert torch.equal(found, dequantize(quantized))


@pytest.mark.parametrize(("bits", "group_size", "zero"), CASES)
def test_the_package_packs_the_same_words(bits, group_size, zero):
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    quantized = samples.quantized(scheme_of(bits, group_size, zero), SHAPE, bits)
    packed = PACKER.pack(quantized)
    offset = 2 ** (bits - 1)
    signed = (quantized.parts["codes"].to(torch.int16) - offset).to(torch.int8)
    assert bit_equal(packed.buffers["weight_packed"], pack_to_int32(signed, bits))
    if zero is Zero.INTEGER:
        zeros = (quantized.parts["zeros"] - offset).to(torch.int8)
        assert bit_equal(packed.buffers["weight_zero_point"], pack_to_int32(zeros, bits, packed_dim=0))


def test_the_package_finds_the_same_group_for_every_module(tmp_path):
    """Its own matching, on a model of Linears with our names, picks the bits that each module was written with."""
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils.match import match_named_modules

    bits = {f"layers.{layer}.{name}": 4 for layer in range(3) for name in ("q_proj", "k_proj", "gate")}
    bits |= {"layers.1.k_proj": 8, "layers.2.k_proj": 3, "lm_head": 4}
    plain = {name for name in bits if name.endswith("gate")}
    values = {
        f"{name}.weight": torch.ones(8, 96)
        if name in plain
        else PACKER.pack(samples.quantized(scheme_of(width, 32, Zero.SYMMETRIC), SHAPE))
        for name, width in bits.items()
    }
    config = QuantizationConfig.model_validate(write(tmp_path / "out", values))
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList(
        torch.nn.ModuleDict({name: torch.nn.Linear(2, 2) for name in ("q_proj", "k_proj", "gate")}) for _ in range(3)
    )
    model.lm_head = torch.nn.Linear(2, 2)
    found = {}
    for group in config.config_groups.values():
        for name, _ in match_named_modules(model, group.targets, config.ignore):
            assert name not in found
            found[name] = group.weights.num_bits
    assert found == {name: width for name, width in bits.items() if name not in plain}


@pytest.mark.parametrize("zero", [Zero.SYMMETRIC, Zero.INTEGER])
def test_lowbit_reads_what_the_package_compresses(tmp_path, zero):
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors.torch import save_file

    weights = {"num_bits": 3, "type": "int", "symmetric": zero is Zero.SYMMETRIC, "strategy": "group", "group_size": 32}
    config = {
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "format": "pack-quantized",
        "quantization_status": "compressed",
    }
    (group,) = QuantizationConfig.model_validate(config).config_groups.values()
    quantized = samples.quantized(scheme_of(3, 32, zero, "float32"), SHAPE)
    state = {"weight": dequantize(quantized), "weight_scale": quantized.parts["scales"].abs()}
    if zero is Zero.INTEGER:
        state["weight_zero_point"] = (quantized.parts["zeros"] - 4).to(torch.int8)
    compressed = PackedQuantizationCompressor.compress(state, group)
    expected = PackedQuantizationCompressor.decompress(compressed, group)["weight"]
    folder = tmp_path / "it"
    folder.mkdir()
    save_file({f"{UP}.{name}": tensor for name, tensor in compressed.items()}, folder / "model.safetensors")
    dumped = QuantizationConfig.model_validate(config).model_dump(mode="json")
    (folder / "config.json").write_text(json.dumps({"quantization_config": dumped}))
    with CtImporter().open(folder) as checkpoint:
        packed = checkpoint.read(f"{UP}.weight")
    assert torch.equal(dequantize(PACKER.unpack(packed)), expected)


@pytest.mark.filterwarnings("ignore")  # those of transformers and torch on their own account
def test_transformers_runs_what_lowbit_writes(tmp_path):
    """A tiny Llama, one quantized by lowbit and one with the dequantized weights: the same logits.

    Symmetric: transformers 5.23 with compressed-tensors 0.20 expects zero points unpacked, and loads no asymmetric file.
    """
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
        dtype="float32",
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    plain = transformers.LlamaForCausalLM(config).float().eval()
    values = {}
    for name, weight in plain.state_dict().items():
        if re.search(r"(proj|fc)\.weight$", name):
            scheme = scheme_of(8 if "down" in name else 4, 32, Zero.SYMMETRIC, "float32")
            quantized = samples.quantized(scheme, tuple(weight.shape), len(values))
            weight.copy_(dequantize(quantized))
            values[name] = PACKER.pack(quantized)
        else:
            values[name] = weight.clone()
    entries = {
        name: value.spec if isinstance(value, PackedTensor) else TensorSpec.of(value) for name, value in values.items()
    }
    document = {**config.to_dict(), "architectures": ["LlamaForCausalLM"]}
    CtExporter().write(tmp_path / "out", entries, iter(values.items()), Metadata(document))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, plain(tokens).logits)
