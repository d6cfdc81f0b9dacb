"""Compare two checkpoints, of any two formats, by what their weights mean."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from lowbit.interfaces import Checkpoint, MatmulProblem
from lowbit.metrics import ErrorSum, compare
from lowbit.registry import Registry
from lowbit.tensors import PackedTensor


@dataclass(frozen=True, slots=True)
class Difference:
    """One tensor of two checkpoints; ``problem`` says why there is no error to give (missing, another shape)."""

    name: str
    nbytes: int
    error: ErrorSum | None = None
    problem: str | None = None

    @property
    def exact(self) -> bool:
        """Whether the tensor is in both and every dequantized bit agrees."""
        return self.error is not None and self.error.exact


def differences(first: Checkpoint, second: Checkpoint, registry: Registry) -> Iterator[Difference]:
    """Yield a difference for every tensor of either, in the order of the first, dequantized in float32."""
    for name, entry in first.entries.items():
        if name not in second.entries:
            yield Difference(name, entry.nbytes, problem="only in the first")
        elif entry.shape != second.entries[name].shape:
            shapes = f"{_shape(entry.shape)} and {_shape(second.entries[name].shape)}"
            yield Difference(name, entry.nbytes, problem=f"shapes differ: {shapes}")
        else:
            error = compare(floats(first, name, registry), floats(second, name, registry))
            yield Difference(name, entry.nbytes, error)
    for name, entry in second.entries.items():
        if name not in first.entries:
            yield Difference(name, entry.nbytes, problem="only in the second")


def floats(checkpoint: Checkpoint, name: str, registry: Registry) -> Tensor:
    """Read one tensor; a packed one is dequantized to float32 by its layout's plain-torch kernel."""
    value = checkpoint.read(name)
    if not isinstance(value, PackedTensor):
        return value
    problem = MatmulProblem(value.layout, value.scheme, value.shape)
    return registry.reference_kernel(problem).dequantize(value)


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"
