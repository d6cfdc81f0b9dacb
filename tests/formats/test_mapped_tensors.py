"""Tensors in pages of their file: the same bits, private to the process, whatever happens to the file's name."""

import mmap

import pytest
import torch
from safetensors.torch import save_file

from lowbit.tensors import bit_equal
from lowbit_formats.safetensors_files import SafetensorsReader


@pytest.fixture
def stored(tmp_path):
    """A file of large tensors, an odd one before them, and what it holds."""
    values = {
        "odd": torch.arange(13, dtype=torch.uint8),
        "words": torch.randint(-(2**31), 2**31, (257, 129), dtype=torch.int32),
        "scales": torch.randn(300, 200).half(),
    }
    save_file(values, tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors", values


def test_mapped_is_read(stored):
    path, values = stored
    with SafetensorsReader(path) as reader:
        mapped = {name: reader.map(name) for name in values}
    assert all(bit_equal(mapped[name], value) for name, value in values.items())


def test_large_tensors_take_no_copy(stored, monkeypatch):
    path, _ = stored
    with SafetensorsReader(path) as reader:
        monkeypatch.setattr(reader, "read", None)
        assert reader.map("words").shape == (257, 129)


def test_writing_changes_neither_file_nor_neighbours(stored):
    path, values = stored
    before = path.read_bytes()
    with SafetensorsReader(path) as reader:
        mine, other = reader.map("words"), reader.map("words")
        mine.zero_()
        assert bit_equal(other, values["words"])
    assert path.read_bytes() == before


def test_a_file_that_was_replaced_stays_readable(stored):
    path, values = stored
    with SafetensorsReader(path) as reader:
        mapped = reader.map("words")
    path.unlink()
    path.write_bytes(b"another")
    assert bit_equal(mapped, values["words"])


def test_what_cannot_be_mapped_is_read(stored, monkeypatch):
    path, values = stored

    def refuse(*_, **__):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", refuse)
    with SafetensorsReader(path) as reader:
        assert bit_equal(reader.map("words"), values["words"])
