"""``autoround`` keeps what every quantizer promises."""

import pytest

from lowbit.testing import QuantizerContract
from lowbit_autoround.kquants import K_SCHEMES
from lowbit_autoround.options import AutoRoundOptions
from lowbit_autoround.quantizer import AutoRoundQuantizer


def k_quant(bits):
    return AutoRoundOptions().for_scheme(K_SCHEMES[bits])


CHOICES = {
    "default": AutoRoundOptions(),
    "q8_0": AutoRoundOptions(bits=8, group_size=32),
    "q4_1": AutoRoundOptions(bits=4, group_size=32, symmetric=False, zero="minimum"),
    "asym3-row-bfloat16": AutoRoundOptions(3, None, symmetric=False, scale_dtype="bfloat16"),
    "sym2-search": AutoRoundOptions(2, 64, scale="search"),
    "asym3-search-float32": AutoRoundOptions(3, 64, symmetric=False, scale="search", scale_dtype="float32"),
    "min1-search-bfloat16": AutoRoundOptions(
        1, 16, symmetric=False, zero="minimum", scale="search", scale_dtype="bfloat16"
    ),
    "q2_k": k_quant(2),
    "q3_k": k_quant(3),
    "q4_k": k_quant(4),
}


class TestAutoRound(QuantizerContract):
    @pytest.fixture
    def quantizer(self):
        return AutoRoundQuantizer()

    @pytest.fixture(params=CHOICES.values(), ids=CHOICES.keys())
    def options(self, request):
        return request.param
