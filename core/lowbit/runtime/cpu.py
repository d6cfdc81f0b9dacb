"""The CPU kernels that core itself brings, over whatever layouts are installed."""

from __future__ import annotations

from lowbit.registry import Registry
from lowbit.runtime.cpu_int4 import Int4Kernel
from lowbit.runtime.cpu_int8 import Int8Kernel
from lowbit.runtime.cpu_rows import RowsKernel


def register_cpu_kernels(registry: Registry) -> None:
    """Add them to a registry; they serve the layouts of its packers, those that come later too."""
    for kernel in (RowsKernel(registry.packers), Int4Kernel(registry.packers), Int8Kernel(registry.packers)):
        registry.kernels.register(kernel)
