"""The quantizer ``ggml`` against ggml's own: errors no larger than its, and the same bytes where it does not search."""

import pytest
import torch

from lowbit.grids import dequantize
from lowbit.interfaces import Calibration
from lowbit.tensors import PackedTensor
from lowbit.testing.weights import gaussian, heavy_tailed
from lowbit_formats.ggml import GgmlQuantizer
from lowbit_formats.ggml.options import TYPES, GgmlOptions
from lowbit_formats.gguf import PACKERS

SHAPE = (128, 2048)
PACKER_OF = {packer.type.name.lower(): packer for packer in PACKERS}
SAME_BYTES = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "mxfp4", "tq1_0", "tq2_0")
"""ggml rounds these without a search."""
IGNORE_IMPORTANCE = ("q8_0", "mxfp4", "tq1_0", "tq2_0")


def laplace(seed):
    uniform = torch.rand(SHAPE, generator=torch.Generator().manual_seed(seed)) - 0.5
    return -uniform.sign() * torch.log1p(-2 * uniform.abs() + 1e-7)


def scaled_channels(seed):
    """Rows and columns of very different magnitude, as in trained models."""
    source = torch.Generator().manual_seed(seed)
    columns, rows = torch.randn(1, SHAPE[1], generator=source), torch.randn(SHAPE[0], 1, generator=source)
    return gaussian(SHAPE, seed) * columns.exp() * (rows / 2).exp()


def all_positive(seed):
    return 0.5 + torch.rand(SHAPE, generator=torch.Generator().manual_seed(seed))


def through_bfloat16(seed):
    """Eight bits of mantissa: many weights of a group have the same magnitude, and many quotients are halves."""
    return gaussian(SHAPE, seed).bfloat16().float()


KINDS = {
    "gaussian": lambda seed: gaussian(SHAPE, seed),
    "laplace": laplace,
    "heavy-tailed": lambda seed: heavy_tailed(SHAPE, seed),
    "scaled-channels": scaled_channels,
    "all-positive": all_positive,
    "bfloat16": through_bfloat16,
}


def importance(seed):
    """Mean squares as in trained models: most columns alike, a few a hundred times larger."""
    return torch.exp(1.5 * torch.randn(SHAPE[1], generator=torch.Generator().manual_seed(seed)))


def theirs(ggml, name, weight, factors):
    packer = PACKER_OF[name]
    raw = ggml.quantize(packer.type.id, weight.numpy(), None if factors is None else factors.numpy())
    return PackedTensor(packer.spec(packer.scheme, SHAPE), {"blocks": torch.from_numpy(raw)})


def squared_error(weight, decoded, factors):
    error = (decoded - weight).double().square()
    return float((error if factors is None else error * factors).mean())


@pytest.mark.parametrize("calibrated", [False, True], ids=["plain", "imatrix"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TYPES)
def test_error_is_no_worse(name, kind, calibrated, ggml):
    """Mean squared error; with an importance matrix, the error that it weighs, which is what both then minimize."""
    weight = KINDS[kind](seed=1)
    factors = importance(2) if calibrated else None
    calibration = Calibration(importance=factors) if calibrated else None
    ours = dequantize(GgmlQuantizer().quantize(weight, GgmlOptions(name), calibration))
    reference = dequantize(PACKER_OF[name].unpack(theirs(ggml, name, weight, factors)))
    assert squared_error(weight, ours, factors) <= 1.01 * squared_error(weight, reference, factors)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SAME_BYTES)
def test_same_bytes(name, kind, ggml):
    weight = KINDS[kind](seed=3)
    weight[0, :64] = 0
    weight[1, ::2] = -weight[1, 1::2]  # every extreme twice, with both signs
    ours = PACKER_OF[name].pack(GgmlQuantizer().quantize(weight, GgmlOptions(name))).buffers["blocks"]
    assert torch.equal(ours, theirs(ggml, name, weight, None).buffers["blocks"])


@pytest.mark.parametrize("name", IGNORE_IMPORTANCE)
def test_types_that_ignore_importance(name, ggml):
    weight = gaussian(SHAPE, 4)
    quantized = GgmlQuantizer().quantize(weight, GgmlOptions(name), Calibration(importance=importance(5)))
    ours = PACKER_OF[name].pack(quantized).buffers["blocks"]
    assert torch.equal(ours, theirs(ggml, name, weight, importance(5)).buffers["blocks"])
