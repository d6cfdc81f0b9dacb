"""Layout mlx-affine against MLX itself: its packing, its dequantizer, its files, both ways."""

import json

import numpy as np
import pytest
import torch

from lowbit.grids import dequantize
from lowbit.metadata import Metadata
from lowbit.parts import TensorSpec
from lowbit.tensors import QuantizedTensor
from lowbit.testing import samples
from lowbit_formats.mlx import MlxExporter, MlxImporter
from lowbit_formats.mlx_layout import BITS, GROUP_SIZES, MlxPacker, mlx_scheme

mx = pytest.importorskip("mlx.core", reason="MLX is not installed (pip install 'mlx[cpu]')")

PACKER = MlxPacker()
NAME = "model.layers.0.mlp.up_proj"


def as_torch(array):
    """bfloat16 goes through float32, which holds all of its values."""
    if array.dtype == mx.bfloat16:
        return torch.from_numpy(np.array(array.astype(mx.float32))).bfloat16()
    return torch.from_numpy(np.array(array))


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", BITS)
def test_codes_that_mlx_packs_unpack_to_the_same_weights(bits, group_size, tmp_path):
    weight = mx.random.normal((16, 256), key=mx.random.key(bits))
    arrays = dict(zip(("weight", "scales", "biases"), mx.quantize(weight, group_size, bits), strict=True))
    mx.save_safetensors(str(tmp_path / "model.safetensors"), {f"{NAME}.{key}": value for key, value in arrays.items()})
    config = {"quantization": {"group_size": group_size, "bits": bits}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with MlxImporter().open(tmp_path) as checkpoint:
        packed = checkpoint.read(f"{NAME}.weight")
    quantized = PACKER.unpack(packed)
    theirs = as_torch(mx.dequantize(arrays["weight"], arrays["scales"], arrays["biases"], group_size, bits))
    ours = dequantize(quantized)
    # MLX may fuse the multiplication and the addition: one rounding less, half a unit in the last place of the product
    product = (quantized.parts["codes"] * quantized.parts["scales"].repeat_interleave(group_size, 1)).abs()
    assert ((ours - theirs).abs() <= torch.finfo(torch.float32).eps * (product + ours.abs())).all()
    assert torch.equal(
        PACKER.pack(quantized).buffers["weight"].view(torch.int32), as_torch(arrays["weight"]).view(torch.int32)
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("bits", BITS)
def test_mlx_reads_what_lowbit_writes(bits, dtype, tmp_path):
    quantized = samples.quantized(mlx_scheme(bits, 64, dtype), (8, 128), bits)
    power = {
        "scales": torch.full((8, 2), 0.25),
        "minimums": torch.full((8, 2), -2.0),
    }  # products that every dtype holds
    parts = {**quantized.parts, **{name: part.to(quantized.parts[name].dtype) for name, part in power.items()}}
    quantized = QuantizedTensor(quantized.scheme, quantized.shape, parts)
    packed = PACKER.pack(quantized)
    folder = tmp_path / "m"
    MlxExporter().write(folder, {f"{NAME}.weight": packed.spec}, iter([(f"{NAME}.weight", packed)]), Metadata())
    said = json.loads((folder / "config.json").read_text())["quantization"]
    arrays = mx.load(str(folder / "model.safetensors"))
    weight, scales, biases = (arrays[f"{NAME}.{key}"] for key in ("weight", "scales", "biases"))
    assert (weight.dtype, scales.dtype) == (mx.uint32, getattr(mx, dtype))
    theirs = mx.dequantize(weight, scales, biases, said["group_size"], said["bits"], mode=said["mode"])
    assert torch.equal(as_torch(theirs).float(), dequantize(quantized))


def test_mlx_lm_loads_a_written_model_with_a_setting_for_each_module(tmp_path):
    utils = pytest.importorskip("mlx_lm.utils", reason="mlx-lm is not installed")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = {"model_type": "llama", "vocab_size": 40, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, **sizes}
    shapes = {f"self_attn.{name}_proj": (64, 64) for name in "qkvo"} | {
        "mlp.gate_proj": (96, 64),
        "mlp.up_proj": (96, 64),
    }
    weights = {f"model.layers.0.{name}.weight": (4, 64, shape) for name, shape in shapes.items()}
    weights["model.layers.0.mlp.down_proj.weight"] = (6, 32, (64, 96))
    weights["model.embed_tokens.weight"] = (8, 64, (40, 64))
    values = {
        name: PACKER.pack(samples.quantized(mlx_scheme(bits, group_size, "float32"), shape, seed))
        for seed, (name, (bits, group_size, shape)) in enumerate(weights.items())
    }
    norms = ("layers.0.input_layernorm", "layers.0.post_attention_layernorm", "norm")
    values |= {f"model.{name}.weight": torch.ones(64) for name in norms}
    entries = {
        name: TensorSpec.of(value) if isinstance(value, torch.Tensor) else value.spec for name, value in values.items()
    }
    MlxExporter().write(tmp_path / "m", entries, iter(values.items()), Metadata(config))
    model, _ = utils.load_model(tmp_path / "m")
    modules = dict(model.named_modules())
    for name in weights:
        module = modules[name.removesuffix(".weight")]
        theirs = mx.dequantize(module.weight, module.scales, module.biases, module.group_size, module.bits)
        assert torch.allclose(as_torch(theirs), dequantize(PACKER.unpack(values[name])), rtol=1e-6, atol=1e-7), name
    assert np.isfinite(np.array(model(mx.array([[1, 2, 3]])))).all()
