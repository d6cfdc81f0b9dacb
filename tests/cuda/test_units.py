"""Units on the CPU: slow readers, written from the drawings in the headers, find every code and scale where the device looks."""

import pytest
import torch

from lowbit_cuda.decoder import AFFINE, CODEBOOK, affine_decoder
from lowbit_cuda.errors import CudaError
from lowbit_cuda.units import UnitFormat, pack_units

MASK = 0xFFFFFFFF


def integers(bits, words):
    """Registers a[m][r] of one lane's chunk as ``affine.cuh`` computes them, as (even column, odd column)."""
    a = [[0] * 4 for _ in range(4)]
    if bits in (4, 5, 6):
        for m in range(4):
            low, high = words[m], words[m] >> 8
            a[m] = [low & 0x000F000F, high & 0x000F000F, (low & 0x00F000F0) >> 4, (high & 0x00F000F0) >> 4]
        if bits > 4:
            each, mask = 16 // (bits - 4), (1 << (bits - 4)) - 1
            for k in range(16):
                word, first = words[4 + k // each], (bits - 4) * (k % each)
                a[k // 4][k % 4] |= ((word >> first & mask) | (word >> 16 + first & mask) << 16) << 4
    elif bits == 3:
        w0, w1, w2 = words
        s0, s1, s2, s3 = w0 >> 9, w1 >> 8, w2 >> 8, w2 >> 7
        a[0] = [w & 0x00070007 for w in (w0, w1, w2, s0)]
        a[1] = [(w & 0x00380038) >> 3 for w in (w0, w1, w2, s0)]
        joint = (s3 & 0x01000100) | (s1 & 0x00800080) | (s0 & 0x00400040)
        a[2] = [(w & 0x01C001C0) >> 6 for w in (w0, w1, w2, joint)]
        a[3] = [(s1 & 0x000E000E) >> 1, (s2 & 0x000E000E) >> 1, (s1 & 0x00700070) >> 4, (s2 & 0x00700070) >> 4]
    elif bits == 8:
        for m in range(4):
            for half in range(2):
                word = words[2 * m + half]
                a[m][2 * half], a[m][2 * half + 1] = word & 0x00FF00FF, (word >> 8) & 0x00FF00FF
    else:
        mask, steps = (0x00030003, 4) if bits == 2 else (0x00010001, 8)
        for i in range(bits):
            for p in range(steps):
                m, r = (2 * i + p // 2, 2 * (p % 2)) if bits == 2 else (p // 2, 2 * (p % 2))
                a[m][r] = words[i] >> bits * p & mask
                a[m][r + 1] = words[i] >> 8 >> bits * p & mask
    return [[(value & 0xFFFF, value >> 16 & 0xFFFF) for value in row] for row in a]


def indices(bits, words):
    """The same for ``codebook.cuh``."""
    if bits > 4:
        return wide_indices(bits, words)
    each, fields = 32 // (2 * bits), []
    for number in range(16):
        if bits == 3 and number == 15:
            fields.append(words[0] >> 30 | (words[1] >> 28 & 12) | (words[2] >> 26 & 48))
        else:
            fields.append(words[number // each] >> 2 * bits * (number % each) & (1 << 2 * bits) - 1)
    pairs = [(field & (1 << bits) - 1, field >> bits) for field in fields]
    return [pairs[4 * m : 4 * m + 4] for m in range(4)]


def wide_indices(bits, words):
    """Single codes, and those of the spare bits."""
    each = 32 // bits
    rest = sum(word >> each * bits << 32 % bits * i for i, word in enumerate(words))
    codes = [words[number // each] >> bits * (number % each) for number in range(each * bits)]
    codes += [rest >> bits * number for number in range(32 - each * bits)]
    codes = [code & (1 << bits) - 1 for code in codes]
    return [[tuple(codes[2 * (4 * m + r) : 2 * (4 * m + r) + 2]) for r in range(4)] for m in range(4)]


@pytest.mark.parametrize("decoder", [*AFFINE.values(), *CODEBOOK.values()], ids=lambda decoder: decoder.name)
def test_every_code_is_where_the_decoder_looks(decoder):
    generator = torch.Generator().manual_seed(decoder.bits)
    codes = torch.randint(2**decoder.bits, (16, 256), dtype=torch.uint8, generator=generator)
    scales = torch.randn(16, 2, generator=generator).half()
    format = UnitFormat(decoder, 128)
    unit = pack_units(format, codes, scales)[0, 0]
    assert len(unit) == format.nbytes
    slabs = unit[: 512 * decoder.bits].view(torch.int32).view(decoder.bits, 32, 4)
    found = torch.full((16, 256), 255, dtype=torch.uint8)
    read = integers if decoder.integer else indices
    for lane in range(32):
        g, t = divmod(lane, 4)
        words = [int(word) & MASK for word in slabs[:, lane].flatten()]
        for chunk in range(4):
            for m, registers in enumerate(read(decoder.bits, words[chunk * decoder.bits : (chunk + 1) * decoder.bits])):
                for r, pair in enumerate(registers):
                    column = 64 * chunk + 32 * (m // 2) + 8 * t + 4 * (m % 2) + 2 * (r // 2)
                    found[g + 8 * (r % 2), column] = pair[0]
                    found[g + 8 * (r % 2), column + 1] = pair[1]
    assert torch.equal(found, codes)
    stored = unit[512 * decoder.bits :].view(torch.float16).view(8, 2, 2)  # (g, group, row half)
    assert torch.equal(stored[:, :, 0], scales[:8])
    assert torch.equal(stored[:, :, 1], scales[8:])


def test_ragged_shapes_are_padded_with_zeros_and_zeros_follow_the_scales():
    codes, scales = torch.full((18, 300), 3, dtype=torch.uint8), torch.ones(18, 10).half()
    units = pack_units(UnitFormat(AFFINE[4], 32, offset="ZEROS"), codes, scales, scales * 2)
    assert units.shape == (2, 2, 2048 + 2 * 256)
    tail = units[1, 1, 2048:].view(torch.float16).view(2, 8, 8, 2)  # (scales or zeros, g, group, row half)
    assert torch.equal(tail[0, :2, :2, 0], torch.ones(2, 2).half())
    assert torch.equal(tail[1, :2, :2, 0], torch.full((2, 2), 2.0).half())
    assert int((tail != 0).sum()) == 8


def test_seven_bits_are_stored_as_eight():
    assert [affine_decoder(bits).bits for bits in range(1, 9)] == [1, 2, 3, 4, 5, 6, 8, 8]


@pytest.mark.parametrize(
    ("group", "dtype", "offset"),
    [(48, torch.float16, "ZEROS"), (128, torch.bfloat16, "ZEROS"), (64, torch.float16, "")],
)
def test_what_no_kernel_has_is_refused(group, dtype, offset):
    with pytest.raises(ValueError, match=r"must be one of|are float16 or float32"):
        UnitFormat(AFFINE[4], group, dtype, offset)


def test_offsets_must_fit_the_format():
    with pytest.raises(ValueError, match="ZEROS need values"):
        pack_units(
            UnitFormat(AFFINE[4], 128, offset="ZEROS"), torch.zeros(16, 256, dtype=torch.uint8), torch.zeros(16, 2)
        )


def test_codes_out_of_range_are_refused():
    codes = torch.zeros(16, 256, dtype=torch.uint8)
    codes[3, 7] = 9
    with pytest.raises(CudaError, match="code 9 does not fit the 3 bits"):
        pack_units(UnitFormat(AFFINE[3], 128), codes, torch.zeros(16, 2))
