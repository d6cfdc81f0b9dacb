"""What ``binary`` chooses: exact groups, closed forms, weights for columns, and a product as good as the published one."""

import itertools

import pytest
import torch

from lowbit import Calibration, dequantize
from lowbit.errors import OptionError, WeightError
from lowbit.testing import weights
from lowbit_binary.options import BinaryOptions
from lowbit_binary.quantizer import BinaryQuantizer
from lowbit_binary.sums import fit_scales, nearest_signs

QUANTIZER = BinaryQuantizer()


def nmse(weight, options, calibration=None):
    error = dequantize(QUANTIZER.quantize(weight, options, calibration)) - weight
    return float(error.double().square().sum() / weight.double().square().sum())


@pytest.mark.parametrize(("group_size", "best_four_levels"), [(32, 0.104), (64, 0.110), (128, 0.114)])
def test_two_planes_are_no_worse_than_the_best_symmetric_four_levels(group_size, best_four_levels):
    assert nmse(weights.gaussian((256, 4096)), BinaryOptions(2, group_size)) <= best_four_levels


@pytest.mark.parametrize(("bits", "error"), [(1, 0.3611), (2, 0.1138), (3, 0.0350), (4, 0.0110)])
def test_the_measured_errors_of_the_readme(bits, error):
    assert nmse(weights.gaussian((256, 4096)), BinaryOptions(bits, 128)) == pytest.approx(error, rel=0.01)


@pytest.mark.parametrize("seed", range(5))
def test_two_planes_are_the_best_of_all_assignments(seed):
    """Seven weights: every choice of which magnitudes are large, by least squares, importance included."""
    groups = weights.gaussian((1, 7), seed).view(1, 1, 7)
    importance = torch.rand(1, 7, generator=weights.generator(seed)) + 0.1
    magnitudes, h = groups.abs().flatten().double(), importance.flatten().double()
    best = min(
        sum(
            (h[part] * (magnitudes[part] - (h[part] * magnitudes[part]).sum() / h[part].sum()).square()).sum().item()
            for part in (torch.tensor(choice), ~torch.tensor(choice))
            if part.any()
        )
        for choice in itertools.product((False, True), repeat=7)
    )
    scales = fit_scales(groups, 2, importance)
    signs = nearest_signs(groups, scales).float() * 2 - 1
    found = ((signs * scales[..., None]).sum(0) - groups).square() * importance
    assert float(found.double().sum()) == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("planes", [1, 2, 3, 4])
def test_signs_are_the_nearest_of_all_sums(planes):
    groups = weights.gaussian((3, 40)).view(3, 2, 20)
    scales = fit_scales(groups, planes)
    signs = nearest_signs(groups, scales).float() * 2 - 1
    found = ((signs * scales[..., None]).sum(0) - groups).abs()
    choices = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=planes)))
    sums = torch.einsum("ck,krg->crg", choices, scales)
    nearest = (sums[..., None] - groups).abs().amin(0)
    torch.testing.assert_close(found, nearest, rtol=0, atol=1e-6)


@pytest.mark.parametrize("bits", [3, 4])
def test_alternating_beats_greedy(bits):
    weight = weights.gaussian((64, 1024))
    remains, groups = weight.view(64, 8, 128).clone(), 0.0
    for _ in range(bits):
        scale = remains.abs().mean(-1, keepdim=True)
        groups, remains = groups + scale, remains - torch.where(remains >= 0, scale, -scale)
    greedy = float(remains.square().sum() / weight.square().sum())
    assert nmse(weight, BinaryOptions(bits, 128)) < 0.75 * greedy


@pytest.mark.parametrize("form", ["sum", "product"])
def test_importance_moves_the_error_to_columns_that_matter_less(form):
    weight = weights.gaussian((96, 128))
    importance = torch.ones(128)
    importance[:32] = 50.0
    options = BinaryOptions(2, 128, form, steps=20)
    for calibration in (Calibration(importance=importance), Calibration(hessian=torch.diag(importance))):
        error = (dequantize(QUANTIZER.quantize(weight, options, calibration)) - weight).square()
        plain = (dequantize(QUANTIZER.quantize(weight, options)) - weight).square()
        assert float(error[:, :32].mean()) < 0.95 * float(plain[:, :32].mean())
        assert float((error * importance).sum()) < float((plain * importance).sum())


def test_column_scales_pay_where_columns_differ():
    """Columns of sizes that vary e-fold: one bit a column more precise than groups can be."""
    spread = torch.randn(512, generator=weights.generator(1)).exp()
    weight = weights.gaussian((128, 512)) * spread
    assert nmse(weight, BinaryOptions(2, 128, column_scales=True)) < 0.8 * nmse(weight, BinaryOptions(2, 128))


def test_a_product_reaches_the_published_error():
    """arXiv 2505.11076's algorithm on N(0,1): 0.326 at one bit after 150 steps on 768x768; a smaller weight and fewer steps."""
    weight = weights.gaussian((192, 192))
    assert nmse(weight, BinaryOptions(1, form="product", steps=60)) < 0.345
    assert nmse(weight, BinaryOptions(2, form="product", steps=60)) < 0.150


def test_a_product_exploits_low_rank():
    weight = weights.gaussian((96, 8)) @ weights.gaussian((8, 160), 1)
    assert nmse(weight, BinaryOptions(2, form="product")) < 0.5 * nmse(weight, BinaryOptions(2, None))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"bits": 5}, "1, 2, 3 or 4, got 5"),
        ({"bits": 1.5}, "1, 2, 3 or 4, got 1.5"),
        ({"bits": 0, "form": "product"}, "above 0"),
        ({"group_size": 8}, "16 to 4096"),
        ({"form": "product", "column_scales": True}, "goes with form=sum"),
        ({"form": "quotient"}, "one of sum, product"),
        ({"steps": 0}, "at least 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(settings, words):
    with pytest.raises(OptionError, match=words):
        BinaryOptions(**settings)


def test_calibration_that_broke_is_refused():
    broken = Calibration(importance=torch.full((64,), float("nan")))
    with pytest.raises(WeightError, match="calibrate again"):
        QUANTIZER.quantize(weights.gaussian((4, 64)), BinaryOptions(), broken)


def test_a_scale_beyond_float16_names_the_way_out():
    with pytest.raises(WeightError, match="scale_dtype to bfloat16 or float32"):
        QUANTIZER.quantize(weights.gaussian((4, 64)) * 1e6, BinaryOptions())
    wide = BinaryOptions(scale_dtype="float32")
    assert nmse(weights.gaussian((4, 64)) * 1e6, wide) < 0.15
