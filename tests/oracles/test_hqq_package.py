"""Layout hqq against the package hqq: its packing, its dequantizer and the state_dict of its layer, on the CPU."""

import json

import pytest
import torch
from safetensors.torch import save_file

from lowbit.grids import dequantize
from lowbit_formats.hqq import HqqImporter
from lowbit_formats.hqq_layout import HqqPacker

pytestmark = pytest.mark.filterwarnings("ignore")  # hqq's own deprecations
quantize = pytest.importorskip("hqq.core.quantize", reason="hqq is not installed")

PACKER = HqqPacker()
NAME = "model.layers.0.mlp.up_proj"
CASES = [
    (8, 64, (3, 128)),
    (6, 64, (3, 128)),
    (5, 32, (4, 96)),
    (4, 64, (8, 128)),
    (4, 64, (8, 96)),
    (3, 64, (8, 128)),
    (3, 32, (7, 96)),
    (2, 32, (8, 64)),
    (1.58, 32, (8, 64)),
    (1, 32, (8, 64)),
]


def layer(bits, group_size, shape, dtype, view_as_float=False):
    linear = torch.nn.Linear(shape[1], shape[0])
    torch.nn.init.normal_(linear.weight, generator=torch.Generator().manual_seed(0))
    config = quantize.BaseQuantizeConfig(nbits=bits, group_size=group_size, axis=1, view_as_float=view_as_float)
    return quantize.HQQLinear(linear, config, compute_dtype=dtype, device="cpu")


def read(folder, state):
    save_file({f"{NAME}.{key}": value.data.contiguous() for key, value in state.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "hqq"}}))
    with HqqImporter().open(folder) as checkpoint:
        assert set(checkpoint.entries) == {f"{NAME}.weight", f"{NAME}.bias"}
        return checkpoint.read(f"{NAME}.weight")


@pytest.mark.parametrize(("bits", "group_size", "shape"), CASES)
def test_every_weight_is_what_hqq_dequantizes_in_float32(tmp_path, bits, group_size, shape):
    theirs = layer(bits, group_size, shape, torch.float32)
    packed = read(tmp_path, theirs.state_dict())
    assert torch.equal(dequantize(PACKER.unpack(packed)), theirs.dequantize())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("bits", "group_size", "shape"), CASES)
def test_half_scales_differ_only_by_hqqs_roundings(tmp_path, bits, group_size, shape, dtype):
    theirs = layer(bits, group_size, shape, dtype)
    quantized = PACKER.unpack(read(tmp_path, theirs.state_dict()))
    ours, found = dequantize(quantized), theirs.dequantize().float()
    # hqq rounds q - z and the product to dtype: each is off by half a unit in the last place at most
    assert ((ours - found).abs() <= 1.001 * torch.finfo(dtype).eps * ours.abs() + torch.finfo(dtype).tiny).all()
    exact = {key: value.float() if key in ("scale", "zero") else value for key, value in theirs.meta.items()}
    assert torch.equal(ours, quantize.Quantizer.dequantize(theirs.W_q, {**exact, "compute_dtype": torch.float32}))


@pytest.mark.parametrize(("bits", "group_size", "shape"), CASES)
def test_packing_is_theirs_bit_for_bit(tmp_path, bits, group_size, shape):
    theirs = layer(bits, group_size, shape, torch.float32)
    packed = PACKER.pack(PACKER.unpack(read(tmp_path, theirs.state_dict())))
    assert torch.equal(packed.buffers["W_q"], theirs.W_q.data)


def test_view_as_float(tmp_path):
    theirs = layer(4, 64, (8, 128), torch.float16, view_as_float=True)
    assert theirs.W_q.dtype is torch.float16
    ours = dequantize(PACKER.unpack(read(tmp_path, theirs.state_dict())))
    assert torch.allclose(ours, theirs.dequantize().float(), rtol=2e-3)
