"""``torch.ops.lowbit``: three operators through which every kernel runs, so that ``torch.compile`` sees no graph break.

    linear(x, buffers, binding, bias) -> x @ W.T + bias      differentiable in x and bias; W is constant
    dequantize(buffers, binding, dtype) -> W (out, in)
    rows(numbers, buffers, binding, dtype) -> W[numbers] (n, in)

``buffers`` are those of a prepared packed tensor, in the order of its spec. ``binding`` is the number of a kernel and a spec in
this process: operators take integers, not objects. Equal pairs share a number, so equal layers share compiled code.

Registered with ``Library.define`` and ``impl``; ``torch.library.custom_op`` costs about twice as much a call (measured
2026-11, CPU: 19-25 against 10-13 us), which a decode step pays for every linear.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from lowbit.interfaces import Kernel
from lowbit.tensors import PackedSpec, PackedTensor

NAMESPACE = "lowbit"


@dataclass(frozen=True, slots=True)
class Binding:
    """A kernel and the spec of the prepared tensors that it gets."""

    kernel: Kernel
    spec: PackedSpec

    def packed(self, buffers: Sequence[Tensor]) -> PackedTensor:
        """Put the buffers of an operator's call together again; they were checked when the layer was prepared."""
        packed = object.__new__(PackedTensor)  # checking again would take longer than the smallest product
        object.__setattr__(packed, "spec", self.spec)
        object.__setattr__(packed, "buffers", dict(zip(self.spec.buffers, buffers, strict=True)))
        return packed


_bindings: list[Binding] = []
_numbers: dict[tuple[int, str], int] = {}
_lock = Lock()


def bind(kernel: Kernel, spec: PackedSpec) -> int:
    """Return the number of (kernel, spec) in this process; the same pair gets the same number."""
    key = (id(kernel), repr(spec))  # a bound kernel stays alive in _bindings, so its id is not given away again
    with _lock:  # layers are prepared in several threads
        if key not in _numbers:
            register()
            _bindings.append(Binding(kernel, spec))
            _numbers[key] = len(_bindings) - 1
    return _numbers[key]


def binding(number: int) -> Binding:
    """Return what ``bind`` gave the number to."""
    return _bindings[number]


@cache
def register() -> Any:
    """Define the operators, once a process; the library must stay alive as long as they are used."""
    library: Any = torch.library.Library(NAMESPACE, "DEF")  # type: ignore[no-untyped-call]
    tags = (torch.Tag.pt2_compliant_tag,)
    library.define("linear(Tensor x, Tensor[] buffers, int binding, Tensor? bias) -> Tensor", tags=tags)
    library.define("dequantize(Tensor[] buffers, int binding, ScalarType dtype) -> Tensor", tags=tags)
    library.define("rows(Tensor numbers, Tensor[] buffers, int binding, ScalarType dtype) -> Tensor", tags=tags)
    library.impl("rows", _rows, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::rows", _fake_rows, lib=library)
    library.impl("linear", _linear, "CompositeExplicitAutograd")
    library.impl("dequantize", _dequantize, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::linear", _fake_linear, lib=library)
    torch.library.register_fake(f"{NAMESPACE}::dequantize", _fake_dequantize, lib=library)
    torch.library.register_autograd(f"{NAMESPACE}::linear", _backward, setup_context=_keep, lib=library)
    return library


def _linear(x: Tensor, buffers: Sequence[Tensor], number: int, bias: Tensor | None) -> Tensor:
    bound = _bindings[number]
    return bound.kernel.matmul(x, bound.packed(buffers), bias)


def _dequantize(buffers: Sequence[Tensor], number: int, dtype: torch.dtype) -> Tensor:
    bound = _bindings[number]
    return bound.kernel.dequantize(bound.packed(buffers), dtype)


def _rows(numbers: Tensor, buffers: Sequence[Tensor], number: int, dtype: torch.dtype) -> Tensor:
    bound = _bindings[number]
    return bound.kernel.rows(bound.packed(buffers), numbers, dtype)


def _fake_rows(numbers: Tensor, buffers: Sequence[Tensor], number: int, dtype: torch.dtype) -> Tensor:
    return numbers.new_empty((numbers.shape[0], _bindings[number].spec.shape[1]), dtype=dtype)


def _fake_linear(x: Tensor, buffers: Sequence[Tensor], number: int, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], _bindings[number].spec.shape[0]))


def _fake_dequantize(buffers: Sequence[Tensor], number: int, dtype: torch.dtype) -> Tensor:
    return buffers[0].new_empty(_bindings[number].spec.shape, dtype=dtype)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep the packed buffers for the backward pass: the weight itself is decoded again there, and x is not needed."""
    _, buffers, number, _ = inputs
    ctx.save_for_backward(*buffers)
    ctx.number = number


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, list[None], None, Tensor | None]:
    """Return the gradients of x (gradient @ W) and of the bias (the sum over all rows); buffers have none."""
    buffers = list(ctx.saved_tensors)
    to_x = to_bias = None
    if ctx.needs_input_grad[0]:
        to_x = gradient @ torch.ops.lowbit.dequantize(buffers, ctx.number, gradient.dtype)
    if ctx.needs_input_grad[3]:
        to_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0)
    return to_x, [None] * len(buffers), None, to_bias
