"""Kernels for layout ``plain``: correct ones, and some that are each slightly wrong."""

import pytest
import torch

from lowbit import Grid, Kernel, ReferenceKernel, Scheme, Zero
from lowbit.grids import dequantize
from lowbit.testing import KernelContract
from lowbit_formats.plain import PlainPacker

MATMUL = frozenset({"test_matmul_agrees_with_the_reference"})


SERVED = [Scheme(Grid.AFFINE, 3, 64, Zero.INTEGER), Scheme(Grid.AFFINE, 4, 128, Zero.INTEGER)]


class PlainKernel(Kernel):
    """Sums the product of each group, then applies the group's scale: another order than the reference."""

    name = "toy"
    priority = 5

    def why_not(self, problem):
        if problem.layout != "plain":
            return f"runs layout plain, not {problem.layout!r}"
        scheme = problem.scheme
        if scheme not in SERVED:
            return f"runs affine weights with integer zeros, not {scheme.summary()}"
        return None if problem.shape[1] % scheme.group_size == 0 else "groups must divide in_features"

    def dequantize(self, packed, dtype=torch.float32):
        return dequantize(PlainPacker().unpack(packed)).to(dtype)

    def matmul(self, x, packed, bias=None):
        quantized = PlainPacker().unpack(packed)
        size, shape = quantized.scheme.group_size, quantized.shape
        codes = quantized.parts["codes"].float().reshape(shape[0], -1, size)
        values = codes - self.zeros(quantized.parts["zeros"]).float().unsqueeze(-1)
        groups = x.float().reshape(*x.shape[:-1], shape[1] // size, size)
        sums = torch.einsum("...gk,ogk->...og", groups, values)
        y = self.rounded(sums * self.scales(quantized.parts["scales"]).float(), x.dtype).sum(-1)
        return self.biased(y, bias).to(x.dtype)

    def zeros(self, zeros):
        return zeros

    def scales(self, scales):
        return scales

    def rounded(self, sums, dtype):
        return sums

    def biased(self, y, bias):
        return y if bias is None else y + bias.float()


class _Contract(KernelContract):
    kind = PlainKernel
    must_fail: frozenset[str] = frozenset()

    @pytest.fixture
    def kernel(self):
        return self.kind()

    @pytest.fixture
    def packer(self):
        return PlainPacker()


class CorrectKernel(_Contract):
    pass


class CorrectReferenceKernel(_Contract):
    @pytest.fixture
    def kernel(self):
        return ReferenceKernel(PlainPacker())


class NegatesTheBias(PlainKernel):
    def biased(self, y, bias):
        return y if bias is None else y - bias.float()


class BrokenNegatesTheBias(_Contract):
    kind = NegatesTheBias
    must_fail = MATMUL


class OffByOneGroup(PlainKernel):
    def scales(self, scales):
        return scales.roll(1, dims=-1)


class BrokenOffByOneGroup(_Contract):
    kind = OffByOneGroup
    must_fail = MATMUL


class OffByOneZero(PlainKernel):
    def zeros(self, zeros):
        return zeros + 1


class BrokenOffByOneZero(_Contract):
    kind = OffByOneZero
    must_fail = MATMUL


class AccumulatesInHalf(PlainKernel):
    """The sum over groups loses the digits that float32 would keep."""

    def rounded(self, sums, dtype):
        return sums.bfloat16().float()


class BrokenAccumulatesInHalf(_Contract):
    kind = AccumulatesInHalf
    must_fail = MATMUL


class AcceptsEverything(PlainKernel):
    def why_not(self, problem):
        return super().why_not(problem) if problem.layout == "plain" else None


class BrokenAcceptsEverything(_Contract):
    kind = AcceptsEverything
    must_fail = frozenset({"test_foreign_layouts_are_refused"})


class IgnoresStrides(PlainKernel):
    def matmul(self, x, packed, bias=None):
        return super().matmul(torch.as_strided(x, x.shape, torch.empty(x.shape).stride()), packed, bias)


class BrokenIgnoresStrides(_Contract):
    kind = IgnoresStrides
    must_fail = frozenset({"test_leading_dimensions_and_strides_change_nothing"})


class ReturnsFloat(PlainKernel):
    def matmul(self, x, packed, bias=None):
        return super().matmul(x, packed, bias).float()


class BrokenReturnsFloat(_Contract):
    kind = ReturnsFloat
    must_fail = MATMUL


class TransposedWeight(PlainKernel):
    def dequantize(self, packed, dtype=torch.float32):
        return super().dequantize(packed, dtype).T


class BrokenTransposedWeight(_Contract):
    kind = TransposedWeight
    must_fail = frozenset({"test_dequantize_agrees_with_the_reference"})


class RoundsTwice(PlainKernel):
    def dequantize(self, packed, dtype=torch.float32):
        return super().dequantize(packed, torch.bfloat16).to(dtype)


class BrokenRoundsTwice(_Contract):
    kind = RoundsTwice
    must_fail = frozenset({"test_dequantize_agrees_with_the_reference"})


class PreparesAgain(PlainKernel):
    def prepare(self, packed):
        buffers = {**packed.buffers, "scales": packed.buffers["scales"] * 2}
        return type(packed)(packed.spec, buffers)


class BrokenPreparesAgain(_Contract):
    kind = PreparesAgain
    must_fail = frozenset({"test_prepare_twice_is_prepare_once"})


class ScribblesOnX(PlainKernel):
    def matmul(self, x, packed, bias=None):
        return super().matmul(x.mul_(1.0).add_(1.0), packed, bias)


class BrokenScribblesOnX(_Contract):
    kind = ScribblesOnX
    must_fail = frozenset({"test_inputs_are_left_alone"})


class SortsRows(PlainKernel):
    def why_no_rows(self, problem):
        return None

    def rows(self, packed, numbers, dtype=torch.float32):
        return self.dequantize(packed, dtype)[numbers.sort().values]


class BrokenSortsRows(_Contract):
    kind = SortsRows
    must_fail = frozenset({"test_rows_are_those_of_the_dequantized_weight"})
