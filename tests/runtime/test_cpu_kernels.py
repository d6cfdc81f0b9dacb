"""The CPU kernels that core brings, against the plain-torch kernel of whatever layout they unpack."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lowbit
from lowbit import Across, Grid, MatmulProblem, Outliers, Rotation, ScaleCoding, ScaleFormat, Scheme, Zero
from lowbit.runtime import cpu_int4, int4_order
from lowbit.runtime.cpu import register_cpu_kernels
from lowbit.runtime.cpu_int4 import Int4Kernel
from lowbit.runtime.cpu_int8 import Int8Kernel
from lowbit.runtime.cpu_rows import RowsKernel
from lowbit.testing import KernelContract, budgets, samples
from lowbit.testing import strategies as lowbit_strategies

TWO_LEVEL = ScaleFormat(bits=6, super_group=8)
INT4 = [
    (Scheme(Grid.AFFINE, 4, 32), (16, 64)),
    (Scheme(Grid.AFFINE, 4, 128, Zero.INTEGER), (48, 256)),
    (Scheme(Grid.AFFINE, 4, 32, Zero.MINIMUM, TWO_LEVEL), (32, 512)),
    (Scheme(Grid.AFFINE, 4, 192, Zero.FLOAT), (80, 576)),  # groups of 192 become three of torch's
    (Scheme(Grid.AFFINE, 4, 128), (32, 576)),  # the last group is short
    (Scheme(Grid.AFFINE, 3, None, Zero.INTEGER), (64, 96)),
    (Scheme(Grid.AFFINE, 2, 64, levels=3), (16, 128)),
    (Scheme(Grid.AFFINE, 1, 32), (16, 64)),
    (Scheme(Grid.AFFINE, 5, 32, Zero.MINIMUM), (16, 64)),
    (Scheme(Grid.AFFINE, 6, 64), (16, 128)),
    (Scheme(Grid.AFFINE, 8, 32), (112, 64)),
    (Scheme(Grid.AFFINE, 8, 64, Zero.INTEGER), (16, 128)),
]
INT8 = [(Scheme(Grid.AFFINE, 8), (5, 96)), (Scheme(Grid.AFFINE, 5, 64), (10, 64)), (Scheme(Grid.AFFINE, 7), (33, 32))]


@pytest.fixture
def packer(registry):
    return registry.packers["parts"]


class TestRows(KernelContract):
    @pytest.fixture
    def kernel(self, registry):
        return RowsKernel(registry.packers)

    @pytest.fixture
    def packer(self, registry):
        return registry.packers["parts"]


class TestFlatRows(TestRows):
    """Groups of bitsandbytes that end with rows."""

    @pytest.fixture
    def examples(self):
        second = ScaleFormat(bits=8, coding=ScaleCoding.CODEBOOK)
        flat = [Scheme(Grid.CODEBOOK, 4, 64, flat=True, scales=scales) for scales in (ScaleFormat("float32"), second)]
        return [(scheme, shape) for scheme in flat for shape in ((6, 128), (5, 64))]


class TestInt4(KernelContract):
    @pytest.fixture
    def kernel(self, registry):
        return Int4Kernel(registry.packers)

    @pytest.fixture
    def packer(self, registry):
        return registry.packers["parts"]

    @pytest.fixture
    def examples(self):
        return INT4


class TestInt4Decoding(TestInt4):
    """Long inputs are multiplied by the decoded weight."""

    @pytest.fixture(autouse=True)
    def always(self, monkeypatch):
        monkeypatch.setattr(cpu_int4, "MOST_ROWS", 0)


class TestInt8(KernelContract):
    @pytest.fixture
    def kernel(self, registry):
        return Int8Kernel(registry.packers)

    @pytest.fixture
    def packer(self, registry):
        return registry.packers["parts"]

    @pytest.fixture
    def examples(self):
        return INT8


@given(seed=st.integers(0, 99), scheme=st.sampled_from([scheme for scheme, _ in INT4 if not scheme.symmetric]))
@settings(max_examples=20, deadline=None)
def test_int4_errs_by_its_own_bound_at_the_edges_of_the_grid(seed, scheme):
    """Codes and zeros at opposite ends: roundings of s (q - h) and Z = s (h - c) do not shrink with their sum."""
    from lowbit.kernels import ReferenceKernel

    shape = (16, 8 * (scheme.group_size or 64))
    quantized = samples.quantized(scheme, shape, seed, integers=("lowest", "highest")[seed % 2])
    packers = lowbit.installed().packers
    packed = packers["plain"].pack(quantized)
    kernel, weight = Int4Kernel(packers), ReferenceKernel(packers["plain"]).dequantize(packed)
    x = torch.randn(3, shape[1], generator=torch.Generator().manual_seed(seed)).bfloat16()
    found = kernel.matmul(x, kernel.prepare(packed)).double()
    exact = x.double() @ weight.double().T
    scales = lowbit.grids.expand_groups(lowbit.grids.decode_scales(quantized), quantized).double()
    away = (quantized.parts["codes"].double() - scheme.midpoint) * scales
    terms = x.double().abs() @ (away.abs() + (weight - away).abs()).T
    planes = 2 if scheme.bits > 4 else 1
    bound = budgets.matmul_bound(x, weight, torch.bfloat16) + (planes + 1) * 2**-8 * terms
    assert ((found - exact).abs() <= bound).all()


@given(
    rows=st.integers(1, 12).map(lambda n: 16 * n),
    columns=st.integers(1, 6).map(lambda n: 32 * n),
    seed=st.integers(0, 9),
)
@settings(max_examples=25, deadline=None)
def test_torchs_int4_order_is_found_and_undone(rows, columns, seed):
    codes = torch.randint(0, 16, (rows, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = int4_order.pack(codes)
    assert torch.equal(packed, int4_order.torch_pack(codes))
    assert torch.equal(int4_order.unpack(packed, rows, columns), codes)


def test_an_unknown_int4_order_is_a_refusal(packer, registry, monkeypatch):
    shuffled = torch.randperm(16 * 32 // 2, generator=torch.Generator().manual_seed(0))
    pack = int4_order.torch_pack
    monkeypatch.setattr(int4_order, "torch_pack", lambda codes: pack(codes).reshape(-1)[shuffled])
    int4_order.orders.cache_clear()
    try:
        problem = MatmulProblem("parts", *INT4[0], torch.bfloat16)
        assert "order that lowbit does not know" in Int4Kernel(registry.packers).why_not(problem)
    finally:
        int4_order.orders.cache_clear()


@given(lowbit_strategies.any_quantized(grids=(Grid.AFFINE, Grid.CODEBOOK)))
@settings(max_examples=40, deadline=None)
def test_rows_takes_exactly_what_can_be_cut_into_rows(quantized):
    kernel = RowsKernel(lowbit.installed().packers)
    problem = MatmulProblem("plain", quantized.scheme, quantized.shape)
    if lowbit.installed().packers["plain"].why_not(quantized.scheme, quantized.shape) is None:
        cut = quantized.dense.row_separable or _flat_in_rows(quantized)
        assert (kernel.why_not(problem) is None) == (cut and quantized.scheme.bits <= 8)


def _flat_in_rows(quantized):
    """Whether flat groups end with rows; then the kernel makes groups of rows of them."""
    scheme = quantized.scheme
    if not scheme.flat or not scheme.group_size or scheme.zero is not Zero.SYMMETRIC:
        return False
    mixes = (scheme.rotation and scheme.rotation.out_block) or (
        scheme.scales.two_level and scheme.scales.across is Across.ROWS
    )
    return quantized.shape[1] % scheme.group_size == 0 and not mixes


@pytest.mark.parametrize(
    ("kernel", "change", "words"),
    [
        (RowsKernel, {"device": "cuda"}, "runs on cpu, not on cuda"),
        (RowsKernel, {"layout": "other"}, "no packer of layout 'other'"),
        (Int4Kernel, {"scheme": Scheme(Grid.AFFINE, 4, 32, outliers=Outliers(0.1))}, "no add-ons"),
        (RowsKernel, {"scheme": Scheme(Grid.AFFINE, 4, 32, rotation=Rotation(0, 32))}, "rotation of the output"),
        (RowsKernel, {"scheme": Scheme(Grid.CODEBOOK, 12, 8, vector=8)}, "a byte for each code"),
        (Int4Kernel, {"dtype": torch.float32}, "bfloat16 only, not in float32"),
        (Int4Kernel, {"scheme": Scheme(Grid.CODEBOOK, 4, 32)}, "not by a codebook grid"),
        (Int4Kernel, {"scheme": Scheme(Grid.AFFINE, 4, 32, permutation=True)}, "no add-ons"),
        (Int4Kernel, {"shape": (24, 64)}, "multiples of 16"),
        (Int4Kernel, {"scheme": Scheme(Grid.AFFINE, 4, 16)}, "multiples of 32"),
        (Int8Kernel, {"scheme": Scheme(Grid.AFFINE, 8, 32)}, "one scale for each row"),
        (Int8Kernel, {"scheme": Scheme(Grid.AFFINE, 8, zero=Zero.INTEGER)}, "symmetric"),
        (Int8Kernel, {"scheme": Scheme(Grid.AFFINE, 8), "shape": (16, 40)}, "multiples of 32"),
        (Int8Kernel, {"scheme": Scheme(Grid.AFFINE, 8), "dtype": torch.float16}, "bfloat16 only"),
    ],
)
def test_refusals_say_why(registry, kernel, change, words):
    problem = {"layout": "parts", "scheme": Scheme(Grid.AFFINE, 4, 32), "shape": (32, 64), "dtype": torch.bfloat16}
    assert words in kernel(registry.packers).why_not(MatmulProblem(**{**problem, **change}))


def test_the_fastest_kernel_that_serves_is_chosen(registry):
    register_cpu_kernels(registry)

    def name(bits, group_size, dtype):
        scheme = Scheme(Grid.AFFINE, bits, group_size)
        return registry.kernel_for(MatmulProblem("parts", scheme, (32, 64), dtype)).name

    assert name(4, 32, torch.bfloat16) == "cpu-int4"
    assert name(8, 32, torch.bfloat16) == "cpu-int4"
    assert name(8, None, torch.bfloat16) == "cpu-int8"
    assert name(4, 32, torch.float32) == "cpu-rows"


def test_installed_layouts_are_served_by_the_fast_kernels():
    """GPTQ, AWQ and GGUF files reach them through the registry's packers."""
    registry = lowbit.installed()
    for layout in ("gguf-q4_0", "gguf-q4_1", "gguf-q8_0", "plain", "gptq", "awq-gemm"):
        if layout not in registry.packers:
            continue
        for scheme in (
            Scheme(Grid.AFFINE, 4, 32),
            Scheme(Grid.AFFINE, 4, 32, Zero.INTEGER),
            Scheme(Grid.AFFINE, 8, 32),
        ):
            if registry.packers[layout].why_not(scheme, (64, 64)) is None:
                problem = MatmulProblem(layout, scheme, (64, 64), torch.bfloat16)
                assert registry.kernel_for(problem).name == "cpu-int4"


def test_a_registry_of_named_plugins_has_only_theirs():
    from lowbit.plugins import registry

    assert len(registry().kernels) == 0
