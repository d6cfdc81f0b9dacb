"""Activations between blocks, for all samples: on the device where blocks run, in memory, or in files that the system may evict."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lowbit.tensors import raw_bytes

HELD_SHARE = 0.125
"""A chain is kept on a GPU when it takes at most this share of its free memory: a block reads and writes its chains several times,
and copying them between host and device takes longer than running it."""


class Chain:
    """What all samples look like between two blocks, ``(samples, seqlen, hidden)``.

    Args:
        states: The activations, on the CPU or where blocks run.
        file: Where they are mapped from, when they are not in memory.
    """

    def __init__(self, states: Tensor, file: Path | None = None) -> None:
        self.states, self.file = states, file

    @classmethod
    def make(
        cls,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        file: Path | None = None,
        device: torch.device | None = None,
    ) -> Chain:
        """Return a chain of undefined activations: mapped from a new ``file`` when one is given, on ``device`` if it has the room."""
        if file is None:
            return cls(torch.empty(shape, dtype=dtype, device=_place(shape, dtype, device)))
        with file.open("xb") as made:
            made.truncate(shape[0] * shape[1] * shape[2] * dtype.itemsize)
        return cls.map(file, shape, dtype)

    @classmethod
    def map(cls, file: Path, shape: tuple[int, int, int], dtype: torch.dtype) -> Chain:
        """Return a chain whose activations are the bytes of ``file``; writing to it writes there."""
        count = shape[0] * shape[1] * shape[2]
        return cls(torch.from_file(str(file), shared=True, size=count, dtype=dtype).view(shape), file)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(samples, seqlen, hidden)."""
        samples, seqlen, hidden = self.states.shape
        return samples, seqlen, hidden

    def gather(self, index: Sequence[int], device: torch.device) -> Tensor:
        """Return the activations of some samples on ``device``, as a copy."""
        return torch.stack([self.states[sample] for sample in index]).to(device)

    def copy(self, file: Path | None = None, device: torch.device | None = None) -> Chain:
        """Return a chain of the same activations; the arguments are those of ``make``."""
        twin = Chain.make(self.shape, self.states.dtype, file, device)
        twin.states.copy_(self.states)
        return twin

    def save(self, file: Path) -> None:
        """Write the activations to ``file`` (unless they are mapped from it) and wait for the disk."""
        if self.file is None:
            with file.open("wb") as made:
                made.write(raw_bytes(self.states.cpu()).numpy().data)
        with file.open("rb") as made:
            os.fsync(made.fileno())

    def advance(
        self, run: Callable[[Tensor, range], Tensor], batch_size: int, device: torch.device, file: Path | None = None
    ) -> Chain:
        """Return the chain behind a block that ``run(hidden, samples)`` computes; in place, unless a new ``file`` is given.

        A file that is committed must stay as it is until its successor is.
        """
        after = self if file is None else Chain.make(self.shape, self.states.dtype, file)
        samples = len(self.states)
        for start in range(0, samples, batch_size):
            batch = range(start, min(start + batch_size, samples))
            after.states[start : batch.stop] = run(self.states[start : batch.stop].to(device), batch)
        return after


def _place(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device | None) -> torch.device:
    """Return where a chain is kept: a GPU that has the room, or the host."""
    if device is None or device.type != "cuda":
        return torch.device("cpu")
    nbytes = shape[0] * shape[1] * shape[2] * dtype.itemsize
    return device if nbytes <= HELD_SHARE * torch.cuda.mem_get_info(device)[0] else torch.device("cpu")
