"""kbit on a GPU: every code and every scale equals the CPU's, bit for bit; streams and dequantization too. ``make test-gpu``."""

import dataclasses

import pytest
import torch

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

import lowbit.plugins
import lowbit_kbit
from lowbit import PackedTensor, QuantizedTensor, QuantLinear, ScaleFormat, Scheme
from lowbit.errors import WeightError
from lowbit.kernels import ReferenceKernel
from lowbit.scheme import Grid, ScaleCoding
from lowbit.tensors import bit_equal
from lowbit.testing import KernelContract, samples, weights
from lowbit.testing.contracts.checks import assert_same_quantized
from lowbit_cuda.errors import CudaError
from lowbit_cuda.plugin import UnitsKernel
from lowbit_kbit import launches
from lowbit_kbit.codebooks import fixed_codebook
from lowbit_kbit.kernels import StreamKernel
from lowbit_kbit.options import KbitOptions
from lowbit_kbit.packers import PACKERS, repack
from lowbit_kbit.quantizer import KbitQuantizer
from lowbit_kbit.spread import quantize_over
from lowbit_kbit.streams import LAYOUTS, convert_stream, pack_stream, unpack_stream

QUANTIZER = KbitQuantizer()
GROUPS = (16, 17, 24, 32, 48, 64, 100, 128, 256, 500, 1024, 4096, None)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def compare(weight, options, what=""):
    expected = QUANTIZER.quantize(weight, options)
    found = QUANTIZER.quantize(weight.cuda(), options)
    assert all(part.is_cuda for part in found.parts.values())
    assert_same_quantized(found, expected, f"{options} {tuple(weight.shape)} {weight.dtype} {what}")
    return found


@pytest.fixture
def launched(monkeypatch):
    """Count the launches of the quantize kernel, so that no test passes by the way round."""
    seen = []
    kept = launches.quantize
    monkeypatch.setattr(launches, "quantize", lambda *args, **named: (seen.append(args[2]), kept(*args, **named)))
    return seen


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("codebook", ["int", "nf", "fp", "learned"])
def test_every_element_equals_the_reference(bits, codebook, launched):
    """The diagnostic of the hand-over note: no share of the elements, all of them."""
    for index, group in enumerate(GROUPS):
        columns = 4096 if (group or 0) > 500 else 2 * (group or 150) + (0, 0, 5, 16)[index % 4]
        scale, dtype = ("absmax", "signed")[(bits + index) % 2], DTYPES[index % 3]
        options = KbitOptions(bits, group, codebook, scale, ("float16", "bfloat16", "float32")[(bits + index) % 3])
        compare(gaussian(5 + index, columns, seed=index).to(dtype), options)
    assert len(launched) == len(GROUPS)


@pytest.mark.parametrize("kind", sorted(weights.AWKWARD))
@pytest.mark.parametrize("scale", ["absmax", "signed", "search"])
def test_awkward_weights(kind, scale, launched):
    for dtype in DTYPES:
        for scale_dtype in ("float32", "bfloat16"):
            weight = weights.AWKWARD[kind]((6, 96), 32, 0).to(dtype)
            if bool(torch.isfinite(weight).all()):
                compare(weight, KbitOptions(3, 32, "nf", scale, scale_dtype, candidates=4), kind)
    assert launched


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_half_float_and_the_edges_of_float32(dtype, launched):
    """All finite 16-bit patterns: subnormals, both zeros, the largest; in float32 the patterns around each power of two."""
    if dtype is torch.float32:
        powers = torch.arange(-149, 128).double().exp2().float()
        values = torch.cat([powers, powers.nextafter(torch.tensor(0.0)), powers.nextafter(torch.tensor(torch.inf))])
        values = torch.cat([values, -values])
    else:
        values = torch.arange(-(2**15), 2**15).short().view(dtype)
    values = values[torch.isfinite(values)]
    for seed, rule in enumerate(("absmax", "signed")):
        order = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))
        weight = values[torch.cat((order, order[: -len(order) % 64]))].view(-1, 64)
        sorted_too = torch.cat((weight, values.sort().values[: len(values) // 64 * 64].view(-1, 64)))
        compare(sorted_too, KbitOptions(4, 16, "nf", rule, "float32"))
        compare(sorted_too, KbitOptions(8, 64, "learned", rule, "float32"))
    assert len(launched) == 4


def test_views_and_offsets(launched):
    base = torch.zeros(64, 200).half()
    base[::2, 3:163] = gaussian(32, 160).half()
    options = KbitOptions(4, 32, "nf", "signed")
    expected = QUANTIZER.quantize(base[::2, 3:163], options)
    for view in (base.cuda()[::2, 3:163], base.T.contiguous().cuda().T[::2, 3:163]):
        assert_same_quantized(QUANTIZER.quantize(view, options), expected, "a view")
    assert len(launched) == 2


def test_user_codebooks_doubled_entries_and_searches_by_halves(launched):
    for entries in (
        "-1/-0.5/-0.5/-0.5/-0.5/-0.5/0.3/1",
        "0/1e-30/1e-25/1e-20/1e-15/1e-10/1e-5/1",
        "-1/-.9/-.8/0/0/0/.1/1",
    ):
        options = KbitOptions(3, 64, "user", "signed", "float32", entries=entries)
        compare(gaussian(40, 512), options)
    assert len(launched) == 3


@pytest.mark.parametrize("scale", ["absmax", "signed", "search"])
def test_second_levels_stochastic_rounding_and_searches(scale, launched):
    for rounding in ("nearest", "stochastic"):
        for scale_bits in (None, 8, 6):
            options = KbitOptions(3, 48, "nf", scale, "float32", scale_bits, 5, rounding, seed=9)
            for shape in ((7, 160), (64, 192)):
                compare(gaussian(*shape, seed=3).bfloat16(), options)
    options = KbitOptions(4, 64, "learned", scale, candidates=5)
    compare(gaussian(33, 256), options)
    assert len(launched) == 13


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("scale", ["absmax", "signed", "search"])
def test_non_finite_weights_are_refused(value, scale):
    weight = gaussian(64, 256).half().cuda()
    weight[63, 255] = value
    with pytest.raises(WeightError, match="holds NaN or infinity"):
        QUANTIZER.quantize(weight, KbitOptions(4, 64, "nf", scale))


def test_scales_beyond_the_dtype_are_refused():
    weight = gaussian(64, 256).cuda()
    weight[2, 5] = -70000.0
    for scale in ("absmax", "signed", "search"):
        with pytest.raises(WeightError, match=r"a scale of -?70000, beyond 65504, the largest float16"):
            QUANTIZER.quantize(weight, KbitOptions(4, 64, "nf", scale))


def test_without_the_kernels_the_bits_are_the_same(monkeypatch, launched):
    weight, options = gaussian(16, 256).half(), KbitOptions(4, 64, "learned", "signed")
    with_kernels = QUANTIZER.quantize(weight.cuda(), options)
    monkeypatch.setenv("LOWBIT_CUDA", "0")
    assert_same_quantized(QUANTIZER.quantize(weight.cuda(), options), with_kernels, "LOWBIT_CUDA=0")
    assert len(launched) == 1


@pytest.mark.parametrize("bits", range(1, 9))
def test_streams_equal_those_of_the_cpu(bits):
    for count in (1, 7, 8, 31, 32, 33, 100, 1000, 4096 * 3 + 5):
        codes = torch.randint(2**bits, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(count))
        for layout in LAYOUTS:
            words = pack_stream(layout, codes, bits)
            found = pack_stream(layout, codes.cuda(), bits)
            assert torch.equal(found.cpu(), words), (layout, bits, count)
            assert torch.equal(unpack_stream(layout, found, bits, count).cpu(), codes)
            for other in LAYOUTS:
                there = convert_stream(layout, other, found, bits, count)
                assert torch.equal(there.cpu(), pack_stream(other, codes, bits)), (layout, other, bits, count)
    if bits < 8:
        with pytest.raises(WeightError, match=f"does not fit {bits} bits"):
            pack_stream("words", torch.full((9,), 2**bits, dtype=torch.uint8, device="cuda"), bits)


def on_gpu(packed):
    return PackedTensor(packed.spec, {name: buffer.cuda() for name, buffer in packed.buffers.items()})


SCHEMES = [
    *(Scheme(Grid.CODEBOOK, bits, 64) for bits in range(1, 9)),
    Scheme(Grid.CODEBOOK, 3, 17, scales=ScaleFormat("float32")),
    Scheme(Grid.CODEBOOK, 5, 24, scales=ScaleFormat("bfloat16")),
    Scheme(Grid.CODEBOOK, 4, None),
    Scheme(Grid.CODEBOOK, 4, 64, flat=True),
    Scheme(Grid.CODEBOOK, 4, 32, scales=ScaleFormat("float32", 8, signed=True)),
    Scheme(Grid.CODEBOOK, 4, 16, scales=ScaleFormat("float16", 6, 3)),
    Scheme(Grid.CODEBOOK, 4, 64, flat=True, scales=ScaleFormat("float32", 8, 4, coding=ScaleCoding.CODEBOOK)),
    Scheme(Grid.CODEBOOK, 6, 20, scales=ScaleFormat("bfloat16", 8, 3, coding=ScaleCoding.AFFINE)),
]


@pytest.mark.parametrize("packer", PACKERS, ids=lambda packer: packer.layout)
@pytest.mark.parametrize("scheme", SCHEMES, ids=Scheme.summary)
def test_dequantized_weights_equal_the_reference_bit_for_bit(packer, scheme):
    for shape in ((3, 192), (7, 99), (130, 256), (1, 5)):
        packed = packer.pack(samples.quantized(scheme, shape, 2))
        kernel, reference = StreamKernel(packer), ReferenceKernel(packer)
        for dtype in (*DTYPES, torch.float64):
            found = kernel.dequantize(on_gpu(packed), dtype)
            assert bit_equal(found.cpu(), reference.dequantize(packed, dtype)), (shape, dtype)


def test_repacking_on_the_gpu_is_exact():
    quantized = samples.quantized(Scheme(Grid.CODEBOOK, 3, 64), (70, 192), 1)
    words, dense = (packer.pack(quantized) for packer in PACKERS)
    found = repack(on_gpu(words), "kbit-dense")
    assert torch.equal(found.buffers["qweight"].cpu(), dense.buffers["qweight"])
    assert torch.equal(repack(found, "kbit-words").buffers["qweight"].cpu(), words.buffers["qweight"])


class TestStreamKernel(KernelContract):
    @pytest.fixture(params=PACKERS, ids=lambda packer: packer.layout)
    def packer(self, request):
        return request.param

    @pytest.fixture
    def kernel(self, packer):
        return StreamKernel(packer)

    @pytest.fixture
    def device(self):
        return "cuda"

    @pytest.fixture
    def examples(self):
        return [(scheme, (24, 192)) for scheme in SCHEMES[1:5]] + [(SCHEMES[12], (7, 99))]


class TestUnitsOfKbit(KernelContract):
    """The fast kernel on what kbit stores: every k, a block size that units hold, one that is filled up, a second level."""

    @pytest.fixture(params=PACKERS, ids=lambda packer: packer.layout)
    def packer(self, request):
        return request.param

    @pytest.fixture
    def kernel(self):
        return UnitsKernel({packer.layout: packer for packer in PACKERS})

    @pytest.fixture
    def device(self):
        return "cuda"

    @pytest.fixture
    def examples(self):
        schemes = [Scheme(Grid.CODEBOOK, bits, 64) for bits in range(2, 9)] + [
            Scheme(Grid.CODEBOOK, 3, 17, scales=ScaleFormat("float32")),
            Scheme(Grid.CODEBOOK, 5, 16, scales=ScaleFormat("bfloat16")),
            Scheme(Grid.CODEBOOK, 4, 4096),
            Scheme(Grid.CODEBOOK, 4, 64, flat=True, scales=ScaleFormat("float32", 8, 4, coding=ScaleCoding.CODEBOOK)),
        ]
        return [(scheme, (24, 192)) for scheme in schemes] + [(schemes[2], (7, 99))]

    @pytest.mark.parametrize("batch", [16, 64, 129])
    def test_more_rows(self, kernel, reference, problems, tolerance, batch):
        self.test_matmul_agrees_with_the_reference(kernel, reference, problems, tolerance, batch, True)


def test_the_faster_kernel_serves_what_kbit_makes():
    """convert's own path: quantize, pack, choose a kernel, multiply; units before the stream kernel."""
    quantized = QUANTIZER.quantize(gaussian(96, 512), KbitOptions(5, 64, "learned"))
    packed = on_gpu(PACKERS[1].pack(quantized))
    registry = lowbit.plugins.registry(lowbit_kbit)
    registry.kernels.register(UnitsKernel(registry.packers))
    layer = QuantLinear.from_packed(packed, dtype=torch.float16, registry=registry)
    assert layer.kernel.name == "cuda-units"
    x = torch.randn(3, 512, device="cuda").half()
    torch.testing.assert_close(layer(x), x @ layer.dequantize().T, rtol=1e-2, atol=1e-2)


def test_bad_buffers_are_refused_with_a_sentence():
    packed = on_gpu(PACKERS[0].pack(samples.quantized(Scheme(Grid.CODEBOOK, 4, 64), (8, 64), 0)))
    kernel, buffers = StreamKernel(PACKERS[0]), packed.buffers
    for name, buffer, words in (
        ("codebook", buffers["codebook"].cpu(), "codebook is on cpu"),
        ("scales", buffers["scales"].cpu(), "scales is on cpu"),
        ("qweight", torch.zeros(65, dtype=torch.int32, device="cuda")[1:], "no multiple of 16"),
    ):
        with pytest.raises(CudaError, match=words):
            kernel.dequantize(PackedTensor(packed.spec, {**buffers, name: buffer}))


def test_graph_replay_with_changed_codes():
    packer, scheme = PACKERS[1], Scheme(Grid.CODEBOOK, 4, 64)
    first, second = (on_gpu(packer.pack(samples.quantized(scheme, (64, 256), seed))) for seed in (1, 2))
    kernel = StreamKernel(packer)
    static = PackedTensor(first.spec, {name: buffer.clone() for name, buffer in first.buffers.items()})
    kernel.dequantize(static, torch.float16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernel.dequantize(static, torch.float16)
    for packed in (first, second):
        for name, buffer in packed.buffers.items():
            static.buffers[name].copy_(buffer)
        graph.replay()
        assert bit_equal(out, kernel.dequantize(packed, torch.float16))


def test_launches_go_to_the_current_stream_and_device():
    weight, options = gaussian(512, 1024).half(), KbitOptions(4, 64, "nf", "absmax")
    expected = QUANTIZER.quantize(weight, options)
    for index in range(torch.cuda.device_count()):
        with torch.cuda.stream(torch.cuda.Stream(index)):
            found = QUANTIZER.quantize(weight.to(f"cuda:{index}"), options)
            assert_same_quantized(found, expected, f"cuda:{index}")


def test_several_devices_give_the_bits_of_one():
    weight = gaussian(37, 512).bfloat16()
    every = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    for options in (
        KbitOptions(3, 32),
        KbitOptions(4, 64, "nf", "absmax", rounding="stochastic"),
        KbitOptions(scale="search"),
    ):
        expected = QUANTIZER.quantize(weight, options)
        for devices in (every, ["cuda:0", "cpu"], ["cuda:0", *every]):
            assert_same_quantized(quantize_over(weight, options, devices), expected, str(devices))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
@pytest.mark.parametrize("codebook", ["nf", "learned"])
def test_a_large_tensor_over_two_gpus(codebook):
    weight = gaussian(1001, 4096).half().cuda(1)
    options = KbitOptions(4, 64, codebook)
    found = quantize_over(weight, options, ["cuda:0", "cuda:1"])
    assert {part.device for part in found.parts.values()} == {weight.device}
    assert_same_quantized(found, QUANTIZER.quantize(weight, options), "two GPUs")


def test_given_scales_keep_their_bits():
    weight = gaussian(16, 64).cuda()
    options = KbitOptions(4, 64, "nf", "search", candidates=3)
    result = QUANTIZER.quantize(weight, options)
    codes = torch.empty_like(result.parts["codes"])
    scales = result.parts["scales"].clone()
    launches.quantize(weight, 64, "given", fixed_codebook("nf", 4).cuda(), codes, scales)
    assert torch.equal(codes, result.parts["codes"])
    assert torch.equal(scales, result.parts["scales"])
    again = QuantizedTensor(result.scheme, result.shape, {**result.parts, "codes": codes})
    assert_same_quantized(again, QUANTIZER.quantize(weight.cpu(), dataclasses.replace(options)), "given")
