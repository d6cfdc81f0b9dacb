"""The two passes over a weight that a tuning step makes, each in one CUDA kernel: a tenth of torch's memory traffic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from lowbit_autoround.ranges import Steps
from lowbit_cuda.available import why_not_cuda
from lowbit_cuda.loaded import load
from lowbit_cuda.program import KernelProgram

SOURCE = Path(__file__).parent / "cuda" / "tune.cu"
TYPES: Mapping[torch.dtype, str] = MappingProxyType(
    {torch.float32: "float", torch.float16: "__half", torch.bfloat16: "__nv_bfloat16"}
)
THREADS = 256
BLOCKS_PER_PROCESSOR = 32
MOST_WEIGHTS = 1 << 32


def serves(groups: Tensor, columns: int) -> bool:
    """Whether the kernels take groups (rows, groups, size) of a weight with ``columns`` columns: on a GPU, all whole, in fours."""
    if groups.device.type != "cuda" or groups.shape[1] * groups.shape[2] != columns or groups.shape[2] % 4:
        return False
    return groups.numel() < MOST_WEIGHTS and why_not_cuda(groups.device.index or 0) is None


def decode(groups: Tensor, values: Tensor, steps: Steps, out: Tensor) -> None:
    """Write the decoded weight to ``out`` (out, in), contiguous."""
    size = groups.shape[2]
    kernel = load(decode_program(out.dtype), _index(groups))
    fours = groups.numel() // 4
    kernel(
        min(-(-fours // THREADS), kernel.processors * BLOCKS_PER_PROCESSOR),
        THREADS,
        groups,
        values,
        *_parameters(steps),
        out,
        np.uint32(fours),
        np.uint32(size // 4),
    )


def learn(
    groups: Tensor, values: Tensor, steps: Steps, gradient: Tensor, lr: float, largest: float
) -> tuple[Tensor, Tensor]:
    """Move ``values`` by ``lr``, within ``largest``; return the sums A and B of ``lowbit_autoround.ranges`` (rows, groups)."""
    rows, count, size = groups.shape
    lanes = _lanes(size)
    by_scale, by_offset = (torch.empty(rows, count, device=groups.device) for _ in range(2))
    gradient = gradient.contiguous()
    kernel = load(learn_program(gradient.dtype, lanes), _index(groups))
    kernel(
        min(-(-rows * count * lanes // THREADS), kernel.processors * BLOCKS_PER_PROCESSOR),
        THREADS,
        groups,
        values,
        *_parameters(steps),
        gradient,
        np.float32(lr),
        np.float32(largest),
        by_scale,
        by_offset,
        np.uint32(rows * count),
        np.uint32(size // 4),
    )
    return by_scale, by_offset


def decode_program(dtype: torch.dtype) -> KernelProgram:
    """Return the kernel that writes weights of ``dtype``."""
    return KernelProgram(SOURCE, "lowbit_decode", {"LOWBIT_TYPE": TYPES[dtype], "LOWBIT_LANES": 32})


def learn_program(dtype: torch.dtype, lanes: int) -> KernelProgram:
    """Return the kernel that reads gradients of ``dtype``, with so many threads for a group."""
    return KernelProgram(SOURCE, "lowbit_learn", {"LOWBIT_TYPE": TYPES[dtype], "LOWBIT_LANES": lanes})


def programs(arch: str) -> Sequence[KernelProgram]:
    """Return an instance of every kernel for each thing that changes its code; ``lowbit kernels`` builds them for ``arch``."""
    decoders = [decode_program(dtype) for dtype in TYPES]
    return (*decoders, *(learn_program(dtype, 32) for dtype in TYPES), learn_program(torch.bfloat16, 8))


def _lanes(size: int) -> int:
    return int(min(32, 1 << (size // 4 - 1).bit_length()))


def _parameters(steps: Steps) -> tuple[Tensor | np.generic | None, ...]:
    zeros = steps.zero if isinstance(steps.zero, Tensor) else None
    constant = 0.0 if isinstance(steps.zero, Tensor) else steps.zero
    tensors = (None if tensor is None else tensor.float().contiguous() for tensor in (steps.scale, steps.offset, zeros))
    return (*tensors, np.float32(constant), np.float32(steps.last))


def _index(tensor: Tensor) -> int:
    return tensor.device.index or 0
