"""Files that contradict themselves: one sentence that names the tensor and the value, exit code 2, and nothing is written."""

import json

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from lowbit import Grid, Metadata, Scheme, Zero
from lowbit.cli import cli
from lowbit.errors import LowbitError
from lowbit.testing import samples
from lowbit_formats.gptq_layout import GptqPacker, GptqV2Packer
from lowbit_formats.native import NativeExporter
from lowbit_formats.plain import PlainPacker

UP = "model.layers.0.mlp.up_proj"
SHAPE = (32, 128)
CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}


def gptq(**fields):
    """Return the tensors of one GPTQ module."""
    scheme = Scheme(Grid.AFFINE, 4, 32, **fields)
    packer = GptqPacker() if scheme.symmetric else GptqV2Packer()
    return {
        f"{UP}.{name}": buffer.clone()
        for name, buffer in packer.pack(samples.quantized(scheme, SHAPE, 0)).buffers.items()
    }


def folder(path, shards, config=CONFIG):
    """Write a GPTQ folder of one or more files."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": config}))
    names = [f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors" for index in range(len(shards))]
    for name, tensors in zip(names, shards, strict=True):
        save_file(tensors, path / (name if len(shards) > 1 else "model.safetensors"))
    return path


def changed(name, place, value, **fields):
    tensors = gptq(**fields)
    tensors[f"{UP}.{name}"][place] = value
    return tensors


CASES = {
    "an infinite scale": ([changed("scales", (1, 7), float("inf"))], {}, (f"{UP}.scales", "inf at [1, 7]")),
    "a scale that is NaN": ([changed("scales", (3, 0), float("nan"))], {}, (f"{UP}.scales", "nan at [3, 0]")),
    "a g_idx that contradicts its label": (
        [changed("g_idx", 5, 2)],
        {},
        (f"{UP}.g_idx puts column 5 into group 2", "desc_act is false"),
    ),
    "a g_idx beyond the scales": (
        [changed("g_idx", 5, 9)],
        {"desc_act": True},
        (f"{UP}.g_idx names group 9", "4 groups"),
    ),
    "a label without its g_idx": (
        [{name: tensor for name, tensor in gptq().items() if "g_idx" not in name}],
        {"desc_act": True},
        (UP, "no g_idx", "desc_act is true"),
    ),
    "bits that contradict the tensors": ([gptq()], {"bits": 8}, (f"{UP}.", "8 bits")),
    "groups that contradict the tensors": ([gptq()], {"group_size": 64}, (f"{UP}.scales", "[4, 32]", "[2, 32]")),
    "symmetry that contradicts the tensors": ([gptq(zero=Zero.INTEGER)], {}, (f"{UP}.qzeros", "sym is true")),
    "bits that make no sense": ([gptq()], {"bits": 40}, ("bits", "40")),
    "a missing tensor": (
        [{name: tensor for name, tensor in gptq().items() if "scales" not in name}],
        {},
        (UP, "scales", "incomplete"),
    ),
    "a tensor in two files": ([gptq(), {f"{UP}.scales": gptq()[f"{UP}.scales"]}], {}, (f"{UP}.scales",)),
    "a weight that is plain, too": (
        [{**gptq(), f"{UP}.weight": torch.zeros(SHAPE)}],
        {},
        (f"{UP}.weight is there twice",),
    ),
}


def refused(source, out, words):
    """Assert exit code 2 and one sentence with these words (the command's own main prints it); nothing is left."""
    result = CliRunner().invoke(cli, ["convert", str(source), str(out), "--format", "awq"])
    assert isinstance(result.exception, LowbitError), result.exception
    sentence = str(result.exception)
    assert "\n" not in sentence
    for word in words:
        assert word in sentence
    assert [path.name for path in out.parent.iterdir()] == [source.name]


@pytest.mark.parametrize("case", CASES)
def test_a_contradiction_names_tensor_and_value(case, tmp_path):
    shards, config, words = CASES[case]
    refused(folder(tmp_path / "source", shards, {**CONFIG, **config}), tmp_path / "out", words)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_native_folder_is_not_believed_either(value, tmp_path):
    packed = PlainPacker().pack(samples.quantized(Scheme(Grid.AFFINE, 4, 32), SHAPE, 0))
    packed.buffers["scales"][2, 1] = value
    entries = {f"{UP}.weight": packed.spec}
    NativeExporter().write(tmp_path / "source", entries, iter([(f"{UP}.weight", packed)]), Metadata())
    refused(tmp_path / "source", tmp_path / "out", (f"{UP}.scales", f"{value} at [2, 1]"))
