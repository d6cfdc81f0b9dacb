"""Format hf, reading: which files count, what goes along, and everything that must be refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lowbit.errors import CheckpointError
from lowbit.parts import TensorSpec
from lowbit.plugins import registry
from lowbit.tensors import bit_equal
from lowbit.testing import ImporterContract, Written
from lowbit_formats import hf
from lowbit_formats.hf import HfImporter

IMPORTER = HfImporter()


def weights(seed=0):
    source = torch.Generator().manual_seed(seed)
    return {
        "model.embed_tokens.weight": torch.randn(20, 8, generator=source).bfloat16(),
        "model.layers.0.mlp.up_proj.weight": torch.randn(12, 8, generator=source).bfloat16(),
        "model.layers.0.mlp.up_proj.bias": torch.randn(12, generator=source),
        "model.norm.weight": torch.ones(8, dtype=torch.bfloat16),
    }


def open_files():
    return len(list(Path("/proc/self/fd").iterdir()))


def make_folder(folder, tensors=None, config=None, **side_files):
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights() if tensors is None else tensors, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    for name, text in side_files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def make_shards(folder, **shards):
    """One file for each keyword, and the index that goes with them."""
    folder.mkdir()
    for name, tensors in shards.items():
        save_file(tensors, folder / f"{name}.safetensors")
    return write_index(
        folder, {tensor: f"{name}.safetensors" for name, tensors in shards.items() for tensor in tensors}
    )


def write_index(folder, weight_map):
    document = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(document))
    return folder


def read(path):
    assert IMPORTER.why_not(path) is None
    with IMPORTER.open(path) as checkpoint:
        found = dict(checkpoint.stream())
        assert {name: TensorSpec.of(tensor) for name, tensor in found.items()} == checkpoint.entries
    return found


def assert_equal(left, right):
    assert left.keys() == right.keys()
    assert all(bit_equal(left[name], right[name]) for name in left)


def refusal(path):
    with pytest.raises(CheckpointError) as caught:
        IMPORTER.open(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestImporter(ImporterContract):
    @pytest.fixture
    def importer(self):
        return IMPORTER

    @pytest.fixture(params=["one file", "a folder", "shards"])
    def written(self, request, tmp_path):
        values = {name: tensor for name, tensor in sorted(weights().items()) if tensor.dtype == torch.bfloat16}
        if request.param == "one file":
            save_file(values, tmp_path / "x.safetensors")
            return Written(tmp_path / "x.safetensors", values)
        if request.param == "a folder":
            return Written(make_folder(tmp_path / "m", values, {"model_type": "x"}), values)
        first, *others = values
        shards = {"a": {first: values[first]}, "b": {name: values[name] for name in others}}
        return Written(make_shards(tmp_path / "m", **shards), values)


def test_a_folder_gives_tensors_config_side_files_and_source(tmp_path):
    config = {"model_type": "llama", "vocab_size": 20}
    folder = make_folder(tmp_path / "m", config=config, tokenizer__json="{}", LICENSE="free", __hidden="no")
    (folder / "original").mkdir()
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "pytorch_model.bin.index.json").write_text("{}")
    assert_equal(read(folder), weights())
    with IMPORTER.open(folder) as checkpoint:
        assert checkpoint.metadata.config == config
        assert [file.name for file in checkpoint.metadata.side_files] == ["LICENSE", "tokenizer.json"]
        assert checkpoint.metadata.side_file("LICENSE").read() == b"free"
        assert checkpoint.metadata.provenance == {"source": "m"}


def test_entries_come_in_the_order_of_the_bytes(tmp_path):
    folder = make_folder(tmp_path / "m")
    with IMPORTER.open(folder) as checkpoint:
        assert next(iter(checkpoint.entries)) == "model.layers.0.mlp.up_proj.bias"  # the library puts float32 first


def test_a_single_file(tmp_path):
    save_file(weights(), tmp_path / "some.safetensors")
    assert_equal(read(tmp_path / "some.safetensors"), weights())


def test_shards_with_an_index(tmp_path):
    tensors = weights()
    first, second = dict(list(tensors.items())[:2]), dict(list(tensors.items())[2:])
    folder = make_shards(tmp_path / "m", b=first, a=second)
    save_file({"unrelated": torch.ones(1)}, folder / "consolidated.safetensors")
    assert_equal(read(folder), tensors)
    with IMPORTER.open(folder) as checkpoint:
        assert set(list(checkpoint.entries)[:2]) == set(second)


def test_shards_without_an_index(tmp_path):
    (tmp_path / "m").mkdir()
    for number, (name, tensor) in enumerate(weights().items()):
        save_file({name: tensor}, tmp_path / "m" / f"part{number}.safetensors")
    assert_equal(read(tmp_path / "m"), weights())


def test_an_index_of_another_name(tmp_path):
    folder = make_shards(tmp_path / "m", a=weights())
    (folder / "model.safetensors.index.json").rename(folder / "diffusion.safetensors.index.json")
    assert_equal(read(folder), weights())
    (folder / "other.safetensors.index.json").write_text("{}")
    assert "several checkpoints (diffusion.safetensors.index.json, other" in refusal(folder)


def test_one_model_file_comes_before_an_index(tmp_path):
    folder = make_folder(tmp_path / "m")
    write_index(folder, {"gone": "gone.safetensors"})
    assert_equal(read(folder), weights())


def test_the_links_of_the_hugging_face_cache_are_followed(tmp_path):
    blobs, snapshot = tmp_path / "models--x" / "blobs", tmp_path / "models--x" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    save_file(weights(), blobs / "0123")
    (blobs / "4567").write_text("{}")
    (snapshot / "model-00001-of-00001.safetensors").symlink_to("../../blobs/0123")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/4567")
    write_index(snapshot, dict.fromkeys(weights(), "model-00001-of-00001.safetensors"))
    assert_equal(read(snapshot), weights())
    with IMPORTER.open(snapshot) as checkpoint:
        assert checkpoint.metadata.side_file("tokenizer.json").read() == b"{}"


def test_closing_closes_the_files(tmp_path):
    folder = make_folder(tmp_path / "m")
    before = open_files()
    IMPORTER.open(folder).close()
    (folder / "a.safetensors").write_bytes(b"")
    (folder / "model.safetensors").rename(folder / "Z.safetensors")
    refusal(folder)
    assert open_files() == before


# Refusing


def test_an_empty_folder(tmp_path):
    assert IMPORTER.why_not(tmp_path) == refusal(tmp_path)
    assert "holds no .safetensors file" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "last.ckpt"])
def test_pickles_are_not_read_and_the_sentence_says_what_to_do(tmp_path, name):
    (tmp_path / name).write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match=r"never unpickles.*save_pretrained\(\.\.\., safe_serialization=True\)"):
        registry(hf).open(tmp_path)


@pytest.mark.parametrize("place", ["../secret.safetensors", "/etc/passwd", "..", "", "a\\b", "sub/m.safetensors"])
def test_a_weight_map_that_leads_out_of_the_folder(tmp_path, place):
    save_file(weights(), tmp_path / "secret.safetensors")
    folder = make_shards(tmp_path / "m", a=weights())
    write_index(folder, dict.fromkeys(weights(), place))
    assert IMPORTER.why_not(folder) is None
    assert f"{place!r} is no plain file name" in refusal(folder)


def test_a_link_out_of_the_folder(tmp_path):
    save_file(weights(), tmp_path / "secret.safetensors")
    folder = make_shards(tmp_path / "m", a=weights())
    (folder / "a.safetensors").unlink()
    (folder / "a.safetensors").symlink_to(tmp_path / "secret.safetensors")
    assert "'a.safetensors' is a link out of the folder" in refusal(folder)


@pytest.mark.parametrize("target", ["/etc/hostname", "missing", "notes.txt"])
def test_side_files_that_lead_out_of_the_folder_or_nowhere(tmp_path, target):
    folder = make_folder(tmp_path / "m")
    (folder / "notes.txt").symlink_to(target)
    assert "'notes.txt'" in refusal(folder)


def test_a_link_inside_the_folder_is_fine(tmp_path):
    folder = make_folder(tmp_path / "m", a__txt="text")
    (folder / "b.txt").symlink_to("a.txt")
    with IMPORTER.open(folder) as checkpoint:
        assert checkpoint.metadata.side_file("b.txt").read() == b"text"


def test_a_folder_in_place_of_weights(tmp_path):
    folder = make_shards(tmp_path / "m", a=weights())
    (folder / "a.safetensors").unlink()
    (folder / "a.safetensors").mkdir()
    assert "not a regular file" in refusal(folder)


def test_shards_that_are_missing_or_do_not_hold_their_tensors(tmp_path):
    folder = make_shards(tmp_path / "m", a=weights(), b={"x": torch.ones(1)})
    write_index(folder, {"model.norm.weight": "b.safetensors", "x": "b.safetensors"})
    assert "the index places tensor 'model.norm.weight' in b.safetensors" in refusal(folder)
    write_index(folder, {"y": "gone.safetensors"})
    assert "no readable file 'gone.safetensors'" in refusal(folder)
    write_index(folder, {})
    assert "names no weight file" in refusal(folder)
    write_index(folder, ["a.safetensors"])
    assert "has no weight_map" in refusal(folder)


def test_a_tensor_in_two_shards(tmp_path):
    folder = make_shards(tmp_path / "m", a={"x": torch.ones(1), "y": torch.ones(1)}, b={"x": torch.ones(1)})
    assert "tensor 'x' is in both" in refusal(folder)


def test_a_duplicate_in_the_index(tmp_path):
    folder = make_shards(tmp_path / "m", a=weights())
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "a", "x": "b"}}')
    assert "'x' occurs twice" in refusal(folder)


@pytest.mark.parametrize("config", ["[]", "{", '{"a": "\x01'])
def test_a_broken_config(tmp_path, config):
    folder = make_folder(tmp_path / "m")
    (folder / "config.json").write_text(config)
    assert IMPORTER.why_not(folder) is None
    assert "config.json" in refusal(folder)


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors", "mxfp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_other_quantizations_are_left_to_their_formats(tmp_path, method, nested):
    config = {"quantization_config": {"quant_method": method}}
    folder = make_folder(tmp_path / "m", config={"text_config": config} if nested else config)
    reason = IMPORTER.why_not(folder)
    assert f"quant_method {method!r}" in reason
    assert f"import format {method!r}" in reason
    assert refusal(folder) == reason


def test_a_native_folder_without_its_table_of_contents(tmp_path):
    folder = make_folder(tmp_path / "m", config={"quantization_config": {"quant_method": "lowbit"}})
    assert "its lowbit.json is missing" in IMPORTER.why_not(folder)


def test_other_files(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    assert "no .safetensors file" in IMPORTER.why_not(tmp_path / "a.gguf")
