"""``KernelContract``: a kernel agrees with float64 products of the reference's weight, within a bound that is derived."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lowbit.interfaces import Kernel, MatmulProblem, Packer
from lowbit.kernels import ReferenceKernel
from lowbit.scheme import Scheme
from lowbit.tensors import PackedTensor, bit_equal
from lowbit.testing import budgets, samples
from lowbit.testing.contracts.checks import assert_same_tensors, assert_sentence, copies, override
from lowbit.testing.weights import generator

Example = tuple[Scheme, tuple[int, int]]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BATCHES = (0, 1, 3, 7, 33)


class KernelContract:
    """Subclass it, and override ``kernel`` and ``packer``; the other fixtures have defaults.

    A kernel promises: ``matmul(x, prepare(p), bias)`` lies within ``budgets.matmul_bound`` of the float64 product with the
    weight that the layout's plain-torch kernel gives, for any number of rows, any leading dimensions and any strides of x;
    ``dequantize(prepare(p), dtype)`` lies within ``budgets.dequantize_bound`` of that weight; ``prepare`` twice is
    ``prepare`` once; nothing that it is given is written to; and ``why_not`` refuses every other layout.
    """

    @pytest.fixture
    def kernel(self) -> Kernel:
        """Override: an instance of the kernel."""
        override("KernelContract", "kernel", "an instance of your Kernel")

    @pytest.fixture
    def packer(self) -> Packer:
        """Override: the packer of the kernel's layout."""
        override("KernelContract", "packer", "the Packer of the layout that your kernel reads")

    @pytest.fixture
    def device(self) -> str:
        """The device to run on."""
        return "cpu"

    @pytest.fixture
    def reference(self, packer: Packer) -> Kernel:
        """The kernel that defines the layout's meaning: unpack, then ``lowbit.grids``."""
        return ReferenceKernel(packer)

    @pytest.fixture
    def tolerance(self) -> float:
        """A factor on the bounds; above 1 only with a reason, such as float16 arithmetic on minimums."""
        return 1.0

    @pytest.fixture
    def examples(self, kernel: Kernel, packer: Packer, device: str) -> Sequence[Example]:
        """Schemes and shapes that the kernel must serve; by default those of ``samples.REPRESENTATIVES`` that it accepts."""
        accepted = [
            (scheme, shape)
            for scheme, shape in samples.REPRESENTATIVES
            if packer.why_not(scheme, shape) is None and _dtypes(kernel, packer, scheme, shape, device)
        ]
        return accepted or override("KernelContract", "examples", "a list of (scheme, shape) that your kernel serves")

    @pytest.fixture
    def problems(
        self, kernel: Kernel, packer: Packer, device: str, examples: Sequence[Example]
    ) -> list[tuple[PackedTensor, torch.dtype]]:
        """Every example, packed, with each dtype that the kernel serves it in."""
        found = []
        for seed, (scheme, shape) in enumerate(examples):
            dtypes = _dtypes(kernel, packer, scheme, shape, device)
            assert dtypes, f"{kernel.name} refuses its example {scheme.summary()} {shape}"
            packed = packer.pack(samples.quantized(scheme, shape, seed))
            buffers = {name: buffer.to(device) for name, buffer in packed.buffers.items()}
            found += [(PackedTensor(packed.spec, buffers), dtype) for dtype in dtypes]
        return found

    @pytest.mark.parametrize("with_bias", [False, True], ids=["product", "with-bias"])
    @pytest.mark.parametrize("batch", BATCHES)
    def test_matmul_agrees_with_the_reference(
        self,
        kernel: Kernel,
        reference: Kernel,
        problems: list[tuple[PackedTensor, torch.dtype]],
        tolerance: float,
        batch: int,
        with_bias: bool,
    ) -> None:
        """No rows, one row, a few, and more than a tile of tensor cores holds."""
        for packed, dtype in problems:
            x, bias = _inputs(packed, (batch,), dtype, with_bias)
            found = kernel.matmul(x, kernel.prepare(packed), bias)
            _assert_close(found, x, reference.dequantize(packed), bias, tolerance)

    def test_leading_dimensions_and_strides_change_nothing(
        self,
        kernel: Kernel,
        reference: Kernel,
        problems: list[tuple[PackedTensor, torch.dtype]],
        tolerance: float,
    ) -> None:
        """A vector, three dimensions, every second column of a wider x, and x stored column by column."""
        for packed, dtype in problems:
            prepared, weight = kernel.prepare(packed), reference.dequantize(packed)
            wide, _ = _inputs(packed, (4, 2), dtype, False)
            views = [wide[0, 0], wide, wide.transpose(0, 1), wide.repeat_interleave(2, dim=-1)[..., ::2]]
            views.append(wide[:, 0].T.contiguous().T)
            for x in views:
                _assert_close(kernel.matmul(x, prepared), x, weight, None, tolerance)

    def test_dequantize_agrees_with_the_reference(
        self,
        kernel: Kernel,
        reference: Kernel,
        problems: list[tuple[PackedTensor, torch.dtype]],
        tolerance: float,
    ) -> None:
        """Shape, dtype and values, in every dtype."""
        for packed, dtype in problems:
            weight = reference.dequantize(packed)
            found = kernel.dequantize(kernel.prepare(packed), dtype)
            assert (found.dtype, tuple(found.shape)) == (dtype, packed.shape)
            error = (found.double() - weight.double()).abs()
            assert (error <= tolerance * budgets.dequantize_bound(weight, dtype)).all(), _worst(error, packed, dtype)

    def test_rows_are_those_of_the_dequantized_weight(
        self, kernel: Kernel, problems: list[tuple[PackedTensor, torch.dtype]], device: str
    ) -> None:
        """Where ``why_no_rows`` is None, else it is a sentence: any rows, in any order, one of them twice, bit for bit."""
        for packed, dtype in problems:
            problem = MatmulProblem(packed.layout, packed.scheme, packed.shape, dtype, device, _capability(device))
            if (reason := kernel.why_no_rows(problem)) is not None:
                assert_sentence(reason)
                continue
            prepared, last = kernel.prepare(packed), packed.shape[0] - 1
            numbers = torch.tensor([last, 0, last // 2, 0], device=device)
            found, weight = kernel.rows(prepared, numbers, dtype), kernel.dequantize(prepared, dtype)
            assert bit_equal(found, weight[numbers]), (
                f"{packed.scheme.summary()} {dtype}: rows differ from the weight's"
            )

    def test_prepare_twice_is_prepare_once(
        self, kernel: Kernel, problems: list[tuple[PackedTensor, torch.dtype]]
    ) -> None:
        """The second preparation changes nothing, because a loader may not know of the first."""
        for packed, _ in problems:
            once = kernel.prepare(packed)
            twice = kernel.prepare(once)
            assert twice.spec == once.spec
            assert_same_tensors(twice.buffers, once.buffers, "prepared twice")

    def test_inputs_are_left_alone(self, kernel: Kernel, problems: list[tuple[PackedTensor, torch.dtype]]) -> None:
        """Neither buffers nor x nor the bias are written to."""
        for packed, dtype in problems:
            x, bias = _inputs(packed, (3,), dtype, True)
            assert bias is not None
            kept = copies({"x": x, "bias": bias, **packed.buffers})
            prepared = kernel.prepare(packed)
            kernel.matmul(x, prepared, bias)
            kernel.dequantize(prepared, dtype)
            assert_same_tensors({"x": x, "bias": bias, **packed.buffers}, kept, "inputs after matmul")

    def test_foreign_layouts_are_refused(
        self, kernel: Kernel, problems: list[tuple[PackedTensor, torch.dtype]], device: str
    ) -> None:
        """The same question about another layout gets a sentence."""
        for packed, dtype in problems:
            problem = MatmulProblem(packed.layout, packed.scheme, packed.shape, dtype, device, _capability(device))
            for layout in ("no-such-layout", packed.layout + "x", ""):
                assert_sentence(kernel.why_not(replace(problem, layout=layout)))


def _dtypes(kernel: Kernel, packer: Packer, scheme: Scheme, shape: tuple[int, int], device: str) -> list[torch.dtype]:
    problem = MatmulProblem(packer.layout, scheme, shape, torch.float32, device, _capability(device))
    return [dtype for dtype in DTYPES if kernel.why_not(replace(problem, dtype=dtype)) is None]


def _capability(device: str) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if device.startswith("cuda") else None


def _inputs(
    packed: PackedTensor, leading: tuple[int, ...], dtype: torch.dtype, with_bias: bool
) -> tuple[Tensor, Tensor | None]:
    source, device = generator(len(leading)), next(iter(packed.buffers.values())).device
    x = torch.randn((*leading, packed.shape[1]), generator=source).to(device, dtype)
    bias = torch.randn(packed.shape[0], generator=source).to(device, dtype)
    return x, bias if with_bias else None


def _assert_close(found: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, tolerance: float) -> None:
    """Assert the bound of ``budgets.matmul_bound`` against the float64 product."""
    assert (found.dtype, tuple(found.shape)) == (x.dtype, (*x.shape[:-1], weight.shape[0]))
    assert found.device == x.device
    exact = x.double() @ weight.double().T
    exact = exact if bias is None else exact + bias.double()
    bound = tolerance * budgets.matmul_bound(x, weight, x.dtype, bias)
    error = (found.double() - exact).abs()
    assert (error <= bound).all(), (
        f"{x.dtype}: {float((error / bound).max()):.1f} times the bound for x {tuple(x.shape)}"
    )


def _worst(error: Tensor, packed: PackedTensor, dtype: torch.dtype) -> str:
    return f"{packed.scheme.summary()} {dtype}: off by {float(error.max()):.3g}"
