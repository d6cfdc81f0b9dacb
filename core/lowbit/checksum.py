"""A checksum of what is written, at the speed of memory: it finds damage, and is no signature.

A buffer is read as rows of ``LANES`` 32-bit words. Each lane keeps ``state = word + FACTOR * state`` modulo 2**32 down its column,
and a SHA-256 covers the lanes and the rest that fills no row. FACTOR is odd, so that one changed word in a lane changes
the lane whatever follows: any damage of up to LANES words in a row is found for certain. FACTOR is 5 modulo 8, so that two
words of a lane that change places go unnoticed only if they differ by a multiple of 2**30 over the power of two in their
distance, and a page has a thousand words. SHA-256 over every byte runs at 1.6 GB/s on a core that has instructions for it; this
runs at 15, without its loop in C at 6 to 10 (2026-11-21).
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from lowbit.compiled import CLoops
from lowbit.tensors import PackedTensor, raw_bytes

LANES = 1 << 14
"""Words in a row: 64 KB, half of what a core's first cache and its neighbour hold."""
FACTOR = 0x2C1B3C6D
_LOOPS = CLoops(Path(__file__).with_name("checksum.c"))


def checksum(value: Tensor | PackedTensor) -> bytes:
    """Return 32 bytes for a tensor's bytes, or for a packed tensor's buffers in the order of their names."""
    buffers = dict(sorted(value.buffers.items())) if isinstance(value, PackedTensor) else {"": value}
    total = hashlib.sha256()
    for name, buffer in buffers.items():
        total.update(f"{name}\0{buffer.nbytes}\0".encode())
        _add(total, raw_bytes(buffer.detach().cpu()))
    return total.digest()


def _add(total: hashlib._Hash, raw: Tensor) -> None:
    """Add the bytes of one buffer, uint8 (nbytes,)."""
    whole = len(raw) // (4 * LANES) * 4 * LANES
    if whole:
        words = raw[:whole] if raw.data_ptr() % 4 == 0 == raw.storage_offset() % 4 else raw[:whole].clone()
        state = torch.zeros(LANES, dtype=torch.int32)
        rows = words.view(torch.int32).view(-1, LANES)
        if (fold := _LOOPS.find("fold_rows")) is not None:
            fold(rows, state, len(rows), LANES, FACTOR)
        else:
            for row in rows.unbind():
                torch.add(row, state, alpha=FACTOR, out=state)
        total.update(state.numpy().data)
    total.update(raw[whole:].numpy().data)
