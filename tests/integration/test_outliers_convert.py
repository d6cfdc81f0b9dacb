"""A model converted with outliers: stored, shown, reopened, run, and worth more than without."""

import json

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import lowbit
from lowbit.cli import cli
from lowbit.scheme import Outliers
from lowbit.testing import weights

UP, DOWN = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    tensors = {UP: weights.gaussian((128, 256)), DOWN: weights.gaussian((256, 128), 1)}
    for tensor in tensors.values():
        tensor[::7, ::13] *= 8
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


def lowbit_json(*arguments):
    result = CliRunner().invoke(cli, [*map(str, arguments), "--json"], catch_exceptions=False)
    return json.loads(result.stdout)


@pytest.mark.parametrize(
    "quantizer",
    [("kbit", "-b", 3), ("autoround", "-b", 2, "-g", 64), ("binary", "-g", 64)],
    ids=lambda choice: choice[0],
)
def test_convert_inspect_reopen(model, tmp_path, quantizer):
    name, *flags = quantizer
    plain = lowbit_json("convert", model, tmp_path / "plain", "-q", name, *flags)
    found = lowbit_json("convert", model, tmp_path / "out", "-q", name, *flags, "--set", "outliers=1%")
    assert found["verified"]
    assert found["relative_rmse"] < 0.8 * plain["relative_rmse"]
    shown = lowbit_json("inspect", tmp_path / "out")
    assert shown["bits_per_weight"] == pytest.approx(plain["bits_per_weight"] + 0.01 * 32, abs=0.3)  # and row pointers
    assert f"{name}+1% float16" in shown["provenance"]["quantizers"]
    assert {tensor["scheme"]["outliers"]["density"] for tensor in shown["tensors"]} == {0.01}
    with lowbit.installed().open(tmp_path / "out") as checkpoint:
        packed = checkpoint.read(UP)
    assert packed.scheme.outliers == Outliers(0.01)
    lowbit_json("convert", tmp_path / "out", tmp_path / "floats", "-f", "hf", "--dtype", "float32")
    floats = load_file(tmp_path / "floats" / "model.safetensors")[UP]
    layer = lowbit.QuantLinear.from_packed(packed, dtype=torch.float32)
    torch.testing.assert_close(layer(torch.eye(256)).T, floats, rtol=1e-5, atol=1e-5)


def test_inspect_names_them_and_other_formats_refuse(model, tmp_path):
    arguments = ["convert", str(model), str(tmp_path / "out"), "-q", "kbit", "--set", "outliers=1%"]
    assert CliRunner().invoke(cli, arguments, catch_exceptions=False).exit_code == 0
    shown = CliRunner().invoke(cli, ["inspect", str(tmp_path / "out")]).stdout
    assert "codebook 4-bit g64 +outliers" in shown
    refused = CliRunner().invoke(
        cli, ["convert", str(model), str(tmp_path / "no"), "-q", "autoround", "-f", "gptq", "--set", "outliers=1%"]
    )
    assert "native" in str(refused.exception)
    assert not (tmp_path / "no").exists()
