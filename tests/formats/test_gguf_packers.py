"""Every GGUF layout: what it accepts, and that unpacking gives back what was packed, bit for bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.errors import SchemeError, WeightError
from lowbit.interfaces import MatmulProblem
from lowbit.kernels import ReferenceKernel
from lowbit.parts import part_specs
from lowbit.scheme import Grid, Outliers, Rotation, ScaleFormat, Scheme, Zero
from lowbit.tensors import QuantizedTensor, bit_equal
from lowbit_formats.gguf import PACKERS

BY_LAYOUT = {packer.layout: packer for packer in PACKERS}
layouts = pytest.mark.parametrize("packer", PACKERS, ids=lambda packer: packer.layout)


def random_parts(packer, shape, seed):
    """Parts with every bit pattern that they may hold, scales of NaN and infinity among them."""
    generator = torch.Generator().manual_seed(seed)
    parts = {}
    for name, spec in part_specs(packer.scheme, shape).items():
        if name == "codebook":
            parts[name] = packer.codebook
            continue
        raw = torch.randint(0, 256, (*spec.shape, spec.dtype.itemsize), dtype=torch.uint8, generator=generator)
        if name in ("codes", "planes"):
            count = packer.scheme.code_count if name == "codes" else 2
            parts[name] = (raw.squeeze(-1).int() % count).to(torch.uint8)
        elif spec.dtype in (torch.uint8, torch.int8):
            bits, signed = packer.scheme.scales.bits, spec.dtype == torch.int8
            units = (raw.squeeze(-1).int() % 2**bits) - (2 ** (bits - 1) if signed else 0)
            parts[name] = units.to(spec.dtype)
        else:
            parts[name] = raw.view(spec.dtype).squeeze(-1)
    return QuantizedTensor(packer.scheme, shape, parts)


@layouts
@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 5), blocks=st.integers(1, 3), seed=st.integers(0, 2**32 - 1))
def test_unpack_undoes_pack(packer, rows, blocks, seed):
    quantized = random_parts(packer, (rows, blocks * packer.type.weights), seed)
    packed = packer.pack(quantized)
    again = packer.unpack(packed)
    assert again.parts.keys() == quantized.parts.keys()
    for name, part in quantized.parts.items():
        assert bit_equal(again.parts[name], part), name


@layouts
def test_pieces_of_a_large_weight_meet(packer):
    """More rows than one worker takes at a time."""
    quantized = random_parts(packer, (1 << 12, 512), seed=1)
    whole = packer.pack(quantized).buffers["blocks"]
    for row in (0, 2047, 2048, 4095):
        parts = {
            name: part[:, row : row + 1] if packer.scheme.grid is Grid.BINARY else part[row : row + 1]
            for name, part in quantized.parts.items()
            if name != "codebook"
        }
        if packer.codebook is not None:
            parts["codebook"] = packer.codebook
        alone = packer.pack(QuantizedTensor(packer.scheme, (1, 512), parts)).buffers["blocks"]
        assert torch.equal(alone[0], whole[row])


@layouts
def test_unaligned_views_pack_alike(packer):
    quantized = random_parts(packer, (3, 512), seed=2)
    shifted = {}
    for name, part in quantized.parts.items():
        storage = torch.empty(part.numel() + 1, dtype=part.dtype)
        shifted[name] = storage[1:].view(part.shape).copy_(part)
    unaligned = packer.pack(QuantizedTensor(packer.scheme, (3, 512), shifted))
    assert torch.equal(unaligned.buffers["blocks"], packer.pack(quantized).buffers["blocks"])


@layouts
def test_specs_announce_the_buffers(packer):
    shape = (3, 512)
    spec = packer.spec(packer.scheme, shape)
    assert spec.buffers["blocks"].shape == (3, 512 // packer.type.weights * packer.type.nbytes)
    assert packer.pack(random_parts(packer, shape, 0)).spec == spec


@layouts
def test_refuses_rows_that_are_not_whole_blocks(packer):
    assert packer.why_not(packer.scheme, (4, packer.type.weights)) is None
    reason = packer.why_not(packer.scheme, (4, packer.type.weights + 16))
    assert str(packer.type.weights) in reason
    assert str(packer.type.weights + 16) in reason
    assert packer.why_not(packer.scheme, (0, packer.type.weights)) is not None


@layouts
def test_refuses_every_other_packers_scheme(packer):
    for other in PACKERS:
        if other.scheme != packer.scheme:
            assert packer.type.name in packer.why_not(other.scheme, (4, 512))


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme(Grid.AFFINE, 4, 32, scales=ScaleFormat("bfloat16")),
        Scheme(Grid.AFFINE, 4, 32, Zero.INTEGER),
        Scheme(Grid.AFFINE, 4, 128),
        Scheme(Grid.AFFINE, 4, None),
        Scheme(Grid.AFFINE, 4, 32, levels=15),
        Scheme(Grid.AFFINE, 4, 32, outliers=Outliers(0.01)),
        Scheme(Grid.AFFINE, 4, 32, rotation=Rotation(32)),
        Scheme(Grid.AFFINE, 4, 32, permutation=True),
        Scheme(Grid.AFFINE, 4, 32, flat=True),
    ],
    ids=lambda scheme: scheme.summary(),
)
def test_q4_0_refuses_near_relatives(scheme):
    assert "Q4_0 holds affine 4-bit g32 weights" in BY_LAYOUT["gguf-q4_0"].why_not(scheme, (4, 512))


def test_the_reason_names_what_summaries_do_not_show():
    flat = Scheme(Grid.AFFINE, 4, 32, flat=True)
    assert "flat=True" in BY_LAYOUT["gguf-q4_0"].why_not(flat, (4, 512))


@layouts
def test_codes_out_of_range_raise(packer):
    """A code that bleeds into its neighbour would be a wrong file without an error."""
    quantized = random_parts(packer, (2, 512), seed=3)
    name = "planes" if packer.scheme.grid is Grid.BINARY else "codes"
    limit = 2 if name == "planes" else packer.scheme.code_count
    if limit == 256:
        return
    broken = quantized.parts[name].clone()
    broken[..., 7] = limit
    with pytest.raises(WeightError, match=str(limit)):
        packer.pack(QuantizedTensor(packer.scheme, (2, 512), {**quantized.parts, name: broken}))


@pytest.mark.parametrize(
    ("layout", "value"), [("gguf-q2_k", 16), ("gguf-q4_k", 64), ("gguf-q5_k", 64), ("gguf-q3_k", 32)]
)
def test_sub_scales_out_of_range_raise(layout, value):
    packer = BY_LAYOUT[layout]
    quantized = random_parts(packer, (2, 512), seed=4)
    broken = quantized.parts["scales"].clone()
    broken[1, 3] = value
    with pytest.raises(WeightError):
        packer.pack(QuantizedTensor(packer.scheme, (2, 512), {**quantized.parts, "scales": broken}))


@pytest.mark.parametrize("layout", ["gguf-iq4_nl", "gguf-mxfp4"])
def test_another_codebook_is_refused(layout):
    packer = BY_LAYOUT[layout]
    quantized = random_parts(packer, (2, 512), seed=5)
    parts = {**quantized.parts, "codebook": torch.linspace(-1, 1, 16).unsqueeze(1)}
    with pytest.raises(SchemeError, match="fixed codebook"):
        packer.pack(QuantizedTensor(packer.scheme, (2, 512), parts))


@layouts
def test_finite_scales_are_told_from_others(packer):
    quantized = random_parts(packer, (2, 512), seed=6)
    finite = {
        name: torch.ones(part.shape).to(part.dtype) if part.is_floating_point() and name != "codebook" else part
        for name, part in quantized.parts.items()
    }
    assert not packer.not_finite(packer.pack(QuantizedTensor(packer.scheme, (2, 512), finite)))
    for name, part in finite.items():
        if part.is_floating_point() and name != "codebook":
            spoiled = part.float()
            spoiled.view(-1)[-1] = float("nan")
            parts = {**finite, name: spoiled.to(part.dtype)}
            assert packer.not_finite(packer.pack(QuantizedTensor(packer.scheme, (2, 512), parts))), name


@layouts
def test_each_layout_has_its_plain_torch_kernel(packer):
    kernel = ReferenceKernel(packer)
    assert kernel.why_not(MatmulProblem(packer.layout, packer.scheme, (4, 512))) is None
    assert kernel.dequantize(packer.pack(random_parts(packer, (4, 512), 7))).shape == (4, 512)


def test_q4_0_bytes_by_hand():
    """d = 2, codes 0..15 then 15..0: byte e holds code e low and code e + 16 high."""
    codes = torch.cat((torch.arange(16), torch.arange(15, -1, -1))).to(torch.uint8).view(1, 32)
    parts = {"codes": codes, "scales": torch.tensor([[2.0]], dtype=torch.float16)}
    packer = BY_LAYOUT["gguf-q4_0"]
    blocks = packer.pack(QuantizedTensor(packer.scheme, (1, 32), parts)).buffers["blocks"][0].tolist()
    assert blocks == [0x00, 0x40, *((15 - e) << 4 | e for e in range(16))]


def test_q2_0_mirrors_codes():
    """Q2_0 means d * (c - 1): codes 0..3 with d = 3 are -3, 0, 3, 6. The symmetric grid has them as -3 * (q - 2), q = 3 - c."""
    packer = BY_LAYOUT["gguf-q2_0"]
    codes = torch.tensor([[3, 2, 1, 0] * 16], dtype=torch.uint8)
    quantized = QuantizedTensor(
        packer.scheme, (1, 64), {"codes": codes, "scales": torch.tensor([[-3.0]], dtype=torch.float16)}
    )
    packed = packer.pack(quantized)
    assert packed.buffers["blocks"][0].tolist() == [0x00, 0x42, *[0b11_10_01_00] * 16]
    assert ReferenceKernel(packer).dequantize(packed)[0, :4].tolist() == [-3, 0, 3, 6]


def test_q1_0_bits_are_signs():
    packer = BY_LAYOUT["gguf-q1_0"]
    planes = torch.zeros(1, 1, 128, dtype=torch.uint8)
    planes[0, 0, [0, 9]] = 1
    parts = {"planes": planes, "scales": torch.full((1, 1, 1), 0.5, dtype=torch.float16)}
    packed = packer.pack(QuantizedTensor(packer.scheme, (1, 128), parts))
    assert packed.buffers["blocks"][0, 2:].tolist() == [1, 2, *[0] * 14]
    assert ReferenceKernel(packer).dequantize(packed)[0, :2].tolist() == [0.5, -0.5]
