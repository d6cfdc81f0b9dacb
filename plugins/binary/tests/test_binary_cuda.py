"""``binary-cuda``: what it prepares is the same weight, bit for bit, and on a GPU it keeps the contract of kernels."""

from dataclasses import replace

import pytest
import torch

from lowbit import Binary, BinaryForm, Grid, MatmulProblem, Outliers, ReferenceKernel, ScaleFormat, Scheme
from lowbit.tensors import bit_equal
from lowbit.testing import KernelContract, samples
from lowbit_binary.cuda import MOST_ROWS, CudaPopcountKernel
from lowbit_binary.packer import WordsPacker

KERNEL, PACKER = CudaPopcountKernel(), WordsPacker()
EXAMPLES = [
    (Scheme(Grid.BINARY, 1, None, binary=Binary(1)), (64, 4096)),
    (Scheme(Grid.BINARY, 2, None, binary=Binary(2)), (130, 200)),
    (Scheme(Grid.BINARY, 3, 512, binary=Binary(3), scales=ScaleFormat("float32")), (5, 103)),
    (Scheme(Grid.BINARY, 4, None, binary=Binary(4), scales=ScaleFormat("bfloat16")), (16, 1088)),
    (Scheme(Grid.BINARY, 1, binary=Binary(1, BinaryForm.PRODUCT, rank=21)), (16, 41)),
    (Scheme(Grid.BINARY, 1, binary=Binary(1, BinaryForm.PRODUCT, rate=2.0)), (300, 512)),
]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.mark.parametrize(("scheme", "shape"), EXAMPLES, ids=str)
def test_prepared_weights_are_the_same_weights(scheme, shape):
    packed = PACKER.pack(samples.quantized(scheme, shape))
    prepared = KERNEL.prepare(packed)
    assert KERNEL.prepare(prepared) is prepared
    assert bit_equal(KERNEL.dequantize(prepared), ReferenceKernel(PACKER).dequantize(packed))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layout": "plain"}, "binary-words"),
        ({"device": "cpu"}, "NVIDIA"),
        ({"dtype": torch.float32}, "too coarse"),
        ({"capability": (7, 5)}, "8.0"),
        ({"shape": (64, 1 << 17)}, "in_features is at most 65536"),
        ({"scheme": Scheme(Grid.BINARY, 1, 128, binary=Binary(1))}, "group_size to none"),
        ({"scheme": Scheme(Grid.BINARY, 2, None, binary=Binary(2, column_scales=True))}, "leave them out"),
        ({"scheme": Scheme(Grid.BINARY, 1, None, binary=Binary(1), outliers=Outliers(0.01))}, "sign planes alone"),
        ({"scheme": Scheme(Grid.BINARY, 5, None, binary=Binary(5))}, "at most 4 planes"),
        ({"scheme": Scheme(Grid.AFFINE, 4, 128)}, "sign planes"),
    ],
)
def test_it_says_why_not(changes, words):
    problem = MatmulProblem("binary-words", EXAMPLES[0][0], (64, 4096), torch.float16, "cuda", (9, 0))
    assert words in KERNEL.why_not(replace(problem, **changes))


@pytest.mark.cuda
@needs_gpu
class TestCudaPopcount(KernelContract):
    @pytest.fixture
    def kernel(self):
        return KERNEL

    @pytest.fixture
    def packer(self):
        return PACKER

    @pytest.fixture
    def device(self):
        return "cuda"

    @pytest.fixture
    def examples(self):
        return EXAMPLES

    @pytest.mark.parametrize("batch", [2, 8, 9, MOST_ROWS, MOST_ROWS + 1])
    def test_more_rows(self, kernel, reference, problems, tolerance, batch):
        """Whole launches, a second one, and the first number of rows for which the weight is written out."""
        self.test_matmul_agrees_with_the_reference(kernel, reference, problems, tolerance, batch, True)
