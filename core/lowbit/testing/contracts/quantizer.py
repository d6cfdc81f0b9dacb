"""``QuantizerContract``: the scheme is known beforehand, results repeat, inputs survive, errors stay within budget."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from lowbit.errors import LowbitError, WeightError
from lowbit.grids import dequantize
from lowbit.interfaces import Calibration, Quantizer
from lowbit.metrics import compare
from lowbit.scheme import Scheme
from lowbit.tensors import QuantizedTensor, bit_equal
from lowbit.testing import budgets, weights
from lowbit.testing.contracts.checks import assert_same_quantized, assert_sentence, override, transposed

ROWS = 64


class QuantizerContract:
    """Subclass it, and override ``quantizer`` and ``options``; the other fixtures have defaults.

    A quantizer promises: the result has the scheme that ``scheme(options)`` announced, the shape of the weight, and memory of
    its own; the same weight and options give the same bits, whatever the number of threads and the state of torch's global
    generator; the weight is not written to; every part is finite and every code in range for finite weights (a weight that
    the scales cannot hold may be refused with WeightError); NaN and infinity are refused with WeightError; zeros stay zeros;
    the error on Gaussian weights is within ``max_nmse`` and falls with every bit.
    """

    @pytest.fixture
    def quantizer(self) -> Quantizer[Any]:
        """Override: an instance of the quantizer."""
        override("QuantizerContract", "quantizer", "an instance of your Quantizer")

    @pytest.fixture
    def options(self) -> Any:
        """Override: its options, perhaps parametrized."""
        override("QuantizerContract", "options", "an instance of its Options")

    @pytest.fixture
    def shape(self, quantizer: Quantizer[Any], options: Any) -> tuple[int, int]:
        """Whole groups, and enough weights (65536 or more) for torch to split work over threads."""
        group = quantizer.scheme(options).group_size or 1
        return ROWS, -(-1024 // group) * group

    @pytest.fixture
    def calibration(self, quantizer: Quantizer[Any], options: Any, shape: tuple[int, int]) -> Calibration | None:
        """What ``needs`` asks for, measured on Gaussian inputs of unequal columns; None when it needs nothing."""
        if not quantizer.needs_for(options) & {"hessian", "importance"}:
            return None
        columns = shape[1]
        gains = 0.1 + torch.rand(columns, generator=weights.generator(2))
        inputs = torch.randn(2 * columns, columns, generator=weights.generator(3)) * gains
        return Calibration(importance=inputs.square().mean(0), hessian=inputs.T @ inputs / len(inputs))

    @pytest.fixture
    def max_nmse(self, quantizer: Quantizer[Any], options: Any, shape: tuple[int, int]) -> float:
        """The error allowed on Gaussian weights, relative to their mean square; the default is ``budgets.nmse_budget``."""
        return budgets.nmse_budget(quantizer.scheme(options), shape[1])

    def test_options_are_a_frozen_dataclass(self, quantizer: Quantizer[Any], options: Any) -> None:
        """``Options`` makes command-line flags, and a frozen value can be shared by every tensor of a rule."""
        assert isinstance(options, quantizer.Options)
        assert dataclasses.is_dataclass(quantizer.Options)
        for field in dataclasses.fields(options):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(options, field.name, getattr(options, field.name))

    def test_scheme_is_known_beforehand(
        self, quantizer: Quantizer[Any], options: Any, shape: tuple[int, int], calibration: Calibration | None
    ) -> None:
        """The announced scheme, the weight's shape, and a scheme that survives a file."""
        result = quantizer.quantize(weights.gaussian(shape), options, calibration)
        assert result.scheme == quantizer.scheme(options)
        assert result.shape == shape
        assert Scheme.from_json(result.scheme.to_json()) == result.scheme
        result.validate()

    def test_options_fit_their_own_scheme(self, quantizer: Quantizer[Any], options: Any) -> None:
        """``fit`` finds options for a scheme that the quantizer gives anyway."""
        fitted = quantizer.fit(options, quantizer.scheme(options))
        assert fitted is not None
        assert quantizer.scheme(fitted) == quantizer.scheme(options)

    def test_a_codebook_announced_is_the_codebook_given(
        self, quantizer: Quantizer[Any], options: Any, shape: tuple[int, int], calibration: Calibration | None
    ) -> None:
        """A layout with a codebook of its own is chosen by what ``codebook`` says, before there are any codes."""
        said = quantizer.codebook(options)
        if said is not None:
            found = quantizer.quantize(weights.gaussian(shape), options, calibration).parts.get("codebook")
            assert found is not None, "codes without a codebook"
            assert bit_equal(found, said)
            assert quantizer.with_codebook(options, said) == options

    def test_same_input_same_bits(
        self, quantizer: Quantizer[Any], options: Any, shape: tuple[int, int], calibration: Calibration | None
    ) -> None:
        """Another state of torch's global generator changes nothing."""
        weight = weights.gaussian(shape)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            first = quantizer.quantize(weight, options, calibration)
            torch.manual_seed(2)
            second = quantizer.quantize(weight.clone(), options, calibration)
        assert_same_quantized(second, first, "the second run")

    def test_threads_change_nothing(
        self, quantizer: Quantizer[Any], options: Any, shape: tuple[int, int], calibration: Calibration | None
    ) -> None:
        """One thread and three threads give the same bits, and torch keeps its setting."""
        weight, before, results = weights.gaussian(shape), torch.get_num_threads(), []
        try:
            for threads in (1, 3):
                torch.set_num_threads(threads)
                results.append(quantizer.quantize(weight, options, calibration))
                assert torch.get_num_threads() == threads, "the quantizer changed torch's number of threads"
        finally:
            torch.set_num_threads(before)
        assert_same_quantized(results[1], results[0], "three threads")

    def test_input_is_left_alone(
        self, quantizer: Quantizer[Any], options: Any, shape: tuple[int, int], calibration: Calibration | None
    ) -> None:
        """The weight has the same bits afterwards, and writing to it later does not change the result."""
        weight = weights.gaussian(shape)
        result = quantizer.quantize(weight, options, calibration)
        assert torch.equal(weight, weights.gaussian(shape)), "the quantizer wrote to its input"
        parts = {name: part.clone() for name, part in result.parts.items()}
        weight.fill_(7)
        for name, part in result.parts.items():
            assert torch.equal(part.float(), parts[name].float()), f"{name} shares memory with the weight"

    def test_strides_change_nothing(
        self, quantizer: Quantizer[Any], options: Any, shape: tuple[int, int], calibration: Calibration | None
    ) -> None:
        """A weight stored column by column gives the same bits."""
        weight = weights.gaussian(shape)
        expected = quantizer.quantize(weight, options, calibration)
        assert_same_quantized(
            quantizer.quantize(transposed(weight), options, calibration), expected, "a transposed weight"
        )

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_gaussian_error_is_within_budget(
        self,
        quantizer: Quantizer[Any],
        options: Any,
        shape: tuple[int, int],
        calibration: Calibration | None,
        max_nmse: float,
        dtype: torch.dtype,
    ) -> None:
        """Every float dtype is accepted, and quantized as well as the budget asks."""
        weight = weights.gaussian(shape, dtype=dtype)
        assert nmse(weight, quantizer.quantize(weight, options, calibration)) <= max_nmse

    def test_every_bit_lowers_the_error(
        self, quantizer: Quantizer[Any], options: Any, shape: tuple[int, int], calibration: Calibration | None
    ) -> None:
        """One bit fewer is worse and one bit more is better, where there are such options."""
        errors = [
            nmse(weights.gaussian(shape), quantizer.quantize(weights.gaussian(shape), choice, calibration))
            for choice in _neighbours(quantizer, options)
        ]
        assert errors == sorted(errors, reverse=True)
        assert len(set(errors)) == len(errors)

    @pytest.mark.parametrize("kind", weights.AWKWARD)
    def test_awkward_weights_stay_finite(
        self,
        quantizer: Quantizer[Any],
        options: Any,
        shape: tuple[int, int],
        calibration: Calibration | None,
        kind: str,
    ) -> None:
        """Codes in range, finite parts and finite weights for every kind in ``weights.AWKWARD``; all zeros stay zeros."""
        group_size = quantizer.scheme(options).group_size or shape[1]
        result = quantizer.quantize(weights.AWKWARD[kind](shape, group_size, 0), options, calibration)
        result.validate(kind)
        decoded = dequantize(result)
        assert torch.isfinite(decoded).all(), f"{kind} weights decode to NaN or infinity"
        if kind == "all-zero":
            assert not decoded.any(), "zeros did not stay zeros"

    def test_weights_beyond_the_scales_are_finite_or_refused(
        self, quantizer: Quantizer[Any], options: Any, shape: tuple[int, int], calibration: Calibration | None
    ) -> None:
        """Weights of 1e30 do not fit float16 scales: an infinite scale is the one wrong answer."""
        weight = weights.beyond_fp16(shape, 1)
        try:
            result = quantizer.quantize(weight, options, calibration)
        except WeightError as error:
            assert_sentence(str(error))
        else:
            result.validate("weights of 1e30")

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
    @pytest.mark.parametrize("place", [(0, 0), (-1, -1)], ids=["first", "last"])
    def test_non_finite_weights_are_refused(
        self,
        quantizer: Quantizer[Any],
        options: Any,
        shape: tuple[int, int],
        calibration: Calibration | None,
        value: float,
        place: tuple[int, int],
    ) -> None:
        """One NaN or infinity anywhere raises WeightError with a sentence."""
        with pytest.raises(WeightError) as raised:
            quantizer.quantize(weights.non_finite(shape, value, *place), options, calibration)
        assert_sentence(str(raised.value))

    @pytest.mark.parametrize("columns", ["short", "one-and-a-half"])
    @pytest.mark.parametrize("rows", [1, 5])
    def test_ragged_groups_work_or_are_refused(
        self, quantizer: Quantizer[Any], options: Any, max_nmse: float, rows: int, columns: str
    ) -> None:
        """A row that its groups do not divide is quantized with a short last group, or refused with a sentence."""
        group_size = quantizer.scheme(options).group_size or 64
        shape = (rows, max(1, group_size // 2 if columns == "short" else group_size + group_size // 2))
        if quantizer.needs_for(options):
            pytest.skip("calibration is made for the shape of the fixture")
        weight = weights.gaussian(shape)
        try:
            result = quantizer.quantize(weight, options)
        except LowbitError as error:
            assert_sentence(str(error))
            return
        result.validate()
        assert result.shape == shape
        assert torch.isfinite(dequantize(result)).all()

    def test_blocks_keep_names_and_schemes(
        self, quantizer: Quantizer[Any], options: Any, shape: tuple[int, int], calibration: Calibration | None
    ) -> None:
        """``quantize_block`` returns a result for every name, each with the announced scheme and its weight's shape."""
        block = {name: weights.gaussian(shape, seed) for seed, name in enumerate(("up", "down"))}
        measured = dict.fromkeys(block, calibration) if calibration else {}
        results = quantizer.quantize_block(block, dict.fromkeys(block, options), measured)
        assert list(results) == list(block)
        for result in results.values():
            assert (result.scheme, result.shape) == (quantizer.scheme(options), shape)
            result.validate()


def nmse(weight: Tensor, quantized: QuantizedTensor) -> float:
    """Return the squared error relative to the weight's square."""
    return compare(weight, dequantize(quantized)).relative ** 2


def _neighbours(quantizer: Quantizer[Any], options: Any) -> list[Any]:
    """Return the options with one bit fewer, as they are, and with one bit more, as far as they make sense."""
    choices = []
    for step in (-1, 0, 1) if hasattr(options, "bits") else (0,):
        try:
            choice = dataclasses.replace(options, bits=options.bits + step) if step else options
            quantizer.scheme(choice)
        except LowbitError:
            continue
        choices.append(choice)
    return choices
