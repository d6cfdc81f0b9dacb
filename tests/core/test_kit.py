"""What the conformance kit is made of: weights, samples and budgets. The contracts have tests in test_contracts_catch_bugs."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowbit import Binary, Grid, ScaleCoding, ScaleFormat, Scheme, TensorSpec, Trellis, Zero
from lowbit.testing import budgets, samples, weights
from lowbit.testing.budgets import dequantize_bound, matmul_bound, nmse_budget, uniform_nmse
from lowbit.testing.contracts.checks import transposed

SHAPE = (64, 1024)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("kind", weights.AWKWARD)
def test_weights_repeat_and_leave_torch_s_generator_alone(kind):
    before = torch.get_rng_state()
    first = weights.AWKWARD[kind](SHAPE, 64, 3)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, weights.AWKWARD[kind](SHAPE, 64, 3))
    assert first.shape == SHAPE
    assert first.dtype is torch.float32
    assert torch.isfinite(first).all()


def test_weights_are_what_their_names_say():
    assert not weights.zero_groups(SHAPE, 64)[:, :64].any()
    assert not weights.zero_groups(SHAPE, 64)[-1].any()
    assert weights.constant_groups(SHAPE, 64)[:, :64].std(dim=-1).max() == 0
    extremes = weights.fp16_extremes(SHAPE, 64)
    assert torch.equal(extremes.half().float(), extremes)
    assert extremes.abs().max() == 65504
    tiny = weights.subnormal(SHAPE, 64)
    assert 0 < tiny.abs().max() / 7 < 2.0**-24, "an absmax scale of 4 bits vanishes in float16"
    assert weights.beyond_fp16(SHAPE, 64).half().isinf().any()
    tail = weights.heavy_tailed(SHAPE)
    assert tail.abs().max() > 30 > weights.gaussian(SHAPE).abs().max()
    assert weights.non_finite((4, 4), math.nan).isnan().nonzero().tolist() == [[3, 3]]


def test_representatives_cover_the_vocabulary():
    schemes = [scheme for scheme, _ in samples.REPRESENTATIVES]
    assert {scheme.grid for scheme in schemes} == set(Grid)
    assert {scheme.zero for scheme in schemes} == set(Zero)
    for has in ("outliers", "rotation", "permutation", "flat", "levels"):
        assert any(getattr(scheme, has) for scheme in schemes), has
    assert any(scheme.vector > 1 for scheme in schemes)
    assert {scheme.scales.coding for scheme in schemes if scheme.scales.two_level} == set(ScaleCoding)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e4m3fn])
def test_float_fills_reach_the_edges(dtype):
    spec = TensorSpec(dtype, (4000,))
    filled = {how: samples.fill(spec, how, weights.generator(0)).float() for how in samples.FLOAT_FILLS}
    assert all(torch.isfinite(values).all() for values in filled.values())
    assert filled["extreme"].abs().unique().tolist() == [torch.finfo(dtype).max]
    assert (filled["negative"] < 0).all()
    assert not filled["zeros"].any()
    assert filled["zeros"].signbit().any()
    assert not filled["zeros"].signbit().all()
    assert 0 < filled["subnormal"].abs().min() <= filled["subnormal"].abs().max() < torch.finfo(dtype).smallest_normal
    assert len(filled["bits"].unique()) > 200
    assert filled["ordinary"].abs().min() > 0


@pytest.mark.parametrize(("how", "code"), [("lowest", 0), ("highest", 15)])
def test_integer_fills_reach_the_edges(how, code):
    quantized = samples.quantized(Scheme(Grid.AFFINE, 4, 32, Zero.INTEGER), (4, 64), integers=how)
    assert quantized.parts["codes"].unique().tolist() == [code]
    assert quantized.parts["zeros"].unique().tolist() == [code]


def test_permuted_groups_have_equal_sizes():
    quantized = samples.quantized(Scheme(Grid.AFFINE, 4, 32, permutation=True), (4, 128))
    assert quantized.parts["group_index"].bincount().tolist() == [32] * 4
    assert quantized.parts["group_index"].tolist() != sorted(quantized.parts["group_index"].tolist())


@pytest.mark.parametrize("count", [1, 16, 128, 1024])
def test_the_expected_largest_square(count):
    drawn = weights.gaussian(((1 << 20) // count, count))
    assert budgets.largest_square(count) == pytest.approx(float(drawn.square().amax(-1).mean()), rel=0.02)


@pytest.mark.parametrize("group", [32, 128, 1024])
@pytest.mark.parametrize("bits", [3, 4, 5, 8])
def test_uniform_rounding_costs_what_the_formula_says(bits, group):
    """Round to nearest on -M ... M lies within 6 % of Bennett's formula, and never above it by more than 1 %."""
    groups = weights.gaussian((1 << 19, 1)).reshape(-1, group)
    scale = groups.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    error = float(((groups / scale).round() * scale - groups).square().mean() / groups.square().mean())
    assert 0.94 < error / uniform_nmse(2**bits, group) < 1.01


def test_sign_planes_leave_what_the_table_says():
    weight = weights.gaussian((1 << 20, 1)).double()
    residual = weight.clone()
    for expected in budgets.GREEDY_BINARY:
        residual = residual - residual.sign() * residual.abs().mean()
        assert float(residual.square().mean() / weight.square().mean()) == pytest.approx(expected, rel=0.02)


def test_measured_errors_are_ordered():
    """More bits and smaller groups help; the codebook that was made for a recipe beats the one that was not."""
    for recipe, table in budgets.MEASURED.items():
        for (bits, group), error in table.items():
            assert 2.0 ** (-2 * bits) < error, f"{recipe} beats the rate-distortion bound"
            if (bits + 1, group) in table:
                assert table[bits + 1, group] < error / 2
            if (bits, 2 * group) in table:
                assert table[bits, 2 * group] > error
    for key, error in budgets.MEASURED["joint searched"].items():
        assert error <= budgets.MEASURED["optimal signed absmax"][key]
        assert budgets.MEASURED["optimal signed absmax"][key] < budgets.MEASURED["optimal absmax"][key]
        assert budgets.MEASURED["optimal absmax"][key] < budgets.MEASURED["normal-float absmax"][key]


def test_nf4_measures_what_the_table_says():
    """The quantiles of NF4 (Dettmers et al. 2023, appendix E) with an absmax scale, in groups of 64."""
    normal = torch.distributions.Normal(0.0, 1.0)
    positive = normal.icdf(torch.linspace(0.9677083, 0.5, 9)[:-1])
    negative = -normal.icdf(torch.linspace(0.9677083, 0.5, 8)[:-1])
    book = torch.cat([positive, negative, torch.zeros(1)]).sort().values
    book = book / book.max()
    groups = weights.gaussian((1 << 19, 1)).reshape(-1, 64)
    scale = groups.abs().amax(-1, keepdim=True)
    decoded = book[torch.bucketize(groups / scale, (book[1:] + book[:-1]) / 2)] * scale
    error = float((decoded - groups).square().mean() / groups.square().mean())
    assert error == pytest.approx(budgets.MEASURED["normal-float absmax"][4, 64], rel=0.02)


BUDGETS = {
    "affine": (Scheme(Grid.AFFINE, 4, 64), 0.0135),
    "asymmetric": (Scheme(Grid.AFFINE, 4, 64, Zero.INTEGER), 0.0118),
    "one symmetric bit": (Scheme(Grid.AFFINE, 1, 64), 1.0),
    "two-level": (Scheme(Grid.AFFINE, 4, 64, scales=ScaleFormat(bits=6)), 0.0152),
    "codebook": (Scheme(Grid.CODEBOOK, 4, 64), 0.0271),
    "trellis": (Scheme(Grid.TRELLIS, 0, trellis=Trellis("mul1", (2,))), 0.115),
    "one plane": (Scheme(Grid.BINARY, 1, 64, binary=Binary(1)), 0.4179),
    "vector": (Scheme(Grid.CODEBOOK, 16, vector=8), 0.2875),
}


@pytest.mark.parametrize("case", BUDGETS)
def test_budgets(case):
    scheme, expected = BUDGETS[case]
    assert nmse_budget(scheme, 1024) == pytest.approx(expected, rel=0.01)


@given(st.sampled_from(DTYPES), st.integers(1, 300), st.integers(0, 999), st.booleans())
def test_torch_s_own_products_are_within_the_bound(dtype, columns, seed, with_bias):
    x, weight = weights.gaussian((3, columns), seed, dtype), weights.gaussian((5, columns), seed + 1)
    bias = weights.gaussian((1, 5), seed + 2, dtype)[0] if with_bias else None
    found = torch.nn.functional.linear(x, weight.to(dtype), bias).double()
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    assert ((found - exact).abs() <= matmul_bound(x, weight, dtype, bias)).all()


@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 1e-3), (torch.float16, 0.015), (torch.bfloat16, 0.1)])
def test_the_bound_is_not_loose(dtype, share):
    """It is a small share of a typical result, so that a wrong scale or zero cannot hide below it."""
    x, weight = weights.gaussian((8, 512), 0, dtype), weights.gaussian((64, 512), 1)
    typical = (x.double() @ weight.double().T).square().mean().sqrt()
    assert matmul_bound(x, weight, dtype).max() < share * typical


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_rounding_is_within_the_bound_and_two_steps_are_not(dtype):
    weight = weights.gaussian((16, 64))
    bound = dequantize_bound(weight, dtype)
    assert ((weight.to(dtype).double() - weight.double()).abs() <= bound).all()
    off = weight.to(dtype).double() * (1 + 12 * budgets.roundoff(dtype))
    assert ((off - weight.double()).abs() > bound).any()


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 3, 4)])
def test_transposed_has_other_strides_and_the_same_values(shape):
    tensor = torch.arange(math.prod(shape)).reshape(shape)
    assert torch.equal(transposed(tensor), tensor)
    assert transposed(tensor).shape == shape
    if shape:
        assert not transposed(tensor).is_contiguous()
