"""``--format native,gptq``: one set of codes in several formats, all of them or none."""

import json
import sys

import pytest
import torch
from safetensors.torch import save_file

import lowbit.cli
from lowbit.diff import differences
from lowbit.plugins import installed

UP, DOWN = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"
QUANTIZED = ("-q", "autoround", "-b", "4", "-g", "64")


@pytest.fixture
def convert(tmp_path, monkeypatch, capsys):
    folder, generator = tmp_path / "model", torch.Generator().manual_seed(0)
    folder.mkdir()
    weights = {UP: torch.randn(128, 256, generator=generator), DOWN: torch.randn(256, 128, generator=generator)}
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["lowbit", "convert", str(folder), str(tmp_path / "out"), *words])
        with pytest.raises(SystemExit) as ended:
            lowbit.cli.main()
        return ended.value.code, capsys.readouterr()

    return run


def left(tmp_path):
    return sorted(path.name for path in tmp_path.iterdir())


def test_each_format_gets_a_folder_with_the_same_numbers(convert, tmp_path):
    code, said = convert(*QUANTIZED, "--format", "native,gptq,compressed-tensors", "--json")
    assert code == 0, said.err
    assert [document["format"] for document in json.loads(said.out)["formats"]] == [
        "native",
        "gptq",
        "compressed-tensors",
    ]
    assert left(tmp_path / "out") == ["compressed-tensors", "gptq", "native"]
    with installed().open(tmp_path / "out" / "native") as native:
        for other in ("gptq", "compressed-tensors"):
            with installed().open(tmp_path / "out" / other) as found:
                assert all(row.exact for row in differences(native, found, installed()))


def test_a_dry_run_plans_each_format(convert, tmp_path):
    code, said = convert(*QUANTIZED, "--format", "native,gptq,hf", "--dry-run", "--json")
    assert code == 0, said.err
    plans = json.loads(said.out)["formats"]
    assert [plan["format"] for plan in plans] == ["native", "gptq", "hf"]
    assert [plan["tensors"][0]["action"] for plan in plans] == ["quantize", "transcode", "dequantize"]
    assert plans[0]["bytes"] <= plans[1]["bytes"] < plans[2]["bytes"]
    code, said = convert("-q", "kbit", "-b", "3", "--format", "native,gptq", "--dry-run")
    assert (code, "gptq" in said.err) == (2, True)
    assert left(tmp_path) == ["model"]


def test_a_format_that_cannot_follow_is_refused_before_any_work(convert, tmp_path):
    code, said = convert("-q", "kbit", "-b", "3", "--format", "native,gptq")
    assert code == 2
    assert "gptq" in said.err
    assert left(tmp_path) == ["model"]


def test_a_format_is_given_once(convert, tmp_path):
    code, said = convert(*QUANTIZED, "--format", "native, native")
    assert (code, "give each format once" in said.err) == (2, True)
    assert left(tmp_path) == ["model"]


def test_recipe_is_an_option_of_the_quantizer(convert):
    assert "best" in convert("-q", "autoround", "-b", "4", "--recipe", "fastest")[1].err
    assert "kbit has no option 'recipe'" in convert("-q", "kbit", "--recipe", "light")[1].err
