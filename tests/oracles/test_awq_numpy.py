"""AWQ files against a reader and a packer of their own: plain numpy loops written from the format's description."""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from lowbit import Grid, Metadata, Scheme, Zero, dequantize
from lowbit.testing import samples
from lowbit_formats.awq import AwqExporter, AwqImporter
from lowbit_formats.awq_layout import AwqPacker

UP = "model.layers.0.mlp.up_proj"
SHAPE = (24, 96)
NIBBLE = (0, 4, 1, 5, 2, 6, 3, 7)
"""Output column 8c + k sits in nibble NIBBLE[k] of word c."""


def read_module(tensors, group_size):
    """Return the float32 weight (out, in)."""
    qweight, qzeros = (tensors[f"{UP}.{name}"].view(np.uint32) for name in ("qweight", "qzeros"))
    scales = tensors[f"{UP}.scales"].astype(np.float32)
    columns, rows = len(qweight), scales.shape[1]
    weight = np.zeros((rows, columns), dtype=np.float32)
    for column in range(columns):
        group = column // group_size
        for row in range(rows):
            shift = 4 * NIBBLE[row % 8]
            code, zero = (int(words[row // 8]) >> shift & 15 for words in (qweight[column], qzeros[group]))
            weight[row, column] = np.float32(code - zero) * scales[group, row]
    return weight


@pytest.mark.parametrize("group_size", [32, 48, None])
@pytest.mark.parametrize("zero", [Zero.SYMMETRIC, Zero.INTEGER])
def test_what_lowbit_writes_is_read_with_the_same_bits(tmp_path, group_size, zero):
    quantized = samples.quantized(Scheme(Grid.AFFINE, 4, group_size, zero), SHAPE)
    packed, name = AwqPacker().pack(quantized), f"{UP}.weight"
    AwqExporter().write(tmp_path / "out", {name: packed.spec}, iter([(name, packed)]), Metadata())
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    size = SHAPE[1] if config["group_size"] == -1 else config["group_size"]
    found = read_module(load_file(tmp_path / "out" / "model.safetensors"), size)
    assert torch.equal(torch.from_numpy(found), dequantize(quantized))


def pack_rows(values):
    """Pack (n, out) into (n, out / 8) words."""
    words = np.zeros((len(values), values.shape[1] // 8), dtype=np.uint32)
    for index, row in enumerate(values):
        for column, value in enumerate(row):
            words[index, column // 8] |= np.uint32(int(value) << 4 * NIBBLE[column % 8])
    return words.view(np.int32)


@pytest.mark.parametrize("symmetric", [True, False])
def test_what_others_write_is_read_with_the_same_bits(tmp_path, symmetric):
    random = np.random.default_rng(0)
    (rows, columns), groups = SHAPE, 3
    codes = random.integers(0, 16, (rows, columns))
    zeros = np.full((groups, rows), 8) if symmetric else random.integers(0, 16, (groups, rows))
    scales = random.normal(size=(groups, rows)).astype(np.float16)
    folder = tmp_path / "it"
    folder.mkdir()
    tensors = {f"{UP}.qweight": pack_rows(codes.T), f"{UP}.qzeros": pack_rows(zeros), f"{UP}.scales": scales}
    save_file(tensors, folder / "model.safetensors")
    said = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
    (folder / "config.json").write_text(json.dumps({"quantization_config": said}))
    group = np.arange(columns) // 32
    expected = (codes - zeros[group].T).astype(np.float32) * scales[group].T.astype(np.float32)
    with AwqImporter().open(folder) as checkpoint:
        packed = checkpoint.read(f"{UP}.weight")
    assert packed.scheme.symmetric == symmetric
    assert torch.equal(dequantize(AwqPacker().unpack(packed)), torch.from_numpy(expected))
