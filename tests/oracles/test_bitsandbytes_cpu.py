"""Layouts bnb-nf4 and bnb-fp4 against bitsandbytes itself on the CPU, and a written model loaded by transformers."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowbit import installed
from lowbit.convert import convert
from lowbit.diff import floats
from lowbit.grids import dequantize
from lowbit.metadata import Metadata
from lowbit.parts import TensorSpec
from lowbit.plan import Target
from lowbit.recipe import Recipe, Rule
from lowbit.tensors import PackedTensor
from lowbit_formats.bitsandbytes import PACKERS, BitsAndBytesExporter, BitsAndBytesImporter
from lowbit_formats.bitsandbytes_layout import BLOCK_SIZES, TABLES

pytestmark = pytest.mark.filterwarnings(
    "ignore"
)  # deprecations of bitsandbytes, accelerate and transformers are theirs
functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")

NAME = "model.layers.0.mlp.up_proj"
PACKER_OF = {packer.quant_type: packer for packer in PACKERS}


@pytest.fixture(autouse=True)
def uncompiled():
    """bitsandbytes compiles its plain-torch path for every new shape, seconds each; the results are the same without."""
    with torch.compiler.set_stance("force_eager"):
        yield


def theirs(quant_type, shape, block, double, seed=0):
    """A heavy-tailed weight quantized by bitsandbytes: its tensors as save_pretrained names them, and its dequantization."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) / torch.rand(shape, generator=generator).clamp(min=0.05)
    packed, state = functional.quantize_4bit(weight, blocksize=block, quant_type=quant_type, compress_statistics=double)
    tensors = {f"{NAME}.weight": packed}
    tensors |= {f"{NAME}.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    return tensors, functional.dequantize_4bit(packed, state)


def write(folder, tensors):
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    config = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize(
    ("shape", "block"),
    [*(((64, 512), block) for block in BLOCK_SIZES), ((5, 77), 64), ((3, 33), 32), ((640, 1026), 64)],
)
def test_every_dequantized_bit_is_theirs(quant_type, shape, block, double, tmp_path):
    tensors, expected = theirs(quant_type, shape, block, double)
    with BitsAndBytesImporter().open(write(tmp_path / "m", tensors)) as checkpoint:
        packed = checkpoint.read(f"{NAME}.weight")
    packer = PACKER_OF[quant_type]
    found = dequantize(packer.unpack(packed))
    assert torch.equal(found, expected)  # FP4 has two codes of zero, and theirs may be negative
    assert torch.equal(packer.pack(packer.unpack(packed)).buffers["weight"], tensors[f"{NAME}.weight"])


@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_bitsandbytes_reads_what_lowbit_writes(quant_type, double, tmp_path):
    tensors, expected = theirs(quant_type, (64, 96), 32, double)
    with BitsAndBytesImporter().open(write(tmp_path / "theirs", tensors)) as checkpoint:
        packed = checkpoint.read(f"{NAME}.weight")
    specs = BitsAndBytesExporter().tensor_specs(packed.spec)
    values = BitsAndBytesExporter().stored(packed, {"bnb_4bit_compute_dtype": "float32"})
    assert {suffix: TensorSpec.of(tensor) for suffix, tensor in values.items()} == specs
    state = functional.QuantState.from_dict(
        {suffix.removeprefix("weight."): tensor for suffix, tensor in values.items() if suffix != "weight"},
        torch.device("cpu"),
    )
    assert torch.equal(functional.dequantize_4bit(values["weight"], state), expected)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_the_tables_are_theirs(quant_type):
    assert torch.equal(TABLES[quant_type], functional.get_4bit_type(quant_type, device="cpu"))


def test_transformers_loads_a_written_model_with_the_same_weights(tmp_path):
    pytest.importorskip("accelerate", reason="transformers loads bitsandbytes models with accelerate")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
        tie_word_embeddings=True,
        dtype="float32",
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    values, decoded = {}, {}
    for name, tensor in model.state_dict().items():
        if name.endswith("_proj.weight"):
            kind, double = ("fp4", False) if "q_proj" in name else ("nf4", "layers.1" in name)
            values[name], decoded[name] = quantized_by_them(tensor, kind, double, tmp_path / name)
        elif name != "lm_head.weight":
            values[name] = decoded[name] = tensor
    entries = {
        name: value.spec if isinstance(value, PackedTensor) else TensorSpec.of(value) for name, value in values.items()
    }
    metadata = Metadata(json.loads(config.to_json_string()))
    BitsAndBytesExporter().write(tmp_path / "out", entries, iter(values.items()), metadata)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map="cpu", dtype=torch.float32)
    model.load_state_dict({**decoded, "lm_head.weight": decoded["model.embed_tokens.weight"]})
    layers = dict(loaded.named_modules())
    for name in (name for name, value in values.items() if isinstance(value, PackedTensor)):
        weight = layers[name.removesuffix(".weight")].weight
        assert torch.equal(functional.dequantize_4bit(weight.data, weight.quant_state), decoded[name]), name
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.allclose(loaded(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("scale", [{}, {"scale": "search"}], ids=["absmax", "search"])
@pytest.mark.parametrize("shape", [(48, 128), (33, 77)], ids=["whole rows", "groups across rows"])
def test_a_quantizer_s_codes_are_read_and_no_worse_than_theirs(quant_type, scale, shape, tmp_path):
    """lowbit convert -q kbit --format bitsandbytes:TYPE; searched scales may be negative, and bitsandbytes multiplies by them."""
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    save_file({f"{NAME}.weight": weight}, source / "model.safetensors")
    (source / "config.json").write_text(json.dumps({"model_type": "llama"}))
    report = convert(source, out, Target("bitsandbytes", quant_type), installed(), Recipe(Rule("*", "kbit", scale)))
    stored = load_file(out / "model.safetensors")
    parts = {
        name.removeprefix(f"{NAME}.weight.").removeprefix(f"{NAME}."): tensor
        for name, tensor in stored.items()
        if name != f"{NAME}.weight"
    }
    state = functional.QuantState.from_dict(parts, torch.device("cpu"))
    found = functional.dequantize_4bit(stored[f"{NAME}.weight"], state).float()
    with installed().open(out) as checkpoint:
        assert torch.equal(floats(checkpoint, f"{NAME}.weight", installed()), found)
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type=quant_type, compress_statistics=False)
    own = (functional.dequantize_4bit(packed, state) - weight).square().mean()
    assert (found - weight).square().mean() <= own * (0.95 if scale else 1.001)
    assert report.error.max_abs == float((found - weight).abs().max())


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(640, 130), (33, 77)], ids=["six blocks of scales", "one short block"])
def test_double_quantization_is_theirs_for_the_same_offset(quant_type, shape, tmp_path):
    """lowbit convert -q kbit --format bitsandbytes:TYPE-double. Their offset, a float32 sum, may end in another last bit."""
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    weight *= torch.linspace(0.01, 2, shape[0])[:, None]  # scales of very different size
    save_file({f"{NAME}.weight": weight}, source / "model.safetensors")
    (source / "config.json").write_text(json.dumps({"model_type": "llama"}))
    convert(source, out, Target("bitsandbytes", f"{quant_type}-double"), installed(), Recipe(Rule("*", "kbit", {})))
    stored = load_file(out / "model.safetensors")
    parts = {name.removeprefix(f"{NAME}.weight."): tensor for name, tensor in stored.items() if ".weight." in name}
    state = functional.QuantState.from_dict(dict(parts), torch.device("cpu"))
    assert state.nested
    packed, own = functional.quantize_4bit(weight, blocksize=64, quant_type=quant_type, compress_statistics=True)
    found = functional.dequantize_4bit(stored[f"{NAME}.weight"], state)
    with installed().open(out) as checkpoint:
        assert torch.equal(floats(checkpoint, f"{NAME}.weight", installed()), found)
    assert torch.allclose(state.offset, own.offset, rtol=2e-7, atol=0)
    _, plain = functional.quantize_4bit(weight, blocksize=64, quant_type=quant_type, compress_statistics=False)
    codes, nested = functional.quantize_blockwise(plain.absmax - state.offset, blocksize=256)
    assert torch.equal(state.state2.code, nested.code)
    assert torch.equal(state.state2.absmax, nested.absmax)
    assert torch.equal(state.absmax, codes)
    theirs_differ = stored[f"{NAME}.weight"] != packed
    assert (
        theirs_differ.float().mean() < 1e-3
    )  # only where a weight lies on a midpoint, and their CPU code is one with 1/x
    assert (found - weight).square().mean() <= (
        functional.dequantize_4bit(packed, own) - weight
    ).square().mean() * 1.001


def quantized_by_them(tensor, kind, double, folder):
    packed, state = functional.quantize_4bit(tensor, blocksize=64, quant_type=kind, compress_statistics=double)
    tensors = {f"{NAME}.weight": packed}
    tensors |= {f"{NAME}.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    with BitsAndBytesImporter().open(write(folder, tensors)) as checkpoint:
        return checkpoint.read(f"{NAME}.weight"), functional.dequantize_4bit(packed, state)
