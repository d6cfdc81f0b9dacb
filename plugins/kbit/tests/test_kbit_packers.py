"""The stream layouts keep what packers promise, and their words are those of a slow reading of the drawing in stream.cuh."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit import PackedTensor, ScaleFormat, Scheme
from lowbit.errors import WeightError
from lowbit.interfaces import MatmulProblem
from lowbit.scheme import Grid, Outliers, Zero
from lowbit.testing import PackerContract, samples
from lowbit.testing.contracts.checks import assert_same_quantized
from lowbit_kbit import streams
from lowbit_kbit.kernels import StreamKernel
from lowbit_kbit.packers import PACKERS, repack
from lowbit_kbit.streams import LAYOUTS, convert_stream, pack_stream, unpack_stream, word_count

EXAMPLES = [
    *((Scheme(Grid.CODEBOOK, bits, 64), (6, 160)) for bits in range(2, 9)),
    (Scheme(Grid.CODEBOOK, 3, 17, scales=ScaleFormat("float32")), (7, 51)),
    (Scheme(Grid.CODEBOOK, 4, 64, flat=True, scales=ScaleFormat("bfloat16")), (5, 30)),
    (Scheme(Grid.CODEBOOK, 5, 32, scales=ScaleFormat(bits=8, signed=True)), (3, 96)),
    (Scheme(Grid.AFFINE, 1, 32, Zero.INTEGER), (1, 1)),
]


class TestStreams(PackerContract):
    @pytest.fixture(params=PACKERS, ids=lambda packer: packer.layout)
    def packer(self, request):
        return request.param

    @pytest.fixture
    def examples(self):
        return EXAMPLES


def words_of_the_drawing(layout, codes, bits):
    """Return the words as Python integers, a code at a time."""
    words = [0] * (-(-len(codes) // (32 // bits)) if layout == "words" else -(-len(codes) * bits // 32))
    for index, code in enumerate(codes):
        if layout == "words":
            word, place = divmod(index, 32 // bits)
            words[word] |= code << bits * place
        else:
            for bit in range(bits):
                word, place = divmod(bits * index + bit, 32)
                words[word] |= (code >> bit & 1) << place
    return words


@settings(deadline=None, max_examples=60, derandomize=True)
@given(bits=st.integers(1, 8), count=st.integers(0, 1200), layout=st.sampled_from(LAYOUTS), seed=st.integers(0, 99))
def test_words_are_those_of_the_drawing(bits, count, layout, seed):
    codes = torch.randint(2**bits, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    words = pack_stream(layout, codes, bits)
    assert [int(word) & 0xFFFFFFFF for word in words] == words_of_the_drawing(layout, codes.tolist(), bits)
    assert len(words) == word_count(layout, bits, count)
    assert torch.equal(unpack_stream(layout, words, bits, count), codes)
    for other in LAYOUTS:
        assert torch.equal(convert_stream(layout, other, words, bits, count), pack_stream(other, codes, bits))


def test_pieces_change_nothing(monkeypatch):
    codes = torch.randint(8, (5000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole = {layout: pack_stream(layout, codes, 3) for layout in LAYOUTS}
    monkeypatch.setattr(streams, "_PIECE", 480)
    for layout in LAYOUTS:
        assert torch.equal(pack_stream(layout, codes, 3), whole[layout])
        assert torch.equal(unpack_stream(layout, whole[layout], 3, 5000), codes)


def test_the_words_of_the_hand_over_note():
    """Three bits: ten values in a word, and the next block goes on where the last one ended."""
    codes = torch.arange(64, dtype=torch.uint8) % 8
    words = pack_stream("words", codes, 3)
    assert len(words) == 7
    assert [int(words[3]) >> 3 * place & 7 for place in range(10)] == [code % 8 for code in range(30, 40)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_codes_out_of_range_are_refused(layout):
    with pytest.raises(WeightError, match="a code is 8, which does not fit 3 bits"):
        pack_stream(layout, torch.tensor([0, 8], dtype=torch.uint8), 3)


@pytest.mark.parametrize("scheme", [scheme for scheme, _ in EXAMPLES[:-1]], ids=Scheme.summary)
def test_repacking_is_exact(scheme):
    quantized = samples.quantized(scheme, (6, 160), 1)
    words, dense = (packer.pack(quantized) for packer in PACKERS)
    for packed, layout, expected in (
        (words, "kbit-dense", dense),
        (dense, "kbit-words", words),
        (dense, "kbit-dense", dense),
    ):
        found = repack(packed, layout)
        assert found.spec == expected.spec
        assert torch.equal(found.buffers["qweight"], expected.buffers["qweight"])
        packer = next(packer for packer in PACKERS if packer.layout == layout)
        assert_same_quantized(packer.unpack(found), quantized, layout)


def test_dirty_padding_changes_no_code():
    scheme = Scheme(Grid.CODEBOOK, 3, 64)
    quantized = samples.quantized(scheme, (2, 64), 1)
    packer = PACKERS[0]
    packed = packer.pack(quantized)
    dirty = packed.buffers["qweight"] | torch.tensor(0xC0000000 - (1 << 32), dtype=torch.int32)
    found = packer.unpack(PackedTensor(packed.spec, {**packed.buffers, "qweight": dirty}))
    assert_same_quantized(found, quantized, "dirty")


@pytest.mark.parametrize(
    ("scheme", "shape", "words"),
    [
        (Scheme(Grid.CODEBOOK, 12, 8, vector=8), (8, 64), "one code of 1 to 8 bits"),
        (Scheme(Grid.AFFINE, 4, 64, outliers=Outliers(0.1)), (8, 64), "no outliers"),
        (Scheme(Grid.CODEBOOK, 4, 64), (0, 64), "rows and columns, got 0x64"),
    ],
)
def test_what_a_stream_cannot_hold(scheme, shape, words):
    assert words in PACKERS[0].why_not(scheme, shape)


def test_the_kernel_says_why_not(monkeypatch):
    kernel = StreamKernel(PACKERS[0])
    problem = MatmulProblem("kbit-words", Scheme(Grid.CODEBOOK, 4, 64), (64, 64), torch.float16, "cuda", (9, 0))
    assert "runs layout 'kbit-words', not 'plain'" in kernel.why_not(MatmulProblem("plain", problem.scheme, (64, 64)))
    assert "not on cpu" in kernel.why_not(MatmulProblem("kbit-words", problem.scheme, (64, 64)))
    assert "affine 4-bit" in kernel.why_not(
        MatmulProblem("kbit-words", Scheme(Grid.AFFINE, 4), (64, 64), device="cuda")
    )
    old = MatmulProblem("kbit-words", problem.scheme, (64, 64), torch.float16, "cuda", (6, 1))
    assert "compute capability 6.1, and the CUDA kernels need 7.5" in kernel.why_not(old)
    monkeypatch.setenv("LOWBIT_CUDA", "0")
    assert "LOWBIT_CUDA=0 switches" in kernel.why_not(problem)
