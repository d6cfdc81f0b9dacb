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


def read_units(format, units, rows, columns):
    """Return codes uint8 (rows, columns), and scales and offsets float32 of the same shape, from the drawing of unit.cuh."""
    tiles, across, bits = units.shape[0], units.shape[1], format.decoder.bits
    words = units[..., : 512 * bits].contiguous().view(torch.int32).view(tiles, across, bits, 32, 4)
    words = words.transpose(2, 3).reshape(tiles, across, 32, 4, bits)  # (tile, unit, lane, chunk, word)
    codes = torch.zeros(16 * tiles, 256 * across, dtype=torch.uint8, device=units.device)
    lane, view = torch.arange(32, device=units.device), codes.view(tiles, 16, across, 4, 64)  # of (.., chunk, column)
    for fragment, register, code in ((m, r, c) for m in range(4) for r in range(4) for c in range(2)):
        places = format.decoder.places(fragment, register, code)
        found = sum((words[..., word] >> place & 1) << bit for bit, (word, place) in enumerate(places))
        row = lane // 4 + 8 * (register % 2)
        column = 32 * (fragment // 2) + 8 * (lane % 4) + 4 * (fragment % 2) + 2 * (register // 2) + code
        view[:, row, :, :, column] = found.permute(2, 0, 1, 3).to(torch.uint8)
    kept = units[..., 512 * bits :].contiguous().view(format.scale_dtype).float()
    kept = kept.view(tiles, across, -1, 8, format.groups, 2)  # (tile, unit, scales or offsets, g, group, row half)
    column = torch.arange(256, device=units.device)
    group = column // 32 * 2 + column % 8 // 4 if format.group_size == 16 else column // format.group_size
    spread = kept.permute(2, 0, 5, 3, 1, 4)[..., group].reshape(kept.shape[2], 16 * tiles, 256 * across)
    scales, offsets = spread[0], spread[1] if len(spread) > 1 else None
    return codes[:rows, :columns], scales[:rows, :columns], None if offsets is None else offsets[:rows, :columns]
