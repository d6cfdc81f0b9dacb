"""What ``autoround`` does beyond the contract: dtypes, pieces, groups, small and large values, refusals, options."""

import dataclasses

import pytest
import torch

from lowbit import Calibration, dequantize
from lowbit.errors import OptionError, WeightError
from lowbit.plugins import registry
from lowbit.testing.contracts.checks import assert_same_quantized
from lowbit_autoround import quantizer as module
from lowbit_autoround.options import AutoRoundOptions
from lowbit_autoround.quantizer import AutoRoundQuantizer

QUANTIZER = AutoRoundQuantizer()
EVERY_KIND = {
    f"{kind}-{scale}": AutoRoundOptions(4, 32, scale=scale, **settings)
    for kind, settings in {
        "symmetric": {},
        "integer": {"symmetric": False},
        "minimum": {"symmetric": False, "zero": "minimum"},
    }.items()
    for scale in ("minmax", "search")
}
kinds = pytest.mark.parametrize("options", EVERY_KIND.values(), ids=EVERY_KIND.keys())


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@kinds
def test_equal_values_of_any_dtype_give_the_same_bits(options):
    weight = gaussian(8, 96).bfloat16().half().bfloat16()  # representable in both
    results = [QUANTIZER.quantize(weight.to(dtype), options) for dtype in (torch.float32, torch.bfloat16, torch.half)]
    assert_same_quantized(results[1], results[0], "bfloat16")
    assert_same_quantized(results[2], results[0], "float16")


@kinds
def test_pieces_and_strides_change_nothing(options, monkeypatch):
    weight = gaussian(64, 80)  # a ragged last group
    whole = QUANTIZER.quantize(weight, options)
    padded = torch.zeros(128, 100)
    padded[::2, 10:90] = weight
    assert_same_quantized(QUANTIZER.quantize(padded[::2, 10:90], options), whole, "a view")
    monkeypatch.setattr(module, "PIECE", 3 * 80)
    monkeypatch.setattr(module, "SEARCH_PIECE", 5 * 80)
    assert_same_quantized(QUANTIZER.quantize(weight, options), whole, "small pieces")


@kinds
def test_the_short_last_group_stands_alone(options):
    weight = gaussian(4, 32 + 20)
    result = QUANTIZER.quantize(weight, options)
    head, tail = QUANTIZER.quantize(weight[:, :32], options), QUANTIZER.quantize(weight[:, 32:], options)
    for name, part in result.parts.items():
        assert torch.equal(part, torch.cat((head.parts[name], tail.parts[name]), 1))


@kinds
def test_zero_groups_have_scale_zero_and_decode_to_zero(options):
    weight = gaussian(4, 64)
    weight[1, 32:] = 0
    weight[2, :32] = -0.0
    result = QUANTIZER.quantize(weight, options)
    decoded = dequantize(result)
    for row, group in ((1, 1), (2, 0)):
        assert result.parts["scales"][row, group].item() == 0
        assert not decoded[row, group * 32 : group * 32 + 32].any()


@kinds
@pytest.mark.parametrize("value", [0.375, -6.0, 2.0**-20])
def test_constant_groups_are_exact_when_float16_holds_them(options, value):
    weight = torch.full((2, 64), value)
    if options.symmetric or options.zero == "integer":
        weight = weight * 15  # the scale is a 15th, or with the midpoint grid an 8th, of the constant
        assert (dequantize(QUANTIZER.quantize(weight, options)) - weight).abs().max() <= abs(value) * 15 * 2**-11
    else:
        assert torch.equal(dequantize(QUANTIZER.quantize(weight, options)), weight)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("kind", ["symmetric-minmax", "integer-minmax", "minimum-minmax"])
def test_groups_below_the_smallest_float16_step_keep_what_it_can_say(kind, sign):
    """AutoRound's floor of 1e-5 would turn all of this into zeros; scales of 2^-24 keep it within half of that."""
    weight = sign * torch.tensor([[0.0, 0.3, 0.7, 1.0, 1.6, 2.2, 3.1, 3.4] * 4]) * 2.0**-24
    result = QUANTIZER.quantize(weight, EVERY_KIND[kind])
    assert result.parts["scales"].abs().item() == 2.0**-24
    assert (dequantize(result) - weight).abs().max() <= 2.0**-25


def test_the_scale_is_negative_where_the_extreme_is_positive():
    weight = torch.tensor([[3.0] + [-1.0] * 31, [-3.0] + [1.0] * 31])
    result = QUANTIZER.quantize(weight, AutoRoundOptions(4, 32))
    assert result.parts["scales"].flatten().tolist() == [-0.375, 0.375]
    assert result.parts["codes"][:, 0].tolist() == [0, 0]
    assert dequantize(result)[:, 0].tolist() == [3.0, -3.0]


@kinds
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_weights_are_refused_with_words_for_a_name(options, value):
    weight = gaussian(4, 80)
    weight[3, 79] = value
    with pytest.raises(WeightError, match=r"^holds NaN or infinity; .*PATTERN=none"):
        QUANTIZER.quantize(weight, options)


@kinds
def test_scales_beyond_the_dtype_are_refused_with_the_way_out(options):
    weight = gaussian(4, 64)
    weight[2, 5] = -2e6
    with pytest.raises(
        WeightError, match=r"beyond 65504, the largest float16; set scale_dtype to bfloat16 or float32$"
    ):
        QUANTIZER.quantize(weight, options)
    for dtype in ("bfloat16", "float32"):
        QUANTIZER.quantize(weight, dataclasses.replace(options, scale_dtype=dtype)).validate()


def test_a_minimum_beyond_the_dtype_is_refused():
    weight = 70000 + gaussian(2, 32)
    with pytest.raises(WeightError, match="needs a minimum of 69"):
        QUANTIZER.quantize(weight, EVERY_KIND["minimum-minmax"])


def test_broken_importance_is_refused():
    broken = Calibration(importance=torch.full((64,), torch.nan))
    with pytest.raises(WeightError, match="calibration"):
        QUANTIZER.quantize(gaussian(4, 64), EVERY_KIND["symmetric-search"], broken)


def test_schemes_and_registration():
    found = registry(__import__("lowbit_autoround")).quantizers["autoround"]
    assert isinstance(found, AutoRoundQuantizer)
    assert found.scheme(AutoRoundOptions()).summary() == "affine 4-bit g128"
    assert found.scheme(AutoRoundOptions(3, None, symmetric=False)).summary() == "affine 3-bit per-channel asym"
    assert found.scheme(EVERY_KIND["minimum-search"]).summary() == "affine 4-bit g32 min"
    assert found.scheme(AutoRoundOptions(zero="minimum")).symmetric


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"bits": 1}, "bits must be 2 to 8 for symmetric weights, got 1"),
        ({"bits": 0, "symmetric": False}, "bits must be 1 to 8 for asymmetric weights, got 0"),
        ({"bits": 9}, "got 9"),
        ({"group_size": 0}, "group_size must be positive, or none for the whole row, got 0"),
        ({"zero": "float"}, "zero must be one of integer, minimum, got 'float'"),
        ({"scale": "mse"}, "scale must be one of minmax, search, got 'mse'"),
        ({"scale_dtype": "float64"}, "scale_dtype must be one of float16, bfloat16, float32, got 'float64'"),
        ({"iters": -1}, "iters must be 0 .round to nearest. or more, got -1"),
        ({"recipe": "quick"}, "recipe must be one of default, best, light, rtn, opt_rtn, got 'quick'"),
        ({"lr": 0.0}, "lr must be positive, got 0.0"),
        ({"batch_size": 0}, "batch_size must be positive, got 0"),
        ({"tokens": 1.5}, "tokens must be above 0 and at most 1, a share of a batch, got 1.5"),
        ({"trim": 0.5}, "trim must be 0 to 0.1, a share of the outputs, got 0.5"),
        ({"fallback": "skip"}, "fallback must be one of error, rtn, got 'skip'"),
        ({"two_level": True, "bits": 8}, "two_level goes with 2 to 6 bits, got 8"),
        (
            {"two_level": True},
            "two_level at 4 bits means group_size=32 symmetric=false zero=minimum scale_dtype=float16",
        ),
    ],
)
def test_options_that_make_no_sense_are_refused(settings, words):
    with pytest.raises(OptionError, match=words):
        AutoRoundOptions(**settings)
