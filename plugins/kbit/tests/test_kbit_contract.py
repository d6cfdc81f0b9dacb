"""``kbit`` keeps what every quantizer promises."""

import pytest

from lowbit.testing import QuantizerContract
from lowbit_kbit.options import KbitOptions
from lowbit_kbit.quantizer import KbitQuantizer

CHOICES = {
    "default": KbitOptions(),
    "int4": KbitOptions(codebook="int", scale="absmax"),
    "nf3-g32-float32": KbitOptions(bits=3, group_size=32, codebook="nf", scale="absmax", scale_dtype="float32"),
    "fp4-signed-bfloat16": KbitOptions(codebook="fp", scale="signed", scale_dtype="bfloat16"),
    "int2-search-row": KbitOptions(bits=2, group_size=None, codebook="int", scale="search"),
    "learned2-search": KbitOptions(bits=2, group_size=128, codebook="learned", scale="search", candidates=5),
    "nf4-nested": KbitOptions(codebook="nf", scale="absmax", scale_dtype="float32", flat=True, nested=True),
    "learned8-g16": KbitOptions(bits=8, group_size=16, codebook="learned", scale="absmax"),
}


class TestKbit(QuantizerContract):
    @pytest.fixture
    def quantizer(self):
        return KbitQuantizer()

    @pytest.fixture(params=CHOICES.values(), ids=CHOICES.keys())
    def options(self, request):
        return request.param
