"""Format hf, float8 weights: scales multiply, bfloat16 comes out, and scales that do not fit are refused."""

import json

import pytest
import torch
from safetensors.torch import save_file

from lowbit.errors import CheckpointError
from lowbit.parts import TensorSpec
from lowbit.tensors import bit_equal
from lowbit_formats.hf import HfImporter

IMPORTER = HfImporter()


def make_folder(folder, tensors, config):
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def read(path):
    assert IMPORTER.why_not(path) is None
    with IMPORTER.open(path) as checkpoint:
        found = dict(checkpoint.stream())
        assert {name: TensorSpec.of(tensor) for name, tensor in found.items()} == checkpoint.entries
    return found


def fp8(shape, dtype=torch.float8_e4m3fn, seed=0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 20).to(dtype)


def test_block_scales_multiply_and_disappear(tmp_path):
    codes, scales = fp8((200, 300)), torch.rand(4, 5, generator=torch.Generator().manual_seed(1)) + 0.5
    quantization = {"quant_method": "fp8", "weight_block_size": [64, 64]}
    tensors = {
        "a.weight": codes,
        "a.weight_scale_inv": scales,
        "a.input_scale": torch.ones(1),
        "b.weight": torch.ones(3, 3),
    }
    folder = make_folder(tmp_path / "m", tensors, {"model_type": "x", "quantization_config": quantization})
    expected = torch.empty(200, 300)
    for row in range(200):
        for block in range(5):
            columns = slice(64 * block, 64 * block + 64)
            expected[row, columns] = codes[row, columns].float() * scales[row // 64, block]
    found = read(folder)
    assert list(found) == ["b.weight", "a.weight"] or list(found) == ["a.weight", "b.weight"]
    assert bit_equal(found["a.weight"], expected.bfloat16())
    with IMPORTER.open(folder) as checkpoint:
        assert checkpoint.metadata.config == {"model_type": "x"}


def test_the_block_is_128_where_no_config_says_it(tmp_path):
    codes, scales = fp8((130, 256)), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    save_file({"w": codes, "w_scale_inv": scales}, tmp_path / "m.safetensors")
    spread = scales.repeat_interleave(128, 0)[:130].repeat_interleave(128, 1)
    assert bit_equal(read(tmp_path / "m.safetensors")["w"], (codes.float() * spread).bfloat16())


@pytest.mark.parametrize("scale_shape", [(), (1,), (1, 1), (6,), (6, 1)])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
def test_scales_for_a_tensor_or_a_row(tmp_path, scale_shape, scale_dtype):
    codes, scale = fp8((6, 10), torch.float8_e5m2), (torch.rand(scale_shape) + 0.5).to(scale_dtype)
    save_file({"w.weight": codes, "w.weight_scale": scale}, tmp_path / "m.safetensors")
    column = scale.float().reshape(-1, 1)
    assert bit_equal(read(tmp_path / "m.safetensors")["w.weight"], (codes.float() * column).bfloat16())


def test_experts_have_block_scales_of_their_own(tmp_path):
    codes, scales = fp8((3, 5, 7)), torch.rand(3, 2, 2) + 0.5
    quantization = {"quant_method": "fp8", "weight_block_size": [4, 4]}
    tensors = {"experts.up_proj": codes, "experts.up_proj_scale_inv": scales}
    folder = make_folder(tmp_path / "m", tensors, {"text_config": {"quantization_config": quantization}})
    spread = scales.repeat_interleave(4, 1)[:, :5].repeat_interleave(4, 2)[:, :, :7]
    assert bit_equal(read(folder)["experts.up_proj"], (codes.float() * spread).bfloat16())


def test_a_large_weight_is_decoded_in_pieces_without_a_seam(tmp_path):
    codes, scales = fp8((1100, 1024)), torch.rand(9, 8) + 0.5
    save_file({"w": codes, "w_scale_inv": scales}, tmp_path / "m.safetensors")
    spread = scales.repeat_interleave(128, 0)[:1100].repeat_interleave(128, 1)
    assert bit_equal(read(tmp_path / "m.safetensors")["w"], (codes.float() * spread).bfloat16())


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz]
)
def test_float8_without_scales_is_exact(tmp_path, dtype):
    codes = torch.arange(256).to(torch.uint8).view(dtype)
    save_file({"w": codes, "scalar": codes[3].clone(), "none": codes[:0].reshape(0, 4)}, tmp_path / "m.safetensors")
    found = read(tmp_path / "m.safetensors")
    assert torch.equal(found["w"].float().nan_to_num(7), codes.float().nan_to_num(7))
    assert found["scalar"].shape == ()
    assert found["none"].shape == (0, 4)


@pytest.mark.parametrize(
    ("scales", "sentence"),
    [
        ({"w_scale_inv": torch.ones(3, 2)}, r"'w_scale_inv' of shape \[3, 2\] do not fit 'w' of shape \[8, 8\]"),
        ({"w_scale": torch.ones(7)}, "do not fit"),
        ({"w_scale": torch.ones(1, 1, 8)}, "do not fit"),
        ({"w_scale": torch.ones(1, dtype=torch.int32)}, "are int32"),
        ({"w_scale": torch.ones(1), "w_scale_inv": torch.ones(1)}, "two kinds of scales"),
    ],
)
def test_scales_that_do_not_fit(tmp_path, scales, sentence):
    save_file({"w": fp8((8, 8)), **scales}, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=sentence):
        IMPORTER.open(tmp_path / "m.safetensors")


def test_a_block_size_that_is_none(tmp_path):
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 0]}
    folder = make_folder(tmp_path / "m", {"w": fp8((8, 8))}, {"quantization_config": quantization})
    with pytest.raises(CheckpointError, match="two positive integers"):
        IMPORTER.open(folder)
