"""Tensors that are read when they are wanted: what transformers gets in place of a state dict."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lowbit.interfaces import Checkpoint
from lowbit.parts import TensorSpec
from lowbit.registry import Registry
from lowbit.tensors import PackedSpec, PackedTensor
from lowbit.workers import map_ranges


class LazyTensor:
    """Has a shape and a dtype; ``lazy[...]`` reads the data. The interface of a safetensors slice, as transformers uses it."""

    def __init__(self, spec: TensorSpec, read: Callable[[], Tensor]) -> None:
        self.shape, self.dtype, self._read = torch.Size(spec.shape), spec.dtype, read

    def is_floating_point(self) -> bool:
        """Whether the dtype is a float."""
        return self.dtype.is_floating_point

    def __getitem__(self, index: Any) -> Tensor:
        return self._read()[index]


def lazy_tensor(checkpoint: Checkpoint, name: str, registry: Registry, dtype: torch.dtype) -> LazyTensor:
    """Return a tensor of a checkpoint, to be read later; a packed one will be dequantized to ``dtype``."""
    entry = checkpoint.entries[name]
    if isinstance(entry, PackedSpec):
        return LazyTensor(TensorSpec(dtype, entry.shape), lambda: _floats(checkpoint.read(name), registry, dtype))
    return LazyTensor(entry, lambda: _plain(checkpoint.map(name)))


def _plain(value: Tensor | PackedTensor) -> Tensor:
    assert isinstance(value, Tensor)
    return value


def _floats(value: Tensor | PackedTensor, registry: Registry, dtype: torch.dtype) -> Tensor:
    """Dequantize in float32 and round once, in row pieces where that is possible: no float32 copy of a large embedding."""
    from lowbit.grids import dequantize

    assert isinstance(value, PackedTensor)
    quantized = registry.packers[value.layout].unpack(value)
    if not quantized.row_separable:
        return dequantize(quantized).to(dtype)
    weight = torch.empty(quantized.shape, dtype=dtype)

    def fill(start: int, stop: int) -> None:
        weight[start:stop] = dequantize(quantized.rows(start, stop))

    map_ranges(fill, *quantized.shape)
    return weight
