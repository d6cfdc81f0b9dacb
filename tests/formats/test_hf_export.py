"""Format hf, writing: folders that other tools read, complete or not at all."""

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowbit.errors import OutputError
from lowbit.metadata import Metadata, SideFile
from lowbit.parts import TensorSpec
from lowbit.tensors import bit_equal
from lowbit.testing import ExporterContract
from lowbit_formats import native
from lowbit_formats.hf import HfExporter, HfImporter

IMPORTER, EXPORTER = HfImporter(), HfExporter()
NOTHING = Metadata()


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


def read(path):
    assert IMPORTER.why_not(path) is None
    with IMPORTER.open(path) as checkpoint:
        found = dict(checkpoint.stream())
        assert {name: TensorSpec.of(tensor) for name, tensor in found.items()} == checkpoint.entries
    return found


def entries_of(tensors):
    return {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}


def export(path, tensors, metadata=NOTHING, **options):
    EXPORTER.write(path, entries_of(tensors), iter(tensors.items()), metadata, **options)
    return path


def assert_equal(left, right):
    assert left.keys() == right.keys()
    assert all(bit_equal(left[name], right[name]) for name in left)


class TestExporter(ExporterContract):
    @pytest.fixture
    def exporter(self):
        return EXPORTER

    @pytest.fixture
    def importer(self):
        return IMPORTER


def test_what_is_written_reads_back(tmp_path):
    side = (SideFile("tokenizer.json", content=b"{}"), SideFile("extra/notes.txt", content=b"n"))
    metadata = Metadata({"model_type": "llama", "torch_dtype": "float32"}, side)
    folder = export(tmp_path / "out", weights(), metadata)
    assert_equal(read(folder), weights())
    assert_equal(load_file(folder / "model.safetensors"), weights())
    assert (folder / "extra" / "notes.txt").read_bytes() == b"n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    with IMPORTER.open(folder) as checkpoint:
        assert checkpoint.metadata.config == {"model_type": "llama", "torch_dtype": "bfloat16"}


def test_shards_are_written_with_their_index(tmp_path):
    folder = export(tmp_path / "out", weights(), shard_size=200)
    assert (folder / "model.safetensors.index.json").is_file()
    assert len(list(folder.glob("model-*-of-00003.safetensors"))) == 3
    assert_equal(read(folder), weights())


def test_a_folder_is_copied_side_files_and_all(tmp_path):
    source = tmp_path / "m"
    source.mkdir()
    save_file(weights(), source / "model.safetensors")
    (source / "merges.txt").write_text("a b")
    with IMPORTER.open(source) as checkpoint:
        EXPORTER.write(tmp_path / "out", checkpoint.entries, checkpoint.stream(), checkpoint.metadata)
    assert (tmp_path / "out" / "merges.txt").read_text() == "a b"
    assert_equal(read(tmp_path / "out"), weights())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, as transformers and accelerate import it
def test_transformers_loads_what_is_written(tmp_path):
    transformers = pytest.importorskip("transformers")
    assert "transformers" in {rule.loader for rule in EXPORTER.loaders()}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=20, num_key_value_heads=2, tie_word_embeddings=False, **sizes)
    tensors = {name: tensor.bfloat16() for name, tensor in transformers.LlamaForCausalLM(config).state_dict().items()}
    folder = export(tmp_path / "out", tensors, Metadata(config.to_dict()), shard_size=4000)
    assert len(list(folder.glob("*.safetensors"))) > 2
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert_equal(dict(loaded.state_dict()), tensors)


def test_no_config_is_written_where_none_is_known(tmp_path):
    assert not (export(tmp_path / "out", weights()) / "config.json").exists()


def test_an_interrupt_in_the_stream_leaves_nothing(tmp_path):
    def stream():
        yield next(iter(weights().items()))
        raise KeyboardInterrupt

    before = open_files()
    with pytest.raises(KeyboardInterrupt):
        EXPORTER.write(tmp_path / "out", entries_of(weights()), stream(), NOTHING)
    assert not list(tmp_path.iterdir())
    assert open_files() == before


@pytest.mark.parametrize("exporter", [HfExporter(), native.NativeExporter()])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch, exporter):
    written, pwrite = [], os.pwrite

    def full(file, data, offset):
        if written:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(len(data))
        return pwrite(file, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OutputError, match="the disk is full"):
        exporter.write(tmp_path / "out", entries_of(weights()), iter(weights().items()), NOTHING)
    assert written
    assert not list(tmp_path.iterdir())
