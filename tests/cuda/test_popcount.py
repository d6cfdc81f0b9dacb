"""Products of signs: the packing and the arithmetic of popcount.cuh on a CPU, lane by lane; on a GPU the kernel against float64."""

import pytest

pytest.importorskip("cuda.core", reason='cuda-core is not installed (pip install "lowbit[gpu]")')

import torch

from lowbit_cuda.arch import ARCHITECTURES, capability_of
from lowbit_cuda.popcount import Popcount, PopcountShape, pack_signs, unpack_signs

HALF, BF16, FLOAT = torch.float16, torch.bfloat16, torch.float32
LANE = torch.arange(32)
gpu = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
SHAPES = [  # columns, rows, planes
    (4096, 1024, 1),
    (8192, 520, 1),
    (4096, 14336, 2),
    (32, 16, 1),
    (1024, 100, 3),
    (11008, 250, 1),  # 43 units: the last warp has one of three
    (28672, 130, 1),
    (4096, 40000, 1),  # several batches of sums
    (12288, 64, 4),
    (1000, 33, 2),
]


def on_gpu(function):
    for mark in gpu:
        function = mark(function)
    return function


def random_bits(*shape, seed=0, device="cpu"):
    source = torch.Generator(device).manual_seed(seed)
    return torch.randint(2, shape, dtype=torch.uint8, device=device, generator=source)


def words_of(signs):
    """(tile, unit, plane, lane, word) as int64, without sign."""
    return signs.view(torch.int32).view(*signs.shape[:3], 32, 4).long() & 0xFFFFFFFF


def place(column):
    """Where popcount.cuh draws a column of a unit: k [ g0 | t1 t0 | i1 i0 i2 g2 g1 ]."""
    g, t, i = column >> 5, column >> 3 & 3, column & 7
    return (g & 1) << 7 | t << 5 | (i & 3) << 3 | (i >> 2) << 2 | g >> 1


def exchange(words, low_mask, shift, distance):
    """``exchange`` of bit_planes.cuh for all lanes: words (2, 32)."""
    mask, upper = (1 << 32) - 1, (LANE & distance) > 0
    low = words[0] & low_mask | words[1] << shift & ~low_mask & mask
    high = words[0] >> shift & low_mask | words[1] & ~low_mask & mask
    other = torch.where(upper, low, high)[LANE ^ distance]
    return torch.stack((torch.where(upper, other, low), torch.where(upper, high, other)))


def to_planes(integers):
    """``to_planes`` of bit_planes.cuh: 256 integers -> words (plane half, word, lane)."""
    bits = (integers & 0xFFFF).view(32, 8)  # lane, i
    found = []
    for part in range(2):
        byte = bits >> 8 * part & 0xFF
        words = torch.stack([sum(byte[:, 4 * half + i] << 8 * i for i in range(4)) for half in range(2)])
        for mask, shift, distance in ((0x0F0F0F0F, 4, 16), (0x33333333, 2, 8), (0x55555555, 1, 4)):
            words = exchange(words, mask, shift, distance)
        found.append(words)
    return torch.stack(found)


def test_every_sign_lies_where_the_drawing_says():
    bits = random_bits(2, 20, 300)
    words = words_of(pack_signs(bits))
    assert words.shape == (2, 2, 2, 32, 4)
    for plane, row, column in ((0, 0, 0), (1, 19, 299), (0, 7, 255), (1, 8, 256), (0, 15, 77), (1, 3, 130)):
        k = place(column % 256)
        lane, word = 4 * (row % 8) + (k >> 5 & 3), 2 * (k >> 7) + row % 16 // 8
        assert words[row // 16, column // 256, plane, lane, word] >> (k & 31) & 1 == bits[plane, row, column]
    assert sorted(place(column) for column in range(256)) == list(range(256))
    padding = words_of(pack_signs(torch.ones(1, 20, 300, dtype=torch.uint8)))
    assert sum(int(word).bit_count() for word in padding.flatten()) == 20 * 300


@pytest.mark.parametrize("shape", [(1, 16, 256), (3, 5, 40), (2, 130, 1000)])
def test_signs_come_back(shape):
    bits = random_bits(*shape, seed=1)
    assert torch.equal(unpack_signs(pack_signs(bits), shape[1:]), bits)


def test_planes_meet_the_signs_of_their_columns():
    """Exchanges between lanes put bit j of column c at the k of c, and the counts give the integer product."""
    integers = torch.randint(-32767, 32768, (256,), generator=torch.Generator().manual_seed(2))
    integers[:3] = torch.tensor([-32767, 32767, 0])
    planes = to_planes(integers)
    k_of = torch.tensor([place(column) for column in range(256)])
    for column in range(256):
        k = int(k_of[column])
        for j in range(16):  # plane j % 8 of part j // 8 is in the lanes 4 * (j % 8) + t
            word = planes[j // 8, k >> 7, 4 * (j % 8) + (k >> 5 & 3)]
            assert word >> (k & 31) & 1 == (int(integers[column]) >> j & 1)
    bits = random_bits(1, 16, 256, seed=3)
    words = words_of(pack_signs(bits))[0, 0, 0]
    for row in (0, 5, 8, 15):
        total = 0
        for j in range(16):
            count = 0
            for t in range(4):
                a, b = words[4 * (row % 8) + t], planes[j // 8, :, 4 * (j % 8) + t]
                count += sum((int(a[2 * half + row // 8]) & int(b[half])).bit_count() for half in range(2))
            total += count * (-(2**15) if j == 15 else 2**j)
        expected = int(((bits[0, row].long() * 2 - 1) * integers).sum())
        assert 2 * total - int(integers.sum()) == expected


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    "shape",
    [
        PopcountShape(4096, 14336),
        PopcountShape(8192, 28672, dependent=True),
        PopcountShape(8192, 4096, 8, 2, BF16),
        PopcountShape(1000, 100, 3, 4, FLOAT, HALF, scaled=True),
        PopcountShape(32768, 4096),
    ],
    ids=lambda shape: f"{shape.in_features}-{shape.tokens}-{shape.planes}",
)
def test_products_of_signs_compile(shape, arch, tmp_path_factory, monkeypatch):
    monkeypatch.setenv("LOWBIT_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "kernels"))
    capability = capability_of(arch)
    if reason := shape.why_not(capability):
        assert capability < (8, 0) or "shared memory" in reason
        assert capability not in {(9, 0), (10, 0)}
    else:
        assert len(shape.program(capability).compile(arch).code) > 1000


def test_what_does_not_fit_is_refused_by_a_sentence():
    assert "8.0" in PopcountShape(4096, 64).why_not((7, 5))
    assert "multiple of 8" in PopcountShape(4100, 64).why_not((9, 0))
    assert "at most 8192 with 8 rows" in PopcountShape(16384, 64, 8).why_not((9, 0))
    assert "float16" in PopcountShape(4096, 64, dtype=torch.float64).why_not((9, 0))
    assert "got 9 and 1" in PopcountShape(4096, 64, 9).why_not((9, 0))
    assert "shared memory" in PopcountShape(65536, 64).why_not((9, 0))
    assert [PopcountShape(columns, 64).most_tokens((9, 0)) for columns in (4096, 8192, 16384, 32768)] == [8, 8, 4, 2]


def problem(columns, rows, planes, tokens, dtype):
    """Return signs, scales, x and the float64 weight planes on the GPU."""
    bits = random_bits(planes, rows, columns, seed=rows, device="cuda")
    scales = torch.rand(planes, rows, device="cuda") + 0.1
    x = torch.randn(tokens, columns, device="cuda").to(dtype)
    return pack_signs(bits), scales, x, (bits.double() * 2 - 1) * scales.double()[..., None]


def assert_close(out, x, weights, bias, slice_columns):
    """Half a step for each activation (0.51 with the rounding of the factor), float32 sums of warps, one rounding of the result."""
    x, exact = x.double(), bias.double()
    bound = torch.zeros_like(exact)
    padded = torch.nn.functional.pad(x, (0, -x.shape[1] % slice_columns)).view(len(x), -1, slice_columns)
    columns = torch.full((padded.shape[1],), slice_columns, device=x.device)
    columns[-1] -= padded.shape[1] * slice_columns - x.shape[1]
    steps = padded.abs().amax(-1) / 32767
    for weight in weights:
        product = x @ weight.T
        exact = exact + product
        bound = bound + 0.51 * ((steps * columns).sum(1, keepdim=True) * weight[:, 0].abs())
        bound = bound + 32 * 2.0**-24 * (x.abs() @ weight.abs().T)
    bound = bound + torch.finfo(out.dtype).eps / 2 * (exact.abs() + bound) + 2.0**-24
    error = (out.double() - exact).abs()
    assert bool((error <= bound).all()), f"{float((error / bound).max())} times the bound"
    assert float(error.norm() / exact.norm()) < torch.finfo(out.dtype).eps + 1e-4


def sliced(shape):
    return shape.each * 256


@on_gpu
@pytest.mark.parametrize("dependent", [False, True])
@pytest.mark.parametrize(("columns", "rows", "planes"), SHAPES)
def test_popcount_equals_float64(columns, rows, planes, dependent):
    for tokens, dtype in ((1, HALF), (1, BF16), (2, HALF), (3, BF16), (8, HALF), (5, FLOAT)):
        shape = PopcountShape(columns, rows, tokens, planes, dtype, dependent=dependent)
        if reason := shape.why_not(torch.cuda.get_device_capability()):
            assert "with" in reason or "shared memory" in reason
            continue
        signs, scales, x, weights = problem(columns, rows, planes, tokens, dtype)
        bias = torch.randn(rows, device="cuda").to(dtype)
        product = Popcount(shape)
        out, again = torch.full((2, tokens, rows), float("nan"), device="cuda", dtype=dtype)
        product(signs, scales, x, out, bias)
        assert_close(out, x, weights, bias, sliced(shape))
        product(signs, scales, x, again, bias)
        assert torch.equal(out, again)


@on_gpu
def test_columns_are_scaled_and_the_result_has_its_own_dtype():
    shape = PopcountShape(1000, 200, 3, dtype=BF16, out_dtype=FLOAT, scaled=True)
    signs, scales, x, weights = problem(1000, 200, 1, 3, BF16)
    columns = torch.rand(1000, device="cuda") + 0.5
    out = torch.empty(3, 200, device="cuda")
    Popcount(shape)(signs, scales, x, out, None, columns)
    assert_close(out, x.float() * columns, weights, torch.zeros(200, device="cuda"), sliced(shape))


@on_gpu
def test_rows_of_x_and_of_the_result_may_lie_apart():
    signs, scales, _, weights = problem(4096, 100, 1, 4, HALF)
    x, out = torch.randn(4, 5000, device="cuda").half()[:, :4096], torch.zeros(4, 300, device="cuda").half()
    shape = PopcountShape(4096, 100, 4)
    Popcount(shape)(signs, scales, x, out[:, :100])
    assert_close(out[:, :100], x, weights, torch.zeros(100, device="cuda"), sliced(shape))
    assert not out[:, 100:].any()


@on_gpu
def test_extreme_activations():
    """Zeros give the bias, tiny numbers zero, the largest ones themselves; what is not finite is never lost, in its own row only."""
    signs, scales, _, weights = problem(512, 64, 1, 4, BF16)
    x = torch.zeros(4, 512, device="cuda", dtype=BF16)
    x[1], x[2, 3], x[3, 300] = 1e-38, 3e38, float("nan")
    out, bias = torch.empty(4, 64, device="cuda", dtype=BF16), torch.randn(64, device="cuda").to(BF16)
    product = Popcount(PopcountShape(512, 64, 4, dtype=BF16))
    product(signs, scales, x, out, bias)
    assert torch.equal(out[:2], bias.expand(2, -1))
    expected = x[2:3].double() @ weights[0].T
    assert bool(((out[2].double() - expected).abs() <= 2.0**-8 * expected.abs() + 0.01 * 3e38 / 32767 + 4).all())
    assert out[3].isnan().all()
    x[3, 300] = float("inf")
    product(signs, scales, x, out, bias)
    assert not out[3].isfinite().any()


@on_gpu
def test_a_captured_launch_reads_x_anew():
    signs, scales, x, weights = problem(4096, 1024, 1, 1, HALF)
    shape = PopcountShape(4096, 1024, dependent=True)
    product, out = Popcount(shape), torch.empty(1, 1024, device="cuda", dtype=HALF)
    product(signs, scales, x, out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        product(signs, scales, x, out)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert_close(out, x, weights, torch.zeros(1024, device="cuda"), sliced(shape))
