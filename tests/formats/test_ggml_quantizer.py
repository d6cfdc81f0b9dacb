"""The quantizer ``ggml``: types and schemes, importance, what it refuses, and values that must come out exactly."""

import pytest
import torch

from lowbit.errors import OptionError, SchemeError, WeightError
from lowbit.grids import dequantize
from lowbit.interfaces import Calibration
from lowbit.options import build_options
from lowbit.scheme import Grid, Scheme, Zero
from lowbit.tensors import bit_equal
from lowbit.testing.weights import gaussian
from lowbit_formats.ggml import GgmlQuantizer
from lowbit_formats.ggml.options import TYPES, GgmlOptions
from lowbit_formats.gguf import PACKERS

QUANTIZER = GgmlQuantizer()
SHAPE = (8, 512)
SEARCHED = ("q4_0", "q4_1", "q5_0", "q5_1", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "q2_0", "q1_0")
every_type = pytest.mark.parametrize("name", TYPES)


def quantize(weight, name, importance=None):
    calibration = None if importance is None else Calibration(importance=importance)
    return QUANTIZER.quantize(weight, GgmlOptions(name), calibration)


def weighted_error(weight, quantized, importance):
    return float(((dequantize(quantized) - weight).double().square() * importance).mean())


def test_every_layout_of_gguf_has_a_type():
    assert {packer.type.name.lower() for packer in PACKERS} == set(TYPES)


@every_type
def test_fit_finds_the_type_of_a_scheme(name):
    scheme = QUANTIZER.scheme(GgmlOptions(name))
    fitted = QUANTIZER.fit(GgmlOptions("q8_0"), scheme)
    assert QUANTIZER.scheme(fitted) == scheme
    assert QUANTIZER.fit(GgmlOptions(name), scheme).type == name, "the type asked for, where two hold one scheme"


def test_fit_refuses_schemes_that_ggml_does_not_have():
    assert QUANTIZER.fit(GgmlOptions(), Scheme(Grid.AFFINE, 4, 128)) is None
    assert QUANTIZER.fit(GgmlOptions(), Scheme(Grid.AFFINE, 4, 32, Zero.INTEGER)) is None


def test_unknown_types_are_refused():
    with pytest.raises(OptionError, match="q4_k"):
        build_options(GgmlOptions, {"type": "q7_k"}, "ggml")
    with pytest.raises(OptionError, match="must be one of q4_0, "):
        GgmlOptions("q7_k")


@every_type
def test_rows_that_are_not_whole_blocks_are_refused(name):
    with pytest.raises(SchemeError, match="does not divide in_features 48"):
        quantize(torch.zeros(2, 48), name)


@every_type
@pytest.mark.parametrize("value", [7e4, -1e30])
def test_weights_beyond_float16_are_refused(name, value):
    weight = gaussian(SHAPE)
    weight[3, 5] = value
    with pytest.raises(WeightError, match=rf"holds {value:g}, beyond 65504".replace("+", r"\+")):
        quantize(weight, name)


@every_type
@pytest.mark.parametrize("calibrated", [False, True], ids=["plain", "imatrix"])
@pytest.mark.parametrize("bits", [0x7FC00000, -0x400000, 0x7F800000, -0x800000], ids=["nan", "-nan", "inf", "-inf"])
def test_weights_that_are_no_numbers_are_refused(name, bits, calibrated):
    weight = gaussian(SHAPE)
    weight.view(torch.int32)[5, 300] = bits
    with pytest.raises(WeightError, match="holds NaN or infinity"):
        quantize(weight, name, torch.ones(SHAPE[1]) if calibrated else None)


@pytest.mark.parametrize(
    ("importance", "sentence"),
    [
        (torch.ones(511), "has 511 columns and the weight 512"),
        (torch.full((512,), -1.0), "negative, NaN or infinite"),
        (torch.full((512,), float("nan")), "negative, NaN or infinite"),
    ],
    ids=["short", "negative", "nan"],
)
def test_impossible_importance_is_refused(importance, sentence):
    with pytest.raises(SchemeError, match=sentence):
        quantize(gaussian(SHAPE), "q4_k", importance)


@pytest.mark.parametrize("name", SEARCHED)
def test_importance_lowers_the_error_that_it_weighs(name):
    weight = gaussian((32, 1024))
    importance = torch.exp(1.5 * torch.randn(1024, generator=torch.Generator().manual_seed(1)))
    plain, aware = quantize(weight, name), quantize(weight, name, importance)
    assert weighted_error(weight, aware, importance) < 0.97 * weighted_error(weight, plain, importance)


@pytest.mark.parametrize("name", SEARCHED)
def test_importance_has_no_unit(name):
    """Sums of squares over few or many tokens, of small or large activations: only ratios count."""
    weight = gaussian(SHAPE)
    importance = 0.1 + torch.rand(512, generator=torch.Generator().manual_seed(1))
    expected = quantize(weight, name, importance)
    for factor in (2.0**-60, 2.0**60):
        found = quantize(weight, name, importance * factor)
        assert all(bit_equal(part, expected.parts[key]) for key, part in found.parts.items())


@pytest.mark.parametrize("name", SEARCHED)
@pytest.mark.parametrize("importance", [torch.zeros(512), torch.eye(512)[7]], ids=["none", "one-column"])
def test_columns_without_importance_are_quantized_all_the_same(name, importance):
    weight, unseen = gaussian(SHAPE), torch.arange(512) >= 256
    found = quantize(weight, name, importance)
    found.validate()
    assert weighted_error(weight, found, unseen) < 1.2 * weighted_error(weight, quantize(weight, name), unseen)


@pytest.mark.parametrize("name", ["q4_k", "q6_k", "q4_0"])
def test_threads_change_nothing_with_importance(name):
    weight, importance = gaussian((600, 1024)), torch.rand(1024, generator=torch.Generator().manual_seed(2))
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(quantize(weight, name, importance))
    finally:
        torch.set_num_threads(1)
    assert all(bit_equal(part, results[0].parts[key]) for key, part in results[1].parts.items())


@pytest.mark.parametrize("name", ["tq1_0", "tq2_0", "q2_0"])
def test_ternary_weights_are_exact(name):
    weight = torch.randint(-1, 2, SHAPE, generator=torch.Generator().manual_seed(3)) * 0.375
    assert torch.equal(dequantize(quantize(weight, name)), weight)


def test_signs_are_exact():
    weight = (torch.randint(2, SHAPE, generator=torch.Generator().manual_seed(4)) * 2 - 1) * 0.25
    assert torch.equal(dequantize(quantize(weight, "q1_0")), weight)


@pytest.mark.parametrize("value", [0.5, -0.5, 2.0**-6, 0.0])
@pytest.mark.parametrize("name", [name for name in TYPES if name != "q1_0"])
def test_one_value_everywhere_survives(name, value):
    """No range to divide by: the extreme is on every grid, up to float16's subnormal scales. Sign planes have no zero."""
    weight = torch.full(SHAPE, value)
    assert torch.allclose(dequantize(quantize(weight, name)), weight, rtol=5e-3, atol=0)


def test_halves_are_rounded_away_from_zero():
    """Q8_0 of weights whose quotients by the scale end in .5: torch rounds halves to even, C's roundf away from zero."""
    quotients = torch.tensor([127, 0.5, -0.5, 1.5, -1.5, 2.5, -2.5, 126.5, 0.49999997, -0.49999997, *[0] * 22])
    codes = quantize(quotients.view(1, 32), "q8_0").parts["codes"].int() - 128
    assert codes[0, :10].tolist() == [127, 1, -1, 2, -2, 3, -3, 127, 0, 0]


def test_mxfp4_scale_is_a_power_of_two():
    """The absmax falls between 4 and 8 times the scale; what is above 6 saturates, and ties go to the smaller magnitude."""
    values = [7.5, -6.0, 5.0, -5.0, 3.5, 2.5, 0.25, -0.25, 0.26, 4.0, *[0] * 22]
    decoded = dequantize(quantize(torch.tensor([values]), "mxfp4"))[0, :10].tolist()
    assert decoded == [6, -6, 4, -4, 3, 2, 0, 0, 0.5, 4]


def test_extremes_of_a_group_are_the_first():
    """Q4_0: the first weight of largest magnitude becomes code 0, as in ggml."""
    for first in (1.0, -1.0):
        weight = torch.zeros(1, 32)
        weight[0, 4], weight[0, 9] = first, -first
        quantized = quantize(weight, "q4_0")
        assert quantized.parts["codes"][0, [4, 9]].tolist() == [0, 15]
        assert float(quantized.parts["scales"]) == first / -8
