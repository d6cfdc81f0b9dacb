"""A stranger's quantizer: built as a wheel, put on the path, found by its entry point, used by ``lowbit convert``."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

PLUGIN = Path(__file__).parent / "example_plugin"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder that holds the plugin as pip would install it."""
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=PLUGIN, check=True, capture_output=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder)
    return folder


def lowbit(site, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(site)}
    command = [sys.executable, "-m", "lowbit", *map(str, arguments), "--json"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_the_plugin_is_short():
    lines = [line for line in (PLUGIN / "lowbit_ternary.py").read_text().splitlines() if line.strip()]
    assert len(lines) <= 65


def test_convert_uses_the_new_quantizer(site, tmp_path):
    generator = torch.Generator().manual_seed(0)
    weights = {
        "model.layers.0.mlp.up_proj.weight": torch.randn(96, 160, generator=generator),
        "model.norm.weight": torch.ones(160),
    }
    (tmp_path / "source").mkdir()
    save_file(weights, tmp_path / "source" / "model.safetensors")
    (tmp_path / "source" / "config.json").write_text("{}")

    report = lowbit(
        site, "convert", tmp_path / "source", tmp_path / "out", "--quantizer", "ternary", "--set", "threshold=0.7"
    )
    (quantized,) = [tensor for tensor in report["tensors"] if tensor["action"] == "quantize"]
    assert quantized["to"]["scheme"] == {"version": 1, "grid": "affine", "bits": 2, "group_size": 64, "levels": 3}
    # The best ternary quantizer of a Gaussian has NMSE 0.1902 (Max 1960, 3 levels); groups of 64 fit a little better.
    assert 0.40 < quantized["error"]["relative_rmse"] < 0.45
    compared = lowbit(site, "diff", tmp_path / "source", tmp_path / "out")
    errors = {tensor["name"]: tensor["relative_rmse"] for tensor in compared["tensors"]}
    assert errors[quantized["name"]] == pytest.approx(quantized["error"]["relative_rmse"], rel=1e-5)
    assert errors["model.norm.weight"] == 0


def test_plugins_lists_it_with_its_options(site):
    listed = lowbit(site, "plugins")["quantizers"]["ternary"]
    assert listed["module"] == "lowbit_ternary"
    assert [option["name"] for option in listed["options"]] == ["group_size", "threshold"]
