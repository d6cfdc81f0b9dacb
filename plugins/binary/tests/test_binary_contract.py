"""``binary`` keeps what every quantizer, packer and kernel promises."""

import pytest

from lowbit import Binary, BinaryForm, Grid, ReferenceKernel, ScaleFormat, Scheme
from lowbit.testing import KernelContract, PackerContract, QuantizerContract
from lowbit_binary.kernel import PopcountKernel
from lowbit_binary.options import BinaryOptions
from lowbit_binary.packer import WordsPacker
from lowbit_binary.quantizer import BinaryQuantizer

CHOICES = {
    "default": BinaryOptions(),
    "one-plane-row": BinaryOptions(bits=1, group_size=None),
    "three-planes-g32-float32": BinaryOptions(bits=3, group_size=32, scale_dtype="float32"),
    "four-planes-g64-bfloat16": BinaryOptions(bits=4, group_size=64, scale_dtype="bfloat16"),
    "two-planes-columns": BinaryOptions(group_size=64, column_scales=True),
    "product": BinaryOptions(bits=1.5, form="product", steps=6),
}
EXAMPLES = [
    (Scheme(Grid.BINARY, 2, 64, binary=Binary(2)), (16, 256)),
    (Scheme(Grid.BINARY, 1, 128, binary=Binary(1)), (130, 256)),
    (Scheme(Grid.BINARY, 2, None, binary=Binary(2)), (16, 200)),
    (Scheme(Grid.BINARY, 3, 48, binary=Binary(3), scales=ScaleFormat("float32")), (5, 100)),
    (Scheme(Grid.BINARY, 2, 32, binary=Binary(2, column_scales=True)), (16, 96)),
    (Scheme(Grid.BINARY, 1, binary=Binary(1, BinaryForm.PRODUCT, rank=24)), (16, 40)),
    (Scheme(Grid.BINARY, 1, binary=Binary(1, BinaryForm.PRODUCT, rate=2.0)), (96, 64)),
]


class TestBinary(QuantizerContract):
    @pytest.fixture
    def quantizer(self):
        return BinaryQuantizer()

    @pytest.fixture(params=CHOICES.values(), ids=CHOICES.keys())
    def options(self, request):
        return request.param


class TestWords(PackerContract):
    @pytest.fixture
    def packer(self):
        return WordsPacker()

    @pytest.fixture
    def examples(self):
        return EXAMPLES


class TestPopcount(KernelContract):
    @pytest.fixture
    def kernel(self):
        return PopcountKernel()

    @pytest.fixture
    def packer(self):
        return WordsPacker()

    @pytest.fixture
    def examples(self):
        return EXAMPLES


class TestReference(KernelContract):
    @pytest.fixture
    def kernel(self):
        return ReferenceKernel(WordsPacker())

    @pytest.fixture
    def packer(self):
        return WordsPacker()

    @pytest.fixture
    def examples(self):
        return EXAMPLES
