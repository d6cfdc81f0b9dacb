"""``PackedModule``: what layers with a packed weight share, whatever they compute with it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.errors import CheckpointError
from lowbit.interfaces import Kernel, MatmulProblem
from lowbit.plugins import installed
from lowbit.registry import Registry
from lowbit.runtime import ops
from lowbit.runtime.choice import Choice, problem_for
from lowbit.runtime.parameter import PackedParameter
from lowbit.tensors import PackedSpec, PackedTensor, as_integers

_PREPARED = "_prepared_"


class PackedModule(nn.Module):
    """Keeps a packed weight in buffers with the names of its layout, and beside them what a kernel makes of them.

    Subclasses say how a kernel is chosen (``choose``) and compute. The buffers are what ``state_dict`` holds and loads, bit for
    bit; what the kernel makes of them (``Kernel.prepare``) is made again after loading or moving. Changing the dtype changes
    activations and the kernel, never a packed buffer, float scales included.
    """

    spec: PackedSpec
    compute_dtype: torch.dtype
    frugal: bool
    choice: Choice | None
    _packed: PackedTensor | None
    _registry: Registry | None
    _binding: int

    @abstractmethod
    def choose(self, problem: MatmulProblem, registry: Registry) -> Choice:
        """Return the kernel that serves; raise NoRouteError when none does."""

    def hold(
        self,
        spec: PackedSpec,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
        registry: Registry | None,
        frugal: bool,
        buffers: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Set up, to be called by constructors after that of ``nn.Module``; without ``buffers`` they have no values."""
        vars(self).update(  # nn.Module looks closely at what is assigned one by one: 10 us each
            spec=spec,
            frugal=frugal,
            compute_dtype=dtype or torch.get_default_dtype(),
            choice=None,
            _registry=registry,
            _packed=None,
            _binding=-1,
            _is_hf_initialized=True,  # transformers must not fill the weight with random numbers
        )
        if buffers is None:
            buffers = {name: torch.empty(of.shape, dtype=of.dtype, device=device) for name, of in spec.buffers.items()}
        self._buffers.update(buffers)  # not register_buffer: a layout may call one "weight", as the property

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
    def weight(self) -> PackedParameter:  # reads as a weight: shape, dtype, device, F.linear
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
        choice = self.choose(problem_for(self.spec, self.compute_dtype, device), self._registry or installed())
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
        self.choice = self._packed = None
        for name in [name for name in self._buffers if name.startswith(_PREPARED)]:
            del self._buffers[name]
            self._non_persistent_buffers_set.discard(name)

    def _check_kept(self) -> None:
        if any(self._buffers[name] is None for name in self.spec.buffers):
            raise CheckpointError(
                f"a {self.spec.layout} weight kept only what its kernel reads, to save memory; "
                "load the model with keep_packed=True to save it, move it or change its dtype"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedModule:
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
    view = as_integers(buffer)
    moved = fn(view)
    return (moved if moved.dtype == view.dtype else view.to(moved.device)).view(buffer.dtype)
