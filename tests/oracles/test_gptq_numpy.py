"""GPTQ files against a reader and a packer of their own: plain numpy loops written from the format's description.

Nothing of lowbit takes part in the reading but the safetensors file that it wrote, and nothing in the writing at all.
"""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from lowbit import Grid, Metadata, ScaleFormat, Scheme, Zero, dequantize
from lowbit.testing import samples
from lowbit_formats.gptq import GptqExporter, GptqImporter
from lowbit_formats.gptq_layout import GptqPacker, GptqV2Packer

UP = "model.layers.0.mlp.up_proj"
SHAPE = (32, 96)


def field(words, place, bits):
    """Bits ``bits * place`` and on of a stream of 32-bit words, one bit at a time."""
    value = 0
    for bit in range(bits):
        position = bits * place + bit
        value |= (int(words[position // 32]) >> position % 32 & 1) << bit
    return value


def read_module(tensors, config):
    """Return the float32 weight (out, in): (q - z) * s, with z stored less one in version 1."""
    bits, offset = config["bits"], 1 if config["checkpoint_format"] == "gptq" else 0
    qweight, qzeros = (tensors[f"{UP}.{name}"].view(np.uint32) for name in ("qweight", "qzeros"))
    scales, g_idx = tensors[f"{UP}.scales"].astype(np.float32), tensors[f"{UP}.g_idx"]
    columns, rows = len(g_idx), qweight.shape[1]
    weight = np.zeros((rows, columns), dtype=np.float32)
    for row in range(rows):
        for column in range(columns):
            group = g_idx[column]
            zero = field(qzeros[group], row, bits) + offset
            weight[row, column] = np.float32(field(qweight[:, row], column, bits) - zero) * scales[group, row]
    return weight


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 64, None])
@pytest.mark.parametrize("zero", [Zero.SYMMETRIC, Zero.INTEGER])
@pytest.mark.parametrize("permutation", [False, True])
def test_what_lowbit_writes_is_read_with_the_same_bits(tmp_path, bits, group_size, zero, permutation):
    scheme = Scheme(Grid.AFFINE, bits, group_size, zero, permutation=permutation)
    quantized = samples.quantized(scheme, SHAPE, bits)
    packed = (GptqPacker() if scheme.symmetric else GptqV2Packer()).pack(quantized)
    name = f"{UP}.weight"
    GptqExporter().write(tmp_path / "out", {name: packed.spec}, iter([(name, packed)]), Metadata())
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    found = read_module(load_file(tmp_path / "out" / "model.safetensors"), config)
    assert torch.equal(torch.from_numpy(found), dequantize(quantized))


def pack_three_bits(codes):
    """AutoGPTQ's three words for 32 codes, as the format's description spells them out."""
    words = []
    for start in range(0, len(codes), 32):
        x = [int(code) for code in codes[start : start + 32]]
        words.append(sum(x[k] << 3 * k for k in range(10)) | (x[10] & 3) << 30)
        words.append(x[10] >> 2 & 1 | sum(x[11 + k] << 3 * k + 1 for k in range(10)) | (x[21] & 1) << 31)
        words.append(x[21] >> 1 & 3 | sum(x[22 + k] << 3 * k + 2 for k in range(10)))
    return words


def pack_codes(codes, bits):
    """2, 4 and 8 bits: 32 / bits codes to a word, the first lowest."""
    if bits == 3:
        return pack_three_bits(codes)
    each = 32 // bits
    return [sum(int(codes[start + k]) << bits * k for k in range(each)) for start in range(0, len(codes), each)]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("symmetric", [True, False])
def test_what_others_write_is_read_with_the_same_bits(tmp_path, bits, version, symmetric):
    random = np.random.default_rng(bits)
    (rows, columns), groups = SHAPE, 3
    codes = random.integers(0, 2**bits, (rows, columns))
    zeros = np.full((groups, rows), 2 ** (bits - 1)) if symmetric else random.integers(1, 2**bits, (groups, rows))
    scales = random.normal(size=(groups, rows)).astype(np.float16)
    g_idx = np.repeat(np.arange(groups), 32)[random.permutation(columns)].astype(np.int32)
    tensors = {
        f"{UP}.qweight": np.array([pack_codes(row, bits) for row in codes], dtype=np.uint32).T.view(np.int32).copy(),
        f"{UP}.qzeros": np.array([pack_codes(row - (version == 1), bits) for row in zeros], dtype=np.uint32),
        f"{UP}.scales": scales,
        f"{UP}.g_idx": g_idx,
    }
    tensors[f"{UP}.qzeros"] = tensors[f"{UP}.qzeros"].view(np.int32)
    folder = tmp_path / "it"
    folder.mkdir()
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, folder / "model.safetensors")
    said = {"quant_method": "gptq", "bits": bits, "group_size": 32, "sym": symmetric, "desc_act": True}
    said["checkpoint_format"] = "gptq" if version == 1 else "gptq_v2"
    (folder / "config.json").write_text(json.dumps({"quantization_config": said}))
    expected = (codes - zeros[g_idx].T).astype(np.float32) * scales[g_idx].T.astype(np.float32)
    with GptqImporter().open(folder) as checkpoint:
        packed = checkpoint.read(f"{UP}.weight")
    packer = GptqPacker() if packed.layout == "gptq" else GptqV2Packer()
    assert packed.scheme == Scheme(
        Grid.AFFINE,
        bits,
        32,
        Zero.SYMMETRIC if symmetric else Zero.INTEGER,
        ScaleFormat("float16"),
        permutation=True,
    )
    assert torch.equal(dequantize(packer.unpack(packed)), torch.from_numpy(expected))
