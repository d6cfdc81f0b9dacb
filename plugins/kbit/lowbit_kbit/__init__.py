"""Blockwise k-bit quantization for lowbit: 2 to 8 bits, four kinds of codebook, three ways to choose the scale."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lowbit import Kernel, Packer, Quantizer, hookimpl


@hookimpl
def lowbit_register_quantizers(register: Callable[[Quantizer[Any]], None]) -> None:
    """Register the quantizer ``kbit``."""
    from lowbit_kbit.quantizer import KbitQuantizer

    register(KbitQuantizer())


@hookimpl
def lowbit_register_packers(register: Callable[[Packer], None]) -> None:
    """Register the layouts ``kbit-words`` and ``kbit-dense``."""
    from lowbit_kbit.packers import PACKERS

    for packer in PACKERS:
        register(packer)


@hookimpl
def lowbit_register_kernels(register: Callable[[Kernel], None]) -> None:
    """Register their plain-torch kernels and, for NVIDIA GPUs, their CUDA kernels."""
    from lowbit.kernels import ReferenceKernel
    from lowbit_kbit.kernels import StreamKernel
    from lowbit_kbit.packers import PACKERS

    for packer in PACKERS:
        register(ReferenceKernel(packer))
        register(StreamKernel(packer))
