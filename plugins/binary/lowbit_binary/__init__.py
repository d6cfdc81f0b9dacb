"""Binary weights for lowbit: sums and products of sign planes, a layout of bit planes, and products that count bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lowbit import Kernel, Packer, Quantizer, hookimpl


@hookimpl
def lowbit_register_quantizers(register: Callable[[Quantizer[Any]], None]) -> None:
    """Register the quantizer ``binary``."""
    from lowbit_binary.quantizer import BinaryQuantizer

    register(BinaryQuantizer())


@hookimpl
def lowbit_register_packers(register: Callable[[Packer], None]) -> None:
    """Register the layout ``binary-words``."""
    from lowbit_binary.packer import WordsPacker

    register(WordsPacker())


@hookimpl
def lowbit_register_kernels(register: Callable[[Kernel], None]) -> None:
    """Register the plain-torch kernel of the layout and those that count bits."""
    from lowbit import ReferenceKernel
    from lowbit_binary.cuda import CudaPopcountKernel
    from lowbit_binary.kernel import PopcountKernel
    from lowbit_binary.packer import WordsPacker

    register(ReferenceKernel(WordsPacker()))
    register(PopcountKernel())
    register(CudaPopcountKernel())
