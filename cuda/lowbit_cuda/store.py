"""The compiler as ``lowbit kernels`` sees it: architectures, building ahead of time, what is built, and clearing.

The entry point of group ``lowbit.compilers``; programs come from group ``lowbit.programs``.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from lowbit_cuda.arch import ARCHITECTURES, architecture
from lowbit_cuda.available import capability_reason
from lowbit_cuda.errors import CudaError
from lowbit_cuda.program import KernelProgram, _store, cache_folder
from lowbit_cuda.records import BuiltKernel, clear_records, read_records


def folder() -> Path:
    """Return where compiled kernels are kept."""
    return cache_folder()


def architectures() -> tuple[str, ...]:
    """Return the architectures of the GPUs at hand, each once; raise CudaError when one is too old."""
    import torch

    found = [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]
    for capability in found:
        if reason := capability_reason(capability):
            raise CudaError(reason)
    return tuple(dict.fromkeys(architecture(capability) for capability in found))


def check(arch: str) -> None:
    """Raise CudaError unless kernels can be compiled for ``arch``: one of ``ARCHITECTURES``, or a close relative."""
    digits = arch.removeprefix("sm_").rstrip("af")
    known = arch.startswith("sm_") and digits.isdigit() and len(digits) >= 2
    if not known or (int(digits[:-1]), int(digits[-1])) < (7, 5):
        raise CudaError(
            f"{arch!r} is no architecture that kernels are compiled for; choose from {', '.join(ARCHITECTURES)}"
        )


def build(program: KernelProgram, arch: str) -> BuiltKernel:
    """Compile ``program`` for ``arch``, or find it in the cache. Raises CudaError with the compiler's log."""
    before = {(record.kernel, record.arch): key for record, key in read_records(cache_folder())}
    started = time.perf_counter()
    code = program.compile(arch)
    seconds = time.perf_counter() - started
    after = {(record.kernel, record.arch): key for record, key in read_records(cache_folder())}
    name = (program.name, arch)
    return BuiltKernel(*name, len(code.code), 0.0 if before.get(name) == after.get(name) else seconds)


def built() -> Sequence[BuiltKernel]:
    """Return what is in the cache, by kernel and architecture."""
    if not cache_folder().exists():
        return []
    store = _store()
    found = [record for record, key in read_records(cache_folder()) if store.get(key) is not None]
    return sorted(found, key=lambda record: (record.kernel, record.arch))


def clear() -> int:
    """Remove every compiled kernel; return how many there were."""
    if not cache_folder().exists():
        return 0
    count = len(built())
    _store().clear()
    clear_records(cache_folder())
    return count
