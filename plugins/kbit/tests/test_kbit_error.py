"""The error on Gaussian weights reaches the published table of codebooks and scale rules, within what sampling allows."""

import math

import pytest
import torch

from lowbit import dequantize
from lowbit.testing import budgets
from lowbit_kbit.options import KbitOptions
from lowbit_kbit.quantizer import KbitQuantizer

RECIPES = {
    ("nf", "absmax"): "normal-float absmax",
    ("learned", "absmax"): "optimal absmax",
    ("learned", "signed"): "optimal signed absmax",
    ("nf", "search"): "normal-float searched",
    ("int", "search"): "uniform searched",
    ("learned", "search"): "joint searched",
}


def error_and_deviation(codebook, scale, bits, group_size, count=1 << 16):
    """Return the mean squared error on N(0,1) with float32 scales, and the standard deviation of that mean."""
    weight = torch.randn(count // 2048, 2048, generator=torch.Generator().manual_seed(bits * group_size))
    options = KbitOptions(bits, group_size, codebook, scale, "float32")
    error = (dequantize(KbitQuantizer().quantize(weight, options)) - weight).double().square()
    groups = error.view(-1, group_size).mean(1)
    return float(groups.mean()), float(groups.std()) / math.sqrt(len(groups))


@pytest.mark.parametrize("case", budgets.MEASURED["joint searched"], ids="{0[0]}bit-g{0[1]}".format)
@pytest.mark.parametrize("recipe", RECIPES, ids="-".join)
def test_the_published_error_is_reached(recipe, case):
    (codebook, scale), (bits, group_size) = recipe, case
    published = budgets.MEASURED[RECIPES[recipe]][bits, group_size]
    error, deviation = error_and_deviation(codebook, scale, bits, group_size)
    last_digit = 10.0 ** math.floor(math.log10(published) - 3)  # four digits are printed at most
    # Four deviations of this sample; a codebook fitted to it can only be better on it than the optimal one.
    assert error <= published + 4 * deviation + last_digit + (5e-6 if bits > 3 else 0)
    if (codebook, scale) == ("nf", "absmax"):  # no freedom at all: it must agree
        assert error >= published - 4 * deviation - last_digit - (5e-6 if bits > 3 else 0)


@pytest.mark.parametrize(("bits", "gain"), [(2, 0.07), (3, 0.06), (4, 0.05)])
def test_signed_search_beats_the_published_joint_search(bits, gain):
    """Choosing the side of an asymmetric codebook by the scale's sign is worth 5 % and more at groups of 32."""
    error, deviation = error_and_deviation("learned", "search", bits, 32, 1 << 18)
    assert error + 4 * deviation <= (1 - gain) * budgets.MEASURED["joint searched"][bits, 32]
