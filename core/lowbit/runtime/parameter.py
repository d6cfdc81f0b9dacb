"""``PackedParameter``: a packed weight that looks like the tensor it stands for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.errors import LowbitError
from lowbit.interfaces import Kernel
from lowbit.runtime import ops
from lowbit.tensors import PackedTensor


class PackedParameterError(LowbitError):
    """Something would have read or changed a packed weight number by number."""


class PackedParameter(nn.Parameter):
    """Has the shape (out, in), the dtype and the device of a weight, and holds only the packed bits.

    ``F.linear(x, parameter, bias)`` runs the kernel and is differentiable in x; ``parameter.dequantize()`` returns floats.
    Everything that would read or change single weights raises PackedParameterError. So a plain ``nn.Linear`` can run packed:
    ``linear.weight = PackedParameter(kernel.prepare(packed), kernel, torch.bfloat16)``.

    Args:
        packed: What ``kernel.prepare`` returned.
        kernel: Who multiplies.
        dtype: The dtype that the weight pretends to have: that of the activations.
    """

    packed: PackedTensor
    kernel: Kernel

    def __new__(cls, packed: PackedTensor, kernel: Kernel, dtype: torch.dtype = torch.float32) -> PackedParameter:  # noqa: D102, PYI034
        device = next(iter(packed.buffers.values())).device
        made: PackedParameter = Tensor._make_wrapper_subclass(cls, packed.shape, dtype=dtype, device=device)
        made.packed, made.kernel = packed, kernel
        return made

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the weight (out, in), computed in float32 and rounded once to ``dtype``."""
        return self.kernel.dequantize(self.packed, dtype or self.dtype)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        shape = "x".join(map(str, self.packed.shape))
        return f"PackedParameter({shape}, {self.packed.scheme.summary()}, {self.packed.layout}, {self.kernel.name})"

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedParameter:
        return self  # nothing can change it

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Serve ``F.linear`` and questions about shape, dtype and device; refuse the rest."""
        if func is nn.functional.linear:
            return _linear(*args, **(kwargs or {}))
        if func in (Tensor.detach, Tensor.requires_grad_):
            return args[0]
        name = _name(func)
        if name not in _READABLE:
            raise _refusal(name)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise _refusal(str(func))  # what comes here did not go through Python, and would compute with the weight


_READABLE = frozenset(
    (
        *("shape", "dtype", "device", "layout", "ndim", "size", "dim", "numel", "nelement", "element_size", "names"),
        *("requires_grad", "grad", "grad_fn", "is_leaf", "is_floating_point", "is_complex", "is_sparse", "is_nested"),
        *("is_cpu", "is_cuda", "is_meta", "is_mps", "is_xpu", "is_quantized", "__len__", "__hash__"),
    )
)


def _refusal(name: str) -> PackedParameterError:
    return PackedParameterError(
        f"a packed weight has no {name!r}: its codes cannot be read or changed one by one; "
        "call dequantize() for floats, or convert the model to format 'hf' to change weights"
    )


def _name(func: Callable[..., Any]) -> str:
    """Return the name of a method, or of the property whose getter ``func`` is; setters keep ``__set__`` in theirs."""
    owner = getattr(func, "__self__", None)
    if func.__name__ == "__get__":
        return str(getattr(owner, "__name__", "?"))
    return f"{getattr(owner, '__name__', '?')}.__set__" if func.__name__ == "__set__" else func.__name__


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not isinstance(weight, PackedParameter):
        raise PackedParameterError("a packed weight multiplies from the right only: F.linear(x, weight, bias)")
    if x.dtype != weight.dtype:
        return nn.functional.linear(x, weight.dequantize(x.dtype), bias)
    number = ops.bind(weight.kernel, weight.packed.spec)
    return torch.ops.lowbit.linear(x, list(weight.packed.buffers.values()), number, bias)  # type: ignore[no-any-return]
