"""``QuantLinear``: a linear layer that multiplies by a packed weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.errors import CheckpointError
from lowbit.interfaces import Kernel
from lowbit.plugins import installed
from lowbit.registry import Registry
from lowbit.runtime import ops
from lowbit.runtime.choice import Choice, choose, problem_for
from lowbit.runtime.parameter import PackedParameter
from lowbit.tensors import PackedSpec, PackedTensor

_PREPARED = "_prepared_"
_INTEGER_VIEWS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class QuantLinear(nn.Linear):
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
    ) -> None:
        nn.Module.__init__(self)  # not Linear's: it would make a dense weight
        self.spec, self.checkpoint, self.cache_dequantized, self.frugal = spec, checkpoint, cache_dequantized, frugal
        self.out_features, self.in_features = spec.shape
        self.compute_dtype = dtype or torch.get_default_dtype()
        self.choice: Choice | None = None
        self._registry, self._packed, self._binding, self._dense = registry, None, -1, None
        for (
            name,
            buffer,
        ) in spec.buffers.items():  # not register_buffer: a layout may call one "weight", as the property
            self._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
        empty = torch.empty(self.out_features, dtype=self.compute_dtype, device=device) if bias else None
        self.bias = None if empty is None else nn.Parameter(empty, requires_grad=False)  # type: ignore[assignment]
        self._is_hf_initialized = True  # transformers must not fill the weight with random numbers

    @classmethod
    def from_packed(cls, packed: PackedTensor, bias: Tensor | None = None, **options: Any) -> QuantLinear:
        """Return a layer that holds these buffers and this bias as they are, prepared; ``options`` as of the class."""
        layer = cls.holding(packed, bias, **options)
        layer.prepare()
        return layer

    @classmethod
    def holding(cls, packed: PackedTensor, bias: Tensor | None = None, **options: Any) -> QuantLinear:
        """Return what ``from_packed`` returns, but to be prepared when it first runs."""
        layer = cls(packed.spec, device="meta", **options)
        layer._buffers.update(packed.buffers)
        if bias is not None:
            layer.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias, requires_grad=False)
        return layer

    _packed: PackedTensor | None
    _dense: Tensor | None

    @property
    def kernel(self) -> Kernel | None:
        """The kernel that serves, once prepared."""
        return self.choice.kernel if self.choice else None

    @property
    def is_prepared(self) -> bool:
        """Whether the kernel has arranged the buffers."""
        return self._packed is not None

    @property
    def device(self) -> torch.device:
        """Where the buffers are."""
        return next(buffer.device for buffer in self._buffers.values() if buffer is not None)

    @property
    def packed(self) -> PackedTensor:
        """The packed weight, as a file stores it. Raises CheckpointError when ``release`` gave it up."""
        self._check_kept()
        return PackedTensor(self.spec, {name: self._buffers[name] for name in self.spec.buffers})  # type: ignore[misc]

    @property
    def weight(self) -> PackedParameter:  # type: ignore[override]  # reads as a weight: shape, dtype, device, F.linear
        """The weight (out, in) as a tensor that stays packed."""
        return PackedParameter(self.prepared(), self._kernel(), self.compute_dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the weight (out, in), computed in float32 and rounded once to ``dtype`` (the layer's, by default)."""
        return self._kernel().dequantize(self.prepared(), dtype or self.compute_dtype)

    def prepared(self) -> PackedTensor:
        """Return what the kernel reads, preparing it now if it is not."""
        if self._packed is None:
            self.prepare()
        assert self._packed is not None
        return self._packed

    def prepare(self) -> None:
        """Choose the kernel for the device and dtype of now, and let it rearrange the buffers; a no-op on meta."""
        if torch.compiler.is_compiling():
            raise CheckpointError("layers are prepared before torch.compile(fullgraph=True): load with prepare=True")
        self._forget()
        packed = self.packed
        device = next(iter(packed.buffers.values())).device
        if device.type == "meta":
            return
        choice = choose(problem_for(self.spec, self.compute_dtype, device), self._registry or installed())
        with torch.inference_mode(False), torch.no_grad():  # what is kept must serve a backward pass too
            prepared = choice.kernel.prepare(packed)
        for name, buffer in prepared.buffers.items():
            if self._buffers.get(name) is not buffer:
                self.register_buffer(_PREPARED + name, buffer, persistent=False)
        self.choice, self._packed = choice, prepared
        self._binding = ops.bind(choice.kernel, prepared.spec)
        if self.frugal:
            self.release()

    def release(self) -> None:
        """Give up the packed buffers where the kernel has its own arrangement: half the memory, but no ``state_dict``."""
        kept = self.prepared().buffers.values()
        for name in self.spec.buffers:
            if not any(buffer is self._buffers[name] for buffer in kept):
                self._buffers[name] = None

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

    def _operands(self) -> list[Tensor]:
        """Return the prepared buffers by way of the module's own, which compiled code knows to stay where they are."""
        buffers = self._buffers
        assert self._packed is not None
        return [buffers.get(_PREPARED + name, buffers.get(name)) for name in self._packed.spec.buffers]  # type: ignore[misc]

    def _kernel(self) -> Kernel:
        self.prepared()
        assert self.choice is not None
        return self.choice.kernel

    def _forget(self) -> None:
        """Drop everything that was derived from the packed buffers."""
        self._check_kept()
        self.choice = self._packed = self._dense = None
        for name in [name for name in self._buffers if name.startswith(_PREPARED)]:
            del self._buffers[name]
            self._non_persistent_buffers_set.discard(name)

    def _check_kept(self) -> None:
        if any(self._buffers[name] is None for name in self.spec.buffers):
            raise CheckpointError(
                f"a {self.spec.layout} weight kept only what its kernel reads, to save memory; "
                "load the model with keep_packed=True to save it, move it or change its dtype"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        """Move the packed buffers bit for bit, the bias as ever, and prepare again when device or dtype changed."""
        before = self.device
        probe = fn(torch.empty(0, dtype=self.compute_dtype, device=before))
        stays = probe.device == before and probe.dtype == self.compute_dtype
        if stays:
            return self
        self._forget()
        packed = {name: self._buffers.pop(name) for name in self.spec.buffers}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._buffers.update({name: _move(fn, buffer) for name, buffer in packed.items() if buffer is not None})
        if probe.dtype.is_floating_point:
            self.compute_dtype = probe.dtype
        self.prepare()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self._check_kept()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *arguments: Any) -> None:
        """Load as ever, checking dtypes too (``copy_`` would convert), and prepare again."""
        errors: list[str] = arguments[-1]
        self._forget()
        found = {name: state_dict.get(prefix + name) for name in self.spec.buffers}
        for name, buffer in found.items():
            spec = self.spec.buffers[name]
            if buffer is not None and buffer.dtype != spec.dtype:
                errors.append(f"{prefix}{name} must be {spec.dtype} for layout {self.spec.layout}, got {buffer.dtype}")
        if not errors:
            super()._load_from_state_dict(state_dict, prefix, *arguments)
        if not errors and all(buffer is not None for buffer in found.values()):
            self.prepare()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickle or copy; the kernel's number belongs to the process, so it is asked for again."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._forget()


def _move(fn: Callable[[Tensor], Tensor], buffer: Tensor) -> Tensor:
    """Apply a module-wide function (to a device, to a dtype, pin, share) to the bits of a buffer, as integers."""
    view = buffer.view(_INTEGER_VIEWS[buffer.dtype.itemsize])
    moved = fn(view)
    return (moved if moved.dtype == view.dtype else view.to(moved.device)).view(buffer.dtype)
