"""Importance matrices: what is written is read back, what is damaged or of another model is refused."""

import struct
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch

from lowbit.errors import CheckpointError, OptionError
from lowbit.interfaces import Calibration
from lowbit.metadata import Metadata
from lowbit.parts import TensorSpec
from lowbit.plugins import installed
from lowbit_formats import imatrix
from lowbit_formats.gguf import GgufExporter, GgufImporter

METADATA = Metadata({"model_type": "llama", "num_hidden_layers": 1})
UP, DOWN = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"
GGML_UP, GGML_DOWN = "blk.0.ffn_up.weight", "blk.0.ffn_down.weight"
IMPORTANCE = {UP: torch.arange(1, 5) / 4, DOWN: torch.arange(1, 9) / 8}


def checkpoint(path, up=4, down=8, metadata=METADATA):
    shapes = {UP: (8, up), DOWN: (4, down), "model.norm.weight": (4,)}
    entries = {name: TensorSpec(torch.bfloat16, shape) for name, shape in shapes.items()}
    return SimpleNamespace(path=path, entries=entries, metadata=metadata)


def write_gguf(path, tensors, kind="imatrix"):
    """Write a file as llama-imatrix does, by the gguf package."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(kind)
    writer.add_array("imatrix.datasets", ["wiki.txt"])
    writer.add_uint32("imatrix.chunk_count", 3)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, values in tensors.items():
        writer.add_tensor(name, np.asarray(values, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_dat(path, entries, tail=True):
    """Write llama.cpp's older format: entries of (name, calls, values)."""
    data = struct.pack("<i", len(entries))
    for name, calls, values in entries:
        data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, len(values))
        data += np.asarray(values, np.float32).tobytes()
    if tail:
        data += struct.pack("<ii", 3, 8) + b"wiki.txt"
    path.write_bytes(data)
    return path


def test_written_and_read_back(tmp_path):
    path = tmp_path / "imatrix.gguf"
    imatrix.write_imatrix(path, IMPORTANCE, METADATA, tokens=1024, datasets=["a.txt", "b.txt"])
    found = imatrix.read_imatrix(path)
    assert (found.tokens, found.datasets, found.chunk_size) == (1024, ("a.txt", "b.txt"), 512)
    assert found.importance.keys() == {GGML_UP, GGML_DOWN}
    calibration = GgufImporter().calibration(path, checkpoint(tmp_path / "model"))
    assert calibration.keys() == IMPORTANCE.keys()
    assert all(torch.equal(calibration[name].importance, values) for name, values in IMPORTANCE.items())


def test_written_as_llama_imatrix_writes(tmp_path):
    path = tmp_path / "imatrix.gguf"
    imatrix.write_imatrix(path, IMPORTANCE, METADATA, tokens=1000, datasets=["a.txt"])
    reader = gguf.GGUFReader(path)
    assert reader.fields["general.type"].contents() == "imatrix"
    assert reader.fields["imatrix.chunk_count"].contents() == 2
    assert reader.fields["imatrix.datasets"].contents() == ["a.txt"]
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert list(tensors) == sorted(tensors, key=lambda name: (name.rpartition(".")[0], name.endswith("counts")))
    assert tensors[f"{GGML_UP}.in_sum2"].shape.tolist() == [4, 1]
    assert tensors[f"{GGML_UP}.in_sum2"].data.ravel().tolist() == [250, 500, 750, 1000]
    assert tensors[f"{GGML_UP}.counts"].data.ravel().tolist() == [1000]


def test_sums_are_divided_by_counts(tmp_path):
    tensors = {f"{GGML_UP}.in_sum2": [[2, 4, 6, 8]], f"{GGML_UP}.counts": [[4]]}
    unseen = {f"{GGML_DOWN}.in_sum2": [[0] * 8], f"{GGML_DOWN}.counts": [[0]]}
    found = imatrix.read_imatrix(write_gguf(tmp_path / "i.gguf", tensors | unseen))
    assert found.importance[GGML_UP].tolist() == [0.5, 1, 1.5, 2]
    assert found.importance[GGML_DOWN].tolist() == [1] * 8, "what no token reached: every column alike"
    assert (found.datasets, found.chunk_size, found.tokens) == (("wiki.txt",), 512, 4)


@pytest.mark.parametrize("tail", [True, False])
def test_the_older_format(tmp_path, tail):
    path = write_dat(tmp_path / "imatrix.dat", [(GGML_UP, 2, [2, 4, 6, 8]), (GGML_DOWN, 0, [1] * 8)], tail)
    found = imatrix.read_imatrix(path)
    assert found.importance[GGML_UP].tolist() == [1, 2, 3, 4]
    assert found.importance[GGML_DOWN].tolist() == [1] * 8
    assert found.datasets == (("wiki.txt",) if tail else ())
    assert imatrix.calibration(path, checkpoint(tmp_path)).keys() == {UP, DOWN}


def test_matrices_that_the_file_does_not_know_are_left_out(tmp_path):
    path = write_gguf(tmp_path / "i.gguf", {f"{GGML_UP}.in_sum2": [[1] * 4], f"{GGML_UP}.counts": [[1]]})
    assert imatrix.calibration(path, checkpoint(tmp_path)).keys() == {UP}


def test_other_files_are_not_taken_for_one(tmp_path):
    model = write_gguf(tmp_path / "model.gguf", {GGML_UP: [[1.0]]}, kind="model")
    (tmp_path / "text.dat").write_bytes(b"An importance matrix is a table of mean squares.")
    (tmp_path / "short.dat").write_bytes(b"\1\0\0\0")
    for path in (model, tmp_path / "text.dat", tmp_path / "short.dat"):
        assert imatrix.calibration(path, checkpoint(tmp_path)) is None


def test_another_number_of_columns_names_the_tensor(tmp_path):
    path = tmp_path / "i.gguf"
    imatrix.write_imatrix(path, IMPORTANCE, METADATA, tokens=1)
    with pytest.raises(CheckpointError, match=f"8 columns for {GGML_DOWN}, and {DOWN} has 16"):
        imatrix.calibration(path, checkpoint(tmp_path, down=16))


def test_another_model_is_refused(tmp_path):
    path = write_gguf(tmp_path / "i.gguf", {"blk.7.ffn_up.weight.in_sum2": [[1]], "blk.7.ffn_up.weight.counts": [[1]]})
    with pytest.raises(CheckpointError, match="names no matrix of model"):
        imatrix.calibration(path, checkpoint(tmp_path / "model"))
    unknown = Metadata({"model_type": "rwkv", "num_hidden_layers": 1})
    with pytest.raises(CheckpointError, match="'rwkv' model has no such names"):
        imatrix.calibration(path, checkpoint(tmp_path, metadata=unknown))


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        ({f"{GGML_UP}.in_sum2": [[1] * 4]}, "does not come with both"),
        ({f"{GGML_UP}.counts": [[1]]}, "does not come with both"),
        ({GGML_UP: [[1] * 4]}, "does not come with both"),
        ({f"{GGML_UP}.in_sum2": [[1] * 4] * 2, f"{GGML_UP}.counts": [[1]] * 2}, "stacks 2 experts"),
        ({f"{GGML_UP}.in_sum2": [[-1] * 4], f"{GGML_UP}.counts": [[1]]}, "negative, NaN or infinite"),
        ({f"{GGML_UP}.in_sum2": [[float("nan")] * 4], f"{GGML_UP}.counts": [[1]]}, "negative, NaN or infinite"),
        ({f"{GGML_UP}.in_sum2": [[1] * 4], f"{GGML_UP}.counts": [[-1]]}, "sum over -1 tokens"),
        ({f"{GGML_UP}.in_sum2": [[1] * 4], f"{GGML_UP}.counts": [[float("nan")]]}, "sum over nan tokens"),
    ],
)
def test_damaged_files_are_refused(tmp_path, tensors, sentence):
    with pytest.raises(CheckpointError, match=sentence):
        imatrix.read_imatrix(write_gguf(tmp_path / "i.gguf", tensors))


def test_truncated_files_are_refused(tmp_path):
    whole = write_dat(tmp_path / "whole.dat", [(GGML_UP, 2, [2, 4, 6, 8])], tail=False).read_bytes()
    for length in (3, 6, 20, 30, len(whole) - 1):
        (tmp_path / "cut.dat").write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="truncated"):
            imatrix.read_imatrix(tmp_path / "cut.dat")


@pytest.mark.parametrize("entry", [(GGML_UP, 1, []), (GGML_DOWN, 1, [1.0])], ids=["empty", "twice"])
def test_impossible_entries_are_refused(tmp_path, entry):
    path = write_dat(tmp_path / "i.dat", [(GGML_DOWN, 1, [1.0]), entry])
    with pytest.raises(CheckpointError, match=r"is empty|there twice"):
        imatrix.read_imatrix(path)


def test_names_without_a_place_in_ggml_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot hold model\.vision\.weight"):
        imatrix.write_imatrix(tmp_path / "i.gguf", {"model.vision.weight": torch.ones(4)}, METADATA, tokens=1)
    assert list(tmp_path.iterdir()) == []


def measured(**changes):
    values = {UP: IMPORTANCE[UP], DOWN: IMPORTANCE[DOWN], **changes}
    return {name: Calibration(importance=importance) for name, importance in values.items()}


def test_the_exporter_writes_what_the_importer_reads(tmp_path):
    """The mean is stored as a sum: it comes back within one rounding of float32, and exactly for a power of two."""
    for tokens in (4096, 1000):
        path, opened = tmp_path / f"{tokens}.gguf", checkpoint(tmp_path / "model")
        values = {UP: torch.rand(4), DOWN: torch.rand(8)}
        GgufExporter().write_calibration(path, measured(**values), opened, tokens, "wiki.txt")
        found = GgufImporter().calibration(path, opened)
        for name, value in values.items():
            assert torch.allclose(found[name].importance, value, rtol=0 if tokens == 4096 else 2.0**-23, atol=0), name
        again = imatrix.read_imatrix(path)
        assert (again.tokens, again.datasets) == (tokens, ("wiki.txt",))


@pytest.mark.parametrize(
    ("changes", "tokens", "sentence"),
    [
        (
            {UP: torch.ones(5)},
            8,
            r"importance of model\.layers\.0\.mlp\.up_proj\.weight is of shape \(5,\), .* 4 columns",
        ),
        ({"model.norm.weight": torch.ones(4)}, 8, r"cannot hold model\.norm\.weight: .* no such matrix"),
        ({UP: torch.tensor([1.0, -2.0, 1.0, 1.0])}, 8, r"up_proj\.weight: one is -2"),
        ({UP: torch.tensor([1.0, float("nan"), 1.0, 1.0])}, 8, r"up_proj\.weight: one is nan"),
        ({}, 0, "got 0"),
        ({UP: None, DOWN: None}, 8, "no weight has an importance"),
    ],
)
def test_measurements_that_are_refused(tmp_path, changes, tokens, sentence):
    with pytest.raises(CheckpointError, match=sentence):
        GgufExporter().write_calibration(tmp_path / "i.gguf", measured(**changes), checkpoint(tmp_path), tokens)
    assert list(tmp_path.iterdir()) == []


def test_the_suffix_of_a_calibration_file_names_its_format(tmp_path):
    registry, opened = installed(), checkpoint(tmp_path)
    registry.write_calibration(tmp_path / "i.gguf", measured(), opened, 64)
    assert registry.calibration(tmp_path / "i.gguf", opened).keys() == {UP, DOWN}
    with pytest.raises(OptionError, match=r"i\.dat names no kind of calibration file; installed formats write \.gguf"):
        registry.write_calibration(tmp_path / "i.dat", measured(), opened, 64)
