"""Outliers beside any quantizer: a contract for each, places that pay, and the arithmetic of what they save."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import lowbit
from lowbit import Calibration, Outliers, QuantLinear, dequantize
from lowbit.errors import OptionError, WeightError
from lowbit.interfaces import MatmulProblem
from lowbit.outliers import WithOutliers, take_outliers, with_outliers
from lowbit.parts import TensorSpec
from lowbit.recipe import Recipe, Rule
from lowbit.testing import QuantizerContract, weights

REGISTRY = lowbit.installed()
CHOICES = {
    "kbit": {"bits": "2", "group_size": "64"},
    "autoround": {"bits": "3", "group_size": "64"},
    "binary": {"bits": "2", "group_size": "64"},
    "ggml": {"type": "q4_0"},
}


def choice(name, settings, outliers="1%"):
    recipe = Recipe(Rule("*", name, {**settings, "outliers": outliers}))
    return recipe.choose({"up.weight": TensorSpec(torch.float32, (64, 1024))}, REGISTRY)["up.weight"]


@pytest.mark.parametrize("name", CHOICES)
class TestWithOutliers(QuantizerContract):
    @pytest.fixture
    def quantizer(self, name):
        return choice(name, CHOICES[name]).quantizer

    @pytest.fixture
    def options(self, name):
        return choice(name, CHOICES[name]).options


def error(weight, quantized, hessian=None):
    difference = (dequantize(quantized) - weight).double()
    return float(
        ((difference @ hessian.double()) * difference).sum() if hessian is not None else difference.square().sum()
    )


def heavy(shape, seed=0):
    """Gaussian weights of which one in a hundred is ten times as large."""
    weight = weights.gaussian(shape, seed)
    return torch.where(torch.rand(shape, generator=weights.generator(seed + 1)) < 0.01, 10 * weight, weight)


@pytest.mark.parametrize("name", CHOICES)
def test_outliers_lower_the_error_of_every_quantizer(name):
    weight, found = heavy((64, 1024)), choice(name, CHOICES[name])
    inner = found.quantizer.inner
    assert error(weight, found.quantizer.quantize(weight, found.options)) < 0.5 * error(
        weight, inner.quantize(weight, found.options)
    )


def test_an_outlier_is_restored_to_the_precision_of_its_dtype():
    weight = heavy((32, 256))
    found = choice("autoround", CHOICES["autoround"])
    quantized = found.quantizer.quantize(weight, found.options)
    places = dequantize(quantized) != dequantize(quantized.dense)
    assert 0 < int(places.sum()) <= round(0.01 * weight.numel()) == len(quantized.parts["outlier_values"])
    kept = weight[places]
    assert ((dequantize(quantized)[places] - kept).abs() <= 2.0**-11 * (weight[places].abs() + 2)).all()


@pytest.mark.parametrize("calibrated", ["nothing", "importance", "hessian"])
def test_no_other_places_of_the_same_dense_part_are_better(calibrated):
    """The chosen places against a thousand random exchanges of one place: none lowers the output error."""
    weight = weights.gaussian((8, 32))
    inputs = torch.randn(200, 32, generator=weights.generator(5)) * torch.rand(32, generator=weights.generator(6)) * 3
    hessian = torch.diag(inputs.square().mean(0)) if calibrated == "importance" else inputs.T @ inputs / 200
    calibration = {
        "nothing": None,
        "importance": Calibration(importance=hessian.diagonal()),
        "hessian": Calibration(hessian=hessian),
    }[calibrated]
    hessian = torch.eye(32) if calibrated == "nothing" else hessian
    quantizer = with_outliers(choice("kbit", {"bits": "2", "group_size": "32"}).quantizer.inner, Outliers(1 / 256))
    options = quantizer.Options(bits=2, group_size=32, codebook="int", scale="absmax")
    quantized = quantizer.quantize(weight, options, calibration)
    found = error(weight, quantized, hessian)
    dense = dequantize(quantized.dense)
    for place in range(weight.numel()):
        other = dense.flatten().clone()
        other[place] = weight.flatten()[place]
        difference = (other.view_as(weight) - weight).double()
        assert float(((difference @ hessian.double()) * difference).sum()) >= found * (1 - 1e-3)


def test_they_are_counted_in_bits_and_packed():
    found = choice("kbit", {"bits": "2", "group_size": "64"}, "0.5%")
    route = REGISTRY.route(found.scheme, (64, 1024), "native")
    spec = route.packer.spec(found.scheme, (64, 1024))
    count = round(0.005 * 64 * 1024)
    assert spec.bits_per_weight == pytest.approx(
        2 + 16 / 64 + 32 * count / 65536 + (32 * 65 + 32 * 4) / 65536
    )  # codes, scales, values with columns, row pointers and the codebook
    packed = route.packer.pack(found.quantizer.quantize(weights.gaussian((64, 1024)), found.options))
    assert packed.spec == spec
    with pytest.raises(lowbit.errors.NoRouteError, match="native"):
        REGISTRY.route(found.scheme, (64, 1024), "gptq")


def test_columns_beyond_16_bits():
    found = choice("autoround", {"group_size": "none"}, "0.1%")
    quantized = found.quantizer.quantize(weights.gaussian((2, 40000)), found.options)
    assert quantized.parts["outlier_columns"].dtype is torch.int32
    assert int(quantized.parts["outlier_columns"].max()) > 2**15


@pytest.mark.parametrize("name", CHOICES)
def test_a_layer_with_outliers_multiplies(name):
    found, weight = choice(name, CHOICES[name]), heavy((64, 1024))
    packer = REGISTRY.route(found.scheme, (64, 1024), "native").packer
    layer = QuantLinear.from_packed(packer.pack(found.quantizer.quantize(weight, found.options)), dtype=torch.float32)
    x = torch.randn(3, 1024, generator=weights.generator(7))
    expected = x.double() @ dequantize(packer.unpack(layer.packed)).double().T
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=1e-3)


def test_the_rows_kernel_serves_them():
    scheme = choice("kbit", CHOICES["kbit"]).scheme
    assert REGISTRY.kernel_for(MatmulProblem("plain", scheme, (64, 1024))).name == "cpu-rows"


@pytest.mark.parametrize(
    ("text", "density"), [("0.5%", 0.005), ("0.005", 0.005), ("1 %", 0.01), ("0", None), ("none", None), ("50%", 0.5)]
)
def test_shares(text, density):
    rest, outliers = take_outliers({"bits": "3", "outliers": text}, lowbit.installed().quantizers["kbit"].Options)
    assert rest == {"bits": "3"}
    assert (outliers.density if outliers else None) == density


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"outliers": "much"}, "0.5% or 0.005"),
        ({"outliers": "-1%"}, "0.5% or 0.005"),
        ({"outliers": "60%"}, "at most 50%"),
        ({"outlier_dtype": "float16"}, "give outliers too"),
        ({"outliers": "1%", "outlier_dtype": "int8"}, "float16, bfloat16 or float32"),
    ],
)
def test_settings_that_make_no_sense(settings, words):
    with pytest.raises(OptionError, match=words):
        take_outliers(settings, lowbit.installed().quantizers["kbit"].Options)


def test_a_rule_may_go_without():
    recipe = Recipe(Rule("*", "kbit", {"outliers": "1%"}), (Rule.parse("a.*=kbit,outliers=none"),))
    chosen = recipe.choose(dict.fromkeys(("a.weight", "b.weight"), TensorSpec(torch.float32, (64, 64))), REGISTRY)
    assert chosen["a.weight"].scheme.outliers is None
    assert chosen["b.weight"].scheme.outliers == Outliers(0.01)


def test_values_beyond_float16_name_the_way_out():
    weight = weights.gaussian((16, 64))
    weight[3, 5] = 1e6
    options = {"bits": "4", "group_size": "64", "scale_dtype": "float32"}
    found = choice("kbit", options)
    with pytest.raises(WeightError, match="outlier_dtype to bfloat16 or float32"):
        found.quantizer.quantize(weight, found.options)
    wide = choice("kbit", {**options, "outlier_dtype": "float32"})
    assert float(dequantize(wide.quantizer.quantize(weight, wide.options))[3, 5]) == pytest.approx(1e6)


class Tuner(WithOutliers):
    """Stands for a quantizer that tunes a block: it remembers what the block gave while it ran."""

    def __init__(self, inner):
        self.inner, self.name, self.Options, self.seen = inner, "tuner", inner.Options, []

    def needs_for(self, options):
        return frozenset({"block_inputs"})

    def scheme(self, options):
        return self.inner.scheme(options)

    def quantize(self, weight, options, calibration=None):
        return self.inner.quantize(weight, options, calibration)

    def quantize_block(self, weights, options, calibration, block=None):
        self.seen.append(block.module(torch.eye(weights["up"].shape[1])).T.detach())
        return {name: self.inner.quantize(weight, options[name]) for name, weight in weights.items()}


def test_a_tuned_block_runs_with_its_outliers():
    """What the tuner sees is the sum of its own weight and the outliers, and that is what is stored."""

    class OneLinear:
        module, linears = nn.Sequential(nn.Linear(256, 32, bias=False)), {"up": "0"}

    weight, tuner = heavy((32, 256)), Tuner(REGISTRY.quantizers["autoround"])
    outer = WithOutliers(tuner, Outliers(0.01))
    options = replace(choice("autoround", CHOICES["autoround"]).options)
    linear = OneLinear.module[0]
    found = outer.quantize_block({"up": weight}, {"up": options}, {}, OneLinear)["up"]
    apart = tuner.seen[0] - linear.weight.detach()
    assert int((apart != 0).sum()) == round(0.01 * weight.numel())
    torch.testing.assert_close(apart[apart != 0], weight[apart != 0], rtol=1e-3, atol=1e-3)
    untuned = WithOutliers(tuner.inner, Outliers(0.01)).quantize(weight, options)
    assert torch.equal(apart != 0, dequantize(untuned) != dequantize(untuned.dense)), (
        "the places are those without tuning"
    )
    torch.testing.assert_close(dequantize(found) - dequantize(found.dense), apart, rtol=1e-3, atol=1e-3)
    assert not linear._forward_hooks, "the hook stayed"
    assert outer.needs_for(options) == {"block_inputs", "importance"}
