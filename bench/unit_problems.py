"""Random weights in units, with what float64 says of them."""

from dataclasses import dataclass

import torch

from lowbit_cuda.decoder import AFFINE, CODEBOOK, Decoder
from lowbit_cuda.units import UnitFormat, pack_units

HALF, BF16, FLOAT = torch.float16, torch.bfloat16, torch.float32
WEIGHTS = [  # decoder, group, scales, offsets, columns, rows
    (AFFINE[4], 128, HALF, "CONSTANT", 4096, 1024),
    (AFFINE[4], 128, HALF, "ZEROS", 4096, 1000),
    (AFFINE[4], 32, HALF, "ZEROS", 1088, 720),
    (AFFINE[4], 32, FLOAT, "MINIMUMS", 4096, 512),
    (AFFINE[4], 128, HALF, "CONSTANT", 14336, 512),  # a cluster of 2
    (AFFINE[4], 64, HALF, "ZEROS", 11008, 512),  # 43 units: the last warp has half
    (AFFINE[4], 128, HALF, "CONSTANT", 28672, 256),  # a cluster of 4
    (AFFINE[3], 128, HALF, "CONSTANT", 4096, 1024),
    (AFFINE[3], 64, HALF, "ZEROS", 8192, 250),
    (AFFINE[2], 128, HALF, "CONSTANT", 8192, 1024),
    (AFFINE[2], 64, FLOAT, "MINIMUMS", 2048, 96),
    (AFFINE[1], 128, HALF, "CONSTANT", 4096, 512),
    (AFFINE[8], 64, HALF, "ZEROS", 2048, 512),
    (AFFINE[5], 128, HALF, "CONSTANT", 1024, 130),
    (AFFINE[6], 32, FLOAT, "MINIMUMS", 1024, 48),
    (CODEBOOK[4], 64, HALF, "CONSTANT", 4096, 1024),
    (CODEBOOK[4], 32, FLOAT, "CONSTANT", 576, 100),
    (CODEBOOK[3], 64, FLOAT, "CONSTANT", 4096, 1024),
    (CODEBOOK[3], 64, HALF, "CONSTANT", 14336, 500),
    (CODEBOOK[2], 64, HALF, "CONSTANT", 4096, 1024),
    (CODEBOOK[5], 64, HALF, "CONSTANT", 4096, 1024),
    (CODEBOOK[6], 32, FLOAT, "CONSTANT", 576, 100),
    (CODEBOOK[7], 128, HALF, "CONSTANT", 2048, 250),
    (CODEBOOK[8], 64, HALF, "CONSTANT", 1088, 130),
]


@dataclass
class Problem:
    """A weight in units, and the same in float32 as the formats define it."""

    format: UnitFormat
    units: torch.Tensor
    weight: torch.Tensor
    codebook: torch.Tensor | None
    zero: float

    def options(self):
        return {"zero": self.zero, "codebook": self.codebook}


def problem(decoder: Decoder, group, scale_dtype, offset, columns, rows, device="cuda"):
    generator = torch.Generator(device).manual_seed(decoder.bits * rows)
    normal = lambda *shape: torch.randn(shape, device=device, generator=generator)
    codes = torch.randint(2**decoder.bits, (rows, columns), dtype=torch.uint8, device=device, generator=generator)
    groups = -(-columns // group)
    scales, offsets, codebook = normal(rows, groups).mul(0.01).to(scale_dtype), None, None
    if offset == "ZEROS":
        offsets = torch.randint(2**decoder.bits, (rows, groups), device=device, generator=generator).to(scale_dtype)
    elif offset == "MINIMUMS":
        offsets = normal(rows, groups).mul(0.05).to(scale_dtype)
    if not decoder.integer:
        codebook = normal(2**decoder.bits).sort().values
    zero = float(2 ** (decoder.bits - 1))
    format = UnitFormat(decoder, group, scale_dtype, offset)
    spread = lambda values: values.float().repeat_interleave(group, 1)[:, :columns]
    if codebook is not None:
        weight = codebook[codes.long()] * spread(scales)
    elif offset == "MINIMUMS":
        weight = codes.float() * spread(scales) + spread(offsets)
    else:
        weight = (codes.float() - (spread(offsets) if offsets is not None else zero)) * spread(scales)
    return Problem(format, pack_units(format, codes, scales, offsets), weight, codebook, zero)


def assert_close(found, x, weight, bias):
    """float32 sums; x in fp16 at 2^(p + 4) below one at worst; weights or entries in fp16; one rounding of the output."""
    weight = weight.double()
    expected = x.double() @ weight.T + bias.double()
    eps = torch.finfo(x.dtype).eps
    magnitude = x.double().abs() @ weight.abs().T
    bound = (weight.shape[1] * 2.0**-24 + 2.0**-11) * magnitude + eps * expected.abs() + 2.0**-15 * weight.abs().sum(1)
    error = (found.double() - expected).abs()
    assert bool((error <= bound).all()), f"{float((error / bound).max())} times the bound"
    assert float(error.norm() / expected.norm()) < eps  # the bound is loose for the sums; this is not
