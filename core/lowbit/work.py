"""``Work``: what one step of a plan does to one tensor; the error of the result is measured while both are in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from lowbit.errors import SchemeError, WeightError
from lowbit.grids import dequantize
from lowbit.interfaces import Calibration, MatmulProblem, Value
from lowbit.lift import lift
from lowbit.metrics import ErrorSum, compare, measure
from lowbit.parts import TensorSpec
from lowbit.plan import Action, Step
from lowbit.proof import same_numbers
from lowbit.registry import Registry
from lowbit.streams import streamed
from lowbit.tensors import PackedSpec, PackedTensor, QuantizedTensor


@dataclass(frozen=True, slots=True)
class Work:
    """Carries out steps; one instance a conversion."""

    registry: Registry
    calibration: Mapping[str, Calibration]

    def run(self, step: Step, value: Value) -> tuple[Value, ErrorSum]:
        """Return what becomes of a tensor, and its error. Raises WeightError and SchemeError that name the tensor."""
        try:
            return self._run(step, value)
        except (WeightError, SchemeError) as error:
            raise type(error)(f"{step.name}: {error}") from error

    def _run(self, step: Step, value: Value) -> tuple[Value, ErrorSum]:
        if step.action is Action.QUANTIZE:
            return self._quantize(step, value)
        if step.action is Action.TRANSCODE:
            assert isinstance(value, PackedTensor)
            return self._transcode(step, value)
        if step.action is Action.COPY:
            return value, ErrorSum()
        assert isinstance(step.target, TensorSpec)
        weight = floats(value, self.registry)
        result = weight.to(step.target.dtype)
        return result, compare(weight, result)

    def _quantize(self, step: Step, value: Value) -> tuple[Value, ErrorSum]:
        assert step.choice is not None
        weight = floats(value, self.registry)
        quantizer, options = step.choice.quantizer, step.choice.options
        quantized = quantizer.quantize_block({step.name: weight}, {step.name: options}, self.calibration)[step.name]
        return finish(step, weight, quantized)

    def _transcode(self, step: Step, value: PackedTensor) -> tuple[Value, ErrorSum]:
        assert step.packer is not None
        assert isinstance(step.target, PackedSpec)
        source = self.registry.packers[value.layout]
        if (result := streamed(value, source, step.packer, step.target)) is not None:
            return result, ErrorSum()
        quantized = source.unpack(value)
        result = step.packer.pack(lift(quantized, step.target.scheme))
        written = step.packer.unpack(result)
        error = ErrorSum() if same_numbers(quantized, written) else measure(dequantize(quantized), written)
        return result, error


def finish(
    step: Step, weight: Tensor, quantized: QuantizedTensor, error: ErrorSum | None = None
) -> tuple[Value, ErrorSum]:
    """Return new codes as the step stores them, packed or as floats, and their error against ``weight``.

    ``error`` is that of the codes, where it is known already.
    """
    if isinstance(step.target, TensorSpec):
        result = dequantize(quantized).to(step.target.dtype)
        return result, compare(weight, result)
    assert step.packer is not None
    stored = lift(quantized, step.target.scheme)  # another scheme only where the format lacks the quantizer's own
    return step.packer.pack(stored), error or measure(weight, stored)


def floats(value: Value, registry: Registry) -> Tensor:
    """Return a weight as floats: as it is, or dequantized by the reference kernel of its layout."""
    if not isinstance(value, PackedTensor):
        return value
    return registry.reference_kernel(MatmulProblem(value.layout, value.scheme, value.shape)).dequantize(value)
