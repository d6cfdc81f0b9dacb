"""``cuda-units`` keeps the contract of kernels for every layout that it serves, on a GPU."""

from dataclasses import replace

import pytest
import torch

import lowbit.plugins
import lowbit_formats.auto_round
import lowbit_formats.awq
import lowbit_formats.compressed_tensors
import lowbit_formats.gguf
import lowbit_formats.gptq
import lowbit_formats.hqq
import lowbit_formats.mlx
import lowbit_formats.plain
from lowbit import Grid, MatmulProblem, QuantLinear, ScaleFormat, Scheme, Zero
from lowbit.testing import KernelContract, samples
from lowbit_cuda.plugin import UnitsKernel, unit_format

FORMATS = ("auto_round", "awq", "compressed_tensors", "gguf", "gptq", "hqq", "mlx", "plain")
REGISTRY = lowbit.plugins.registry(*(getattr(lowbit_formats, name) for name in FORMATS))
HALF = ScaleFormat("float16")
SCHEMES = {
    "plain": [
        *(Scheme(Grid.AFFINE, bits, 128, scales=HALF) for bits in range(1, 9)),
        *(Scheme(Grid.CODEBOOK, bits, 64, scales=HALF) for bits in range(2, 9)),
        Scheme(Grid.AFFINE, 4, 32, Zero.FLOAT, ScaleFormat("bfloat16")),
        Scheme(Grid.AFFINE, 3, None, Zero.INTEGER, ScaleFormat("float32")),
    ],
    "gptq": [Scheme(Grid.AFFINE, 4, 128, scales=HALF), Scheme(Grid.AFFINE, 3, 32, scales=HALF)],
    "gptq_v2": [Scheme(Grid.AFFINE, 4, 64, Zero.INTEGER, HALF)],
    "awq-gemm": [Scheme(Grid.AFFINE, 4, 128, Zero.INTEGER, HALF)],
    "ct-pack": [Scheme(Grid.AFFINE, 4, 128, scales=HALF)],
    "mlx-affine": [Scheme(Grid.AFFINE, 4, 64, Zero.MINIMUM, HALF)],
}
SHAPES = ((96, 512), (64, 1024))
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def problem(layout, scheme, **changes):
    return replace(MatmulProblem(layout, scheme, (64, 512), torch.float16, "cuda", (9, 0)), **changes)


@pytest.mark.cuda
@gpu
class TestUnitsKernel(KernelContract):
    @pytest.fixture
    def kernel(self):
        return UnitsKernel(REGISTRY.packers)

    @pytest.fixture(
        params=[*SCHEMES, "gguf-q4_0", "gguf-q8_0", "gguf-q4_1", "gguf-q4_k", "gguf-q6_k", "gguf-q2_k", "gguf-iq4_nl"]
    )
    def packer(self, request):
        return REGISTRY.packers[request.param]

    @pytest.fixture
    def device(self):
        return "cuda"

    @pytest.fixture
    def examples(self, kernel, packer):
        if packer.layout in SCHEMES:
            return [(scheme, shape) for scheme in SCHEMES[packer.layout] for shape in SHAPES]
        return [
            (scheme, (64, 512))
            for scheme, _ in samples.REPRESENTATIVES
            if packer.why_not(scheme, (64, 512)) is None and kernel.why_not(problem(packer.layout, scheme)) is None
        ]

    @pytest.fixture
    def tolerance(self):
        """Weights become fp16 twice in products of 17 to 64 rows when scales are float32: the scale's product, and the minimum's."""
        return 2.0


@pytest.mark.cuda
@gpu
@pytest.mark.parametrize("tokens", [1, 7, 16, 33, 64, 129])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_layers_train_capture_and_compile(tokens, dtype):
    """Gradients against the dequantized weight; a captured graph replayed with other inputs; no graph breaks."""
    scheme = Scheme(Grid.AFFINE, 4, 128, scales=HALF)
    packed = REGISTRY.packers["gptq"].pack(samples.quantized(scheme, (256, 1024)))
    registry = lowbit.plugins.registry(*(getattr(lowbit_formats, name) for name in FORMATS))
    registry.kernels.register(UnitsKernel(registry.packers))
    layer = QuantLinear.from_packed(packed, dtype=dtype, registry=registry).to("cuda")
    assert layer.kernel.name == "cuda-units"
    x = torch.randn(tokens, 1024, device="cuda", dtype=dtype, requires_grad=True)
    layer(x).sum().backward()
    weight = layer.dequantize(dtype)
    torch.testing.assert_close(x.grad, torch.ones(tokens, 256, device="cuda", dtype=dtype) @ weight)
    with torch.inference_mode():
        fixed = torch.zeros_like(x)
        for _ in range(2):
            layer(fixed)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = layer(fixed)
        for _ in range(2):
            fixed.copy_(torch.randn_like(fixed))
            graph.replay()
            assert torch.equal(out, layer(fixed))


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        (Scheme(Grid.AFFINE, 4, 48), "multiples of 32"),
        (Scheme(Grid.CODEBOOK, 9, 64), "codebooks of 2 to 8 bits"),
        (Scheme(Grid.AFFINE, 4, 128, permutation=True), "no add-ons"),
        (Scheme(Grid.AFFINE, 4, 128, flat=True), "no add-ons"),
    ],
)
def test_what_it_cannot_decode_is_refused(scheme, words):
    assert words in UnitsKernel(REGISTRY.packers).why_not(problem("plain", scheme))


def test_other_devices_and_dtypes_are_refused():
    kernel, scheme = UnitsKernel(REGISTRY.packers), Scheme(Grid.AFFINE, 4, 128)
    assert "not on cpu" in kernel.why_not(problem("plain", scheme, device="cpu"))
    assert "float64" in kernel.why_not(problem("plain", scheme, dtype=torch.float64))
    assert "compute capability 6.1" in kernel.why_not(problem("plain", scheme, capability=(6, 1)))


def test_units_prepared_on_a_cpu_are_those_of_the_format():
    """Everything but the launch runs without a GPU: groups of 512 become two groups of 256, a row scale one for each 256."""
    kernel = UnitsKernel(REGISTRY.packers)
    for group, unit_group in ((512, 256), (None, 256), (96, 32), (64, 64)):
        scheme = Scheme(Grid.AFFINE, 4, group, scales=HALF)
        prepared = kernel.prepare(REGISTRY.packers["plain"].pack(samples.quantized(scheme, (40, 1536))))
        assert unit_format(scheme, (40, 1536)).group_size == unit_group
        assert kernel.prepare(prepared) is prepared
        assert prepared.buffers["units"].shape == prepared.spec.buffers["units"].shape
