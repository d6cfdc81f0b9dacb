"""``QuantLinear``: a linear layer that multiplies by a packed weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.interfaces import MatmulProblem
from lowbit.registry import Registry
from lowbit.runtime.choice import Choice, choose
from lowbit.runtime.packed_module import PackedModule
from lowbit.tensors import PackedSpec, PackedTensor


class QuantLinear(PackedModule, nn.Linear):  # type: ignore[misc]  # its weight is a property
    """Computes ``x @ W.T + bias`` for x (..., in_features) of any float dtype; W stays packed, and gets no gradient.

    The buffers are those of the layout, under its names (``qweight``, ``scales``, ...); they are what ``state_dict`` holds and
    loads, bit for bit. What the kernel makes of them (``Kernel.prepare``) is kept beside them and made again after loading or
    moving. Changing the dtype of the layer changes its bias and the kernel, never a packed buffer, float scales included.

    A subclass of ``nn.Linear``, so that tools that look for linears find it (PEFT adapters among them): ``weight`` is a
    ``PackedParameter``, which refuses, in a sentence, whatever would change it.

    Args:
        spec: Layout, scheme, shape and buffers; with ``device="meta"`` no memory is used.
        bias: Whether to add a bias.
        dtype: Dtype of the activations, for which the kernel is chosen; x of another dtype is multiplied by a dequantized W.
        device: Where the buffers are.
        registry: Where the kernel comes from; by default everything installed.
        checkpoint: Decode W again in the backward pass (True), or keep it in ``dtype`` from the forward pass (False: faster,
            and as large as the dense weight).
        cache_dequantized: Keep W in ``dtype`` after the first use, and multiply by it when x has more than one row.
        frugal: Release the packed buffers (``release``) as soon as the layer is prepared.
        buffers: The buffers to hold; without them there are new ones, to be loaded into.

    Raises:
        NoRouteError: When no installed kernel serves; raised as soon as the buffers hold data.
    """

    def __init__(
        self,
        spec: PackedSpec,
        bias: bool = False,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        registry: Registry | None = None,
        checkpoint: bool = True,
        cache_dequantized: bool = False,
        frugal: bool = False,
        buffers: Mapping[str, Tensor] | None = None,
    ) -> None:
        nn.Module.__init__(self)  # not Linear's: it would make a dense weight
        self.hold(spec, dtype, device, registry, frugal, buffers)
        vars(self).update(checkpoint=checkpoint, cache_dequantized=cache_dequantized, tied="", _dense=None)
        vars(self).update(out_features=spec.shape[0], in_features=spec.shape[1])
        empty = torch.empty(self.out_features, dtype=self.compute_dtype, device=device) if bias else None
        self.bias = None if empty is None else nn.Parameter(empty, requires_grad=False)  # type: ignore[assignment]

    @classmethod
    def from_packed(cls, packed: PackedTensor, bias: Tensor | None = None, **options: Any) -> QuantLinear:
        """Return a layer that holds these buffers and this bias as they are, prepared; ``options`` as of the class."""
        layer = cls.holding(packed, bias, **options)
        layer.prepare()
        return layer

    @classmethod
    def holding(cls, packed: PackedTensor, bias: Tensor | None = None, **options: Any) -> QuantLinear:
        """Return what ``from_packed`` returns, but to be prepared when it first runs."""
        layer = cls(packed.spec, buffers=packed.buffers, **options)
        if bias is not None:
            layer.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias, requires_grad=False)
        return layer

    checkpoint: bool
    cache_dequantized: bool
    _dense: Tensor | None
    tied: str
    """The path of the embedding whose weight this is, in a model that ties its head; empty elsewhere."""

    def choose(self, problem: MatmulProblem, registry: Registry) -> Choice:
        """Return the fastest kernel."""
        return choose(problem, registry)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x @ W.T + bias`` in x's dtype (autocast's, inside autocast), shape (..., out_features)."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if self._packed is None:
            self.prepare()
        bias = self.bias if self.bias is None or self.bias.dtype == x.dtype else self.bias.to(x.dtype)
        differentiated = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
        if x.dtype != self.compute_dtype or self._wants_dense(x, differentiated):
            return nn.functional.linear(x, self._dense_weight(x.dtype), bias)
        if differentiated or torch.compiler.is_compiling():
            return torch.ops.lowbit.linear(x, self._operands(), self._binding, bias)  # type: ignore[no-any-return]
        assert self.choice is not None
        assert self._packed is not None
        return self.choice.kernel.matmul(x, self._packed, bias)  # without the operator's dispatch: 20 us less a call

    def extra_repr(self) -> str:
        """Show shape, scheme, layout and kernel."""
        kernel = self.choice.kernel.name if self.choice else "not prepared"
        shape = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{shape}, scheme={self.spec.scheme.summary()}, layout={self.spec.layout}, kernel={kernel}"

    def _wants_dense(self, x: Tensor, differentiated: bool) -> bool:
        if differentiated and not self.checkpoint:
            return True
        return self.cache_dequantized and x.numel() != self.in_features

    def _dense_weight(self, dtype: torch.dtype) -> Tensor:
        if self._dense is not None and self._dense.dtype == dtype:
            return self._dense
        if torch.compiler.is_compiling() or not self.cache_dequantized or dtype != self.compute_dtype:
            return torch.ops.lowbit.dequantize(self._operands(), self._binding, dtype)  # type: ignore[no-any-return]
        with torch.inference_mode(False), torch.no_grad():  # it must serve a backward pass too
            self._dense = self.dequantize(dtype)
        return self._dense

    def _forget(self) -> None:
        super()._forget()
        self._dense = None
