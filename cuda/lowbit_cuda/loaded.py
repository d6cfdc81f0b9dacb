"""``load``: a program on a device, compiled and loaded once and launched with tensors; faults become sentences.

Load before capturing a CUDA graph; a launch allocates nothing and captures.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowbit_cuda.available import why_not_cuda
from lowbit_cuda.errors import CudaError, CudaUnavailableError
from lowbit_cuda.launch import Launcher
from lowbit_cuda.program import KernelProgram

Argument = Tensor | np.generic | None
"""A tensor or None is a pointer; numbers are numpy scalars of the kernel's own types."""


class LoadedKernel:
    """A kernel on one device, whichever device is current when it is called."""

    def __init__(self, program: KernelProgram, index: int) -> None:
        if reason := why_not_cuda(index):
            raise CudaUnavailableError(reason)
        self.name, self.index = program.name, index
        self.processors: int = torch.cuda.get_device_properties(index).multi_processor_count
        with torch.cuda.device(index):
            try:
                self._launcher = Launcher(program)
            except CudaError:
                raise
            except Exception as error:  # cuda.core raises its own type, with the driver's name of the fault in the text
                raise explain(error, self.name) from error

    def __call__(self, blocks: int | tuple[int, ...], threads: int, *arguments: Argument) -> None:
        """Launch on torch's current stream. Raises CudaError for a tensor elsewhere, or with what the driver says."""
        values = [self._value(argument) for argument in arguments]
        with torch.cuda.device(self.index):
            try:
                self._launcher.launch(self._launcher.config(blocks, threads), values)
            except Exception as error:  # as above
                raise explain(error, self.name) from error

    def _value(self, argument: Argument) -> Any:
        if not isinstance(argument, Tensor):
            return 0 if argument is None else argument
        if argument.device != torch.device("cuda", self.index):
            raise CudaError(f"{self.name} runs on cuda:{self.index}, got a tensor on {argument.device}; move it there")
        return argument.data_ptr()


def load(program: KernelProgram, index: int) -> LoadedKernel:
    """Return a program's kernel on CUDA device ``index``, loaded once. Raises CudaError with the reason when it cannot be."""
    return _load(program.source, program.entry, tuple(sorted(program.defines.items())), program.include, index)


@lru_cache(maxsize=1024)
def _load(
    source: Path, entry: str, defines: tuple[tuple[str, str | int], ...], include: tuple[Path, ...], index: int
) -> LoadedKernel:
    return LoadedKernel(KernelProgram(source, entry, dict(defines), include), index)


def explain(error: Exception, what: str) -> CudaError:
    """Return a fault of the driver as one sentence: what happened to ``what``, and the way out where there is one."""
    text = " ".join(str(error).split())
    for sign, sentence in _FAULTS.items():
        if sign in text:
            return CudaError(f"{what}: {sentence}")
    return CudaError(f"{what}: {text}")


_FAULTS = {
    "OUT_OF_MEMORY": "the GPU is out of memory; free some, or use a smaller batch or a device with more",
    "NO_BINARY_FOR_GPU": "the compiled kernel is not for this GPU; run lowbit kernels clear, and try again",
    "INVALID_IMAGE": "the driver does not accept the compiled kernel; update it, or run lowbit kernels clear",
    "UNSUPPORTED_PTX_VERSION": "the driver is older than the compiler; update the driver, or install an older NVRTC",
    "ILLEGAL_ADDRESS": "an earlier kernel left its buffers; this process cannot use the GPU any more, start it again",
}


def check_buffer(name: str, tensor: Tensor, alignment: int = 16) -> None:
    """Raise CudaError unless a kernel can address ``tensor`` as it is: on a GPU, contiguous, and aligned."""
    if tensor.device.type != "cuda":
        raise CudaError(f"{name} is on {tensor.device}, and the CUDA kernels read GPU memory; move it with .cuda()")
    if not tensor.is_contiguous():
        raise CudaError(
            f"{name} has strides {tuple(tensor.stride())}, and the kernel needs it contiguous; call .contiguous()"
        )
    if tensor.data_ptr() % alignment:
        raise CudaError(f"{name} starts at an address that is no multiple of {alignment}; pass a .clone() of it")
