"""Memory for large tensors: in huge pages where Linux has them, and used again while a conversion runs.

The first touch of a small page costs more than what is then done with it: reading a file from the page cache runs at 1.5 GB/s
into fresh pages of 4 KB, at 8 into fresh pages of 2 MB, and at 13 into a buffer that is used again (one core of an AMD EPYC
virtual machine, 2026-11-21). Most systems give huge pages only to those who ask.
"""

from __future__ import annotations

import math
import mmap
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TypeAlias

import numpy
import torch
from torch import Tensor

Block: TypeAlias = "numpy.ndarray[tuple[int], numpy.dtype[numpy.uint8]]"
HUGE = 1 << 21
"""Bytes of a huge page on x86-64, and on ARM with small pages of 4 KB."""
KEPT = 128 << 20
"""Most bytes that ``reused`` keeps for the next tensor of the same size."""

LEARNED = 24 << 20
"""Bytes to free once: glibc then keeps blocks below that, and up to twice as much at the end of its heap."""


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """Return what ``torch.empty`` returns; large tensors on a CPU start at a huge page, perhaps one that was used before."""
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < HUGE or torch.device(device).type != "cpu" or sys.platform != "linux":
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    size = -(-nbytes // HUGE) * HUGE
    block = _kept.take(size)
    if block is None:
        block = _mapped(size)
    owner = block[:nbytes]  # the tensor's storage holds it; when that goes, the block comes back
    weakref.finalize(owner, _kept.give, block).atexit = False
    return torch.from_numpy(owner).view(dtype).view(tuple(shape))


@contextmanager
def reused() -> Iterator[None]:
    """Keep the memory of tensors that are gone for those to come, until the block ends; so does malloc with smaller ones.

    glibc gives memory back to the system at the end of every piece of work until something larger was once freed (mallopt(3),
    M_MMAP_THRESHOLD), and a third of the time goes into touching it again.
    """
    torch.empty(LEARNED, dtype=torch.uint8)
    _kept.users += 1
    try:
        yield
    finally:
        _kept.users -= 1
        _kept.forget()


class _Kept:
    """Blocks that no tensor uses, the oldest first."""

    def __init__(self) -> None:
        self.users = 0
        self._blocks: list[Block] = []
        self._lock = threading.RLock()  # a collection in the middle of ``take`` may finalize an owner

    def take(self, size: int) -> Block | None:
        with self._lock:
            fitting = [at for at, block in enumerate(self._blocks) if size <= len(block) <= 2 * size]
            return self._blocks.pop(min(fitting, key=lambda at: len(self._blocks[at]))) if fitting else None

    def give(self, block: Block) -> None:
        with self._lock:
            if self.users and len(block) <= KEPT:
                self._blocks.append(block)
            while sum(map(len, self._blocks)) > KEPT:
                del self._blocks[0]

    def forget(self) -> None:
        with self._lock:
            if not self.users:
                self._blocks.clear()


_kept = _Kept()


def _mapped(size: int) -> Block:
    """Return ``size`` bytes in whole huge pages; pages that are never touched cost nothing."""
    memory = mmap.mmap(-1, size + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    block = numpy.frombuffer(memory, dtype=numpy.uint8)
    start = -block.ctypes.data % HUGE
    return block[start : start + size]
