"""Products of sign matrices with integers, by XOR and counting bits: no multiplication touches a weight.

An activation is a sum of signs too: x ~ step * (2**(n-1) t_{n-1} + ... + 2 t_1 + t_0) with t = +-1, which are the odd integers from
-(2**n - 1) to 2**n - 1 times a step for each group, and the product of two sign vectors of length L is L - 2 popcount(b xor t). So

    sum_i b_i x_i = step * sum_j 2**j (L - 2 c_j) = step * ((2**n - 1) L - 2 sum_j 2**j c_j),    c_j = popcount(b xor t_j)

in exact integers; the only error is that of rounding x, at most one step, the group's absmax over 2**n - 1, for each activation.
With n = 8 the activations are int8, with n = 16 two int8 halves.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

LANE = 64
Words = npt.NDArray[np.uint64]
Counts = npt.NDArray[np.int64]


def available() -> bool:
    """Whether numpy can count bits (2.0 and later)."""
    return hasattr(np, "bitwise_count")


def to_lanes(bits: Tensor, size: int) -> Tensor:
    """Arrange uint8 0/1 (rows, columns) in groups of ``size`` as int64 words (lanes, rows, groups); bits past the end are 0."""
    rows, columns = bits.shape
    groups = -(-columns // size)
    lanes = -(-size // LANE)
    whole = bits.new_zeros(rows, groups * size)
    whole[:, :columns] = bits
    padded = np.zeros((rows, groups, lanes * LANE), np.uint8)
    padded[..., :size] = whole.view(rows, groups, size).numpy()
    words = np.packbits(padded, axis=-1, bitorder="little").view(np.int64)
    return torch.from_numpy(np.ascontiguousarray(words.transpose(2, 0, 1)))


def from_lanes(words: Tensor, columns: int, size: int) -> Tensor:
    """Undo ``to_lanes``: uint8 0/1 (rows, columns)."""
    _, rows, groups = words.shape
    inner = np.ascontiguousarray(words.numpy().transpose(1, 2, 0)).view(np.uint8)
    bits = np.unpackbits(inner, axis=-1, bitorder="little")[..., :size].reshape(rows, groups * size)
    return torch.from_numpy(np.ascontiguousarray(bits[:, :columns]))


def split_activations(x: Tensor, size: int, planes: int) -> tuple[Tensor, Tensor]:
    """Write float32 x (columns,) as signs: int64 words (planes, lanes, groups), and float32 steps (groups,)."""
    groups = -(-len(x) // size)
    whole = torch.nn.functional.pad(x, (0, groups * size - len(x))).view(groups, size)
    top = 2**planes - 1
    steps = whole.abs().amax(1) / top
    units = whole.double() / steps.masked_fill(steps == 0, 1).double()[:, None]  # -top to top
    codes = ((units + top) * 0.5).round_().clamp_(0, top).long()  # the odd integer 2 * code - top
    codes[steps == 0] = 0
    # the columns that pad the last group are 0 in every weight word; they must be 0 here too, or XOR would count them
    inside = (torch.arange(groups * size) < len(x)).view(groups, size)
    codes.masked_fill_(~inside, 0)
    signs = [to_lanes((codes >> plane & 1).byte().view(1, -1), size)[:, 0] for plane in range(planes)]
    return torch.stack(signs), steps


def sign_product(words: Words, activations: Words, lengths: Counts) -> Counts:
    """Return ``sum_j 2**j (L - 2 popcount(b xor t_j))``: int64 (rows, groups).

    Args:
        words: Signs of the weight, (lanes, rows, groups).
        activations: Signs of x, (planes, lanes, groups).
        lengths: Columns L of each group, (groups,).
    """
    lanes, rows, groups = words.shape
    buffer, counts = np.empty_like(words), np.empty(words.shape, np.uint8)
    small = lanes * LANE < 256  # a group's count fits a byte
    count = np.empty((rows, groups), np.uint8 if small else np.uint32)
    narrow = int(lengths.max()) << len(activations) < 1 << 32
    total = np.zeros((rows, groups), np.uint32 if narrow else np.uint64)
    for plane in reversed(range(len(activations))):
        np.bitwise_xor(words, activations[plane][:, None, :], out=buffer)
        np.bitwise_count(buffer, out=counts)
        count[:] = counts[0]
        for lane in counts[1:]:  # four times faster than a sum over the first dimension
            np.add(count, lane, out=count)
        np.left_shift(total, 1, out=total)
        np.add(total, count, out=total)
    result: Counts = (2 ** len(activations) - 1) * lengths - 2 * total.astype(np.int64)
    return result
