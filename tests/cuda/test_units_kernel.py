"""``cuda-units`` keeps the contract of kernels for every layout that it serves, on a GPU."""

from dataclasses import replace

import pytest
import torch
from unit_problems import read_units

import lowbit.plugins
import lowbit_formats.auto_round
import lowbit_formats.awq
import lowbit_formats.bitsandbytes
import lowbit_formats.compressed_tensors
import lowbit_formats.gguf
import lowbit_formats.gptq
import lowbit_formats.hqq
import lowbit_formats.mlx
import lowbit_formats.plain
from lowbit import Grid, MatmulProblem, PackedTensor, QuantizedTensor, QuantLinear, ScaleFormat, Scheme, Zero
from lowbit.kernels import ReferenceKernel
from lowbit.scheme import Outliers, Rotation
from lowbit.testing import KernelContract, samples
from lowbit_cuda.errors import CudaError
from lowbit_cuda.plugin import UnitsKernel, unit_format

FORMATS = ("auto_round", "awq", "bitsandbytes", "compressed_tensors", "gguf", "gptq", "hqq", "mlx", "plain")
REGISTRY = lowbit.plugins.registry(*(getattr(lowbit_formats, name) for name in FORMATS))
HALF = ScaleFormat("float16")
SCHEMES = {
    "plain": [
        *(Scheme(Grid.AFFINE, bits, 128, scales=HALF) for bits in range(1, 9)),
        *(Scheme(Grid.CODEBOOK, bits, 64, scales=HALF) for bits in range(2, 9)),
        Scheme(Grid.AFFINE, 4, 32, Zero.FLOAT, ScaleFormat("bfloat16")),
        Scheme(Grid.AFFINE, 3, None, Zero.INTEGER, ScaleFormat("float32")),
        # groups of 16, groups that are filled up, act-order, outliers, flat groups that end with rows
        *(Scheme(Grid.AFFINE, 4, group, scales=HALF) for group in (16, 24, 48, 100, None)),
        Scheme(Grid.AFFINE, 3, 16, Zero.INTEGER, HALF),
        Scheme(Grid.AFFINE, 2, 16, Zero.MINIMUM, ScaleFormat(bits=4, super_group=16)),
        Scheme(Grid.CODEBOOK, 4, 16, scales=HALF),
        Scheme(Grid.AFFINE, 4, 64, Zero.INTEGER, HALF, permutation=True),
        Scheme(Grid.AFFINE, 4, 16, scales=HALF, permutation=True),
        Scheme(Grid.AFFINE, 4, 128, scales=HALF, outliers=Outliers(0.01)),
        Scheme(Grid.CODEBOOK, 3, 64, scales=HALF, outliers=Outliers(0.005, "float32")),
        Scheme(Grid.AFFINE, 3, 32, Zero.INTEGER, HALF, outliers=Outliers(0.01, "bfloat16"), permutation=True),
        Scheme(Grid.CODEBOOK, 4, 64, flat=True, scales=ScaleFormat("float32")),
        Scheme(Grid.CODEBOOK, 5, flat=True, scales=ScaleFormat("float32")),
    ],
    "gptq": [
        Scheme(Grid.AFFINE, 4, 128, scales=HALF),
        Scheme(Grid.AFFINE, 3, 32, scales=HALF),
        Scheme(Grid.AFFINE, 4, 128, scales=HALF, permutation=True),
    ],
    "gptq_v2": [Scheme(Grid.AFFINE, 4, 64, Zero.INTEGER, HALF)],
    "awq-gemm": [Scheme(Grid.AFFINE, 4, 128, Zero.INTEGER, HALF)],
    "ct-pack": [Scheme(Grid.AFFINE, 4, 128, scales=HALF)],
    "mlx-affine": [Scheme(Grid.AFFINE, 4, 64, Zero.MINIMUM, HALF)],
}
ODD_SHAPES = ((37, 200), (5, 99), (130, 392))
ODD_SCHEMES = [
    Scheme(Grid.AFFINE, 4, 128, scales=HALF),
    Scheme(Grid.AFFINE, 3, 16, Zero.INTEGER, HALF),
    Scheme(Grid.AFFINE, 8, None, scales=HALF),
    Scheme(Grid.AFFINE, 4, 32, scales=HALF, outliers=Outliers(0.01), permutation=True),
    Scheme(Grid.CODEBOOK, 3, 64, scales=HALF),
    Scheme(Grid.CODEBOOK, 6, 24, scales=HALF),
]
GGUF = [
    f"gguf-{name}"
    for name in [
        "q2_0",
        "q4_0",
        "q4_1",
        "q5_0",
        "q5_1",
        "q8_0",
        "q2_k",
        "q3_k",
        "q4_k",
        "q5_k",
        "q6_k",
        "tq2_0",
        "iq4_nl",
        "mxfp4",
    ]
]
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def problem(layout, scheme, **changes):
    return replace(MatmulProblem(layout, scheme, (64, 512), torch.float16, "cuda", (9, 0)), **changes)


def sample(packer, scheme, shape, seed):
    """A packed weight; the codebook is the layout's where that fixes one."""
    quantized = samples.quantized(scheme, shape, seed)
    if packer.codebook is not None:
        quantized = QuantizedTensor(scheme, shape, {**quantized.parts, "codebook": packer.codebook})
    return packer.pack(quantized)


@pytest.mark.cuda
@gpu
class TestUnitsKernel(KernelContract):
    @pytest.fixture
    def kernel(self):
        return UnitsKernel(REGISTRY.packers)

    @pytest.fixture(params=[*SCHEMES, *GGUF])
    def packer(self, request):
        return REGISTRY.packers[request.param]

    @pytest.fixture
    def device(self):
        return "cuda"

    @pytest.fixture
    def examples(self, kernel, packer):
        if packer.layout == "plain":
            odd = [(scheme, shape) for scheme in ODD_SCHEMES[:2] for shape in ODD_SHAPES]
            odd += [(scheme, ODD_SHAPES[1]) for scheme in ODD_SCHEMES[2:]]
            return [(scheme, (96, 512)) for scheme in SCHEMES["plain"]] + [(SCHEMES["plain"][3], (64, 1024))] + odd
        if packer.layout in SCHEMES:
            return [(scheme, (96, 512)) for scheme in SCHEMES[packer.layout]]
        return [(packer.scheme, (64, 512))]  # a GGUF type has one

    @pytest.fixture
    def problems(self, kernel, packer, examples):
        """The contract's, with the codebook of layouts that have a fixed one."""
        found = []
        for seed, (scheme, shape) in enumerate(examples):
            assert kernel.why_not(problem(packer.layout, scheme, shape=shape)) is None
            packed = sample(packer, scheme, shape, seed)
            there = PackedTensor(packed.spec, {name: buffer.cuda() for name, buffer in packed.buffers.items()})
            found += [(there, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
        return found

    @pytest.fixture
    def tolerance(self):
        """Weights become fp16 twice in products of 17 to 64 rows when scales are float32: the scale's product, and the minimum's."""
        return 2.0

    @pytest.mark.parametrize("batch", [8, 9, 16, 17, 32, 64, 65, 129])
    def test_more_rows(self, kernel, reference, problems, tolerance, batch):
        """The last row of each kernel and the first of the next, beside the contract's 0, 1, 3, 7, 33."""
        self.test_matmul_agrees_with_the_reference(kernel, reference, problems, tolerance, batch, True)


LAYERS = {
    "neighbours": Scheme(Grid.AFFINE, 4, 128, scales=HALF),
    "act-order": Scheme(Grid.AFFINE, 4, 128, Zero.INTEGER, HALF, permutation=True),
    "outliers": Scheme(Grid.CODEBOOK, 3, 64, scales=HALF, outliers=Outliers(0.01)),
    "sixteens": Scheme(Grid.CODEBOOK, 6, 16, scales=HALF),
}


@pytest.fixture(params=LAYERS)
def layer_of(request):
    """A function from a dtype to a layer that ``cuda-units`` serves."""
    registry = lowbit.plugins.registry(*(getattr(lowbit_formats, name) for name in FORMATS))
    registry.kernels.register(UnitsKernel(registry.packers))
    packed = REGISTRY.packers["plain"].pack(samples.quantized(LAYERS[request.param], (256, 1024)))

    def make(dtype):
        layer = QuantLinear.from_packed(packed, dtype=dtype, registry=registry).to("cuda")
        layer.prepare()
        assert layer.kernel.name == "cuda-units"
        return layer

    return make


@pytest.mark.cuda
@gpu
@pytest.mark.parametrize("tokens", [1, 3, 7, 16, 33, 64, 129])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_layers_train_and_are_captured(layer_of, tokens, dtype):
    """Gradients against the dequantized weight; a captured graph replayed with other inputs."""
    layer = layer_of(dtype)
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


@pytest.mark.cuda
@gpu
@pytest.mark.parametrize("tokens", [1, 33])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch 2.11's own, of its compiler
def test_operators_and_compiled_layers(layer_of, tokens):
    """What torch asks of an operator; one graph without a break, with the same bits."""
    layer = layer_of(torch.float16)
    for differentiated in (False, True):
        x = torch.randn(tokens, 1024, device="cuda", dtype=torch.float16, requires_grad=differentiated)
        torch.library.opcheck(torch.ops.lowbit.linear.default, (x, layer._operands(), layer._binding, None))
    torch.library.opcheck(torch.ops.lowbit.dequantize.default, (layer._operands(), layer._binding, torch.float16))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        assert torch.equal(compiled(x.detach()), layer(x.detach()))


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        (Scheme(Grid.AFFINE, 4, 12), "groups of 16 columns or more, not of 12"),
        (Scheme(Grid.CODEBOOK, 9, 64), "codebooks of 2 to 8 bits"),
        (Scheme(Grid.AFFINE, 4, 128, rotation=Rotation(128)), "does not rotate"),
        (Scheme(Grid.AFFINE, 4, 384, flat=True), "cross rows of 512"),
    ],
)
def test_what_it_cannot_decode_is_refused(scheme, words):
    assert words in UnitsKernel(REGISTRY.packers).why_not(problem("plain", scheme))


@pytest.mark.cuda
@gpu
def test_operands_elsewhere_are_refused(layer_of):
    layer = layer_of(torch.float16)
    x = torch.randn(2, 1024, dtype=torch.float16)
    prepared, kernel = layer.prepared(), layer.kernel
    with pytest.raises(CudaError, match="x is on cpu, and the weight on cuda:0; move one to the other"):
        kernel.matmul(x, prepared)
    with pytest.raises(CudaError, match="bias is on cpu"):
        kernel.matmul(x.cuda(), prepared, torch.zeros(256).half())


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
def test_a_layer_on_another_device_than_the_current_one(layer_of):
    layer = layer_of(torch.float16)
    for tokens in (1, 33, 129):
        x = torch.randn(tokens, 1024, device="cuda:0").half()
        expected, there = layer.cuda(0)(x), layer.cuda(1)(x.to("cuda:1"))
        assert there.device == torch.device("cuda:1")
        assert torch.equal(there.cpu(), expected.cpu())
    with pytest.raises(CudaError, match="x is on cuda:0, and the weight on cuda:1"):
        layer.kernel.matmul(x, layer.prepared())


def test_other_devices_and_dtypes_are_refused():
    kernel, scheme = UnitsKernel(REGISTRY.packers), Scheme(Grid.AFFINE, 4, 128)
    assert "not on cpu" in kernel.why_not(problem("plain", scheme, device="cpu"))
    assert "float64" in kernel.why_not(problem("plain", scheme, dtype=torch.float64))
    assert "compute capability 6.1" in kernel.why_not(problem("plain", scheme, capability=(6, 1)))


def test_units_prepared_on_a_cpu_are_those_of_the_format():
    """Everything but the launch runs without a GPU: groups of 512 become two of 256, groups of 24 are filled up to 32."""
    kernel = UnitsKernel(REGISTRY.packers)
    for group, unit_group, columns in (
        *((512, 256, 1536), (None, 256, 1536), (96, 32, 1536), (64, 64, 1536), (16, 16, 1536)),
        *((24, 32, 2048), (100, 16, 1792)),
    ):
        scheme = Scheme(Grid.AFFINE, 4, group, scales=HALF)
        prepared = kernel.prepare(REGISTRY.packers["plain"].pack(samples.quantized(scheme, (40, 1536))))
        assert unit_format(scheme, (40, 1536)).group_size == unit_group
        assert kernel.prepare(prepared) is prepared
        assert prepared.buffers["units"].shape == (3, columns // 256, unit_format(scheme, (40, 1536)).nbytes)


ON_A_CPU = [
    *((layout, scheme, (40, 512)) for layout, schemes in SCHEMES.items() for scheme in schemes),
    *(("plain", scheme, shape) for scheme in ODD_SCHEMES for shape in ODD_SHAPES),
    *((layout, REGISTRY.packers[layout].scheme, (40, 512)) for layout in (*GGUF, "gguf-tq1_0")),
]


@pytest.mark.parametrize(
    ("layout", "scheme", "shape"), ON_A_CPU, ids=lambda value: value.summary() if isinstance(value, Scheme) else None
)
def test_units_hold_the_weight(layout, scheme, shape):
    """What kernels will read, read slowly: codes, scales, order of columns and outliers make up the reference's weight."""
    packed = sample(REGISTRY.packers[layout], scheme, shape, 1)
    prepared = UnitsKernel(REGISTRY.packers).prepare(packed)
    format, buffers = unit_format(scheme, shape), prepared.buffers
    source = buffers.get("source", torch.arange(shape[1]))
    codes, scales, offsets = read_units(format, buffers["units"], shape[0], len(source))
    codes = codes.float()
    if "codebook" in buffers:
        found = buffers["codebook"][codes.long()] * scales
    elif format.offset == "MINIMUMS":
        found = codes * scales + offsets
    else:
        found = (codes - (scheme.midpoint if offsets is None else offsets)) * scales
    weight = torch.zeros(shape[0], shape[1] + 1).index_add_(1, source.long(), found)[:, :-1]
    if scheme.outliers:
        crow, column, value = (buffers[name] for name in ("outlier_rows", "outlier_columns", "outlier_values"))
        row = torch.arange(shape[0]).repeat_interleave(crow.diff())
        weight.index_put_((row, column.long()), value.float(), accumulate=True)
    expected = ReferenceKernel(REGISTRY.packers[layout]).dequantize(packed)
    scale_rounds = scheme.zero in (Zero.FLOAT,) and format.offset == "MINIMUMS"  # s * (q - z) became s * q - s * z
    torch.testing.assert_close(weight, expected, rtol=0, atol=1e-6 if scale_rounds else 0)
