"""Layout ``binary-words``: sign planes in 32-bit words, the words of all planes for the same weights side by side.

    part                      buffer                                     shape, dtype
    planes (K, out, in)       planes                                     int32 (out, words, K)
    scales (K, out, G)        scales, the scales of a group adjacent     as they are, (out, G, K)
    left, right (products)    left, right                                int32 (out, words), (rank, words)
    everything else           the same name                              as it is

Every group begins with a word of its own; bit i of word j of a group is column 32 j + i of the group, 1 for +, and the bits past
its end are 0. One pass over an activation vector then serves all planes: with two planes an aligned 64-bit load holds the signs
of 32 weights in both, and their two float16 scales are one 32-bit load.

    K = 2, groups of 128:    row r   [ g0 w0 p0 | g0 w0 p1 | g0 w1 p0 | g0 w1 p1 | ... | g0 w3 p1 | g1 w0 p0 | ... ]

``plain`` stores the same bits a plane after the other, in bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from lowbit import PackedTensor, Packer, QuantizedTensor, Scheme, TensorSpec
from lowbit.bits import pack_bits, unpack_bits
from lowbit.errors import WeightError
from lowbit.parts import part_specs
from lowbit.scheme import Grid

WORD = 32


class WordsPacker(Packer):
    """Stores binary weights so that a kernel reads them in one pass."""

    layout = "binary-words"
    priority = 20

    def why_not(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """Refuse other grids, empty weights, and the add-ons that change which columns belong together."""
        if scheme.grid is not Grid.BINARY:
            return f"{self.layout} stores sign planes, not {scheme.summary()}; use the layout plain"
        if min(shape) < 1:
            return f"a weight needs rows and columns, got {shape[0]}x{shape[1]}; leave it unquantized"
        if scheme.permutation or scheme.rotation:
            return f"{self.layout} takes no permutation and no rotation, got {scheme.summary()}; use the layout plain"
        return None

    def specs(self, scheme: Scheme, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        """Return words in place of the bits, and scales with the planes last."""
        buffers = {}
        for name, spec in part_specs(scheme, shape).items():
            if name == "planes":
                words = _words(shape[1], scheme.group_size)
                buffers[name] = TensorSpec(torch.int32, (shape[0], words, spec.shape[0]))
            elif name in ("left", "right"):
                buffers[name] = TensorSpec(torch.int32, (spec.shape[0], _words(spec.shape[1], None)))
            elif name == "scales":
                buffers[name] = TensorSpec(spec.dtype, (*spec.shape[1:], spec.shape[0]))
            else:
                buffers[name] = spec
        return buffers

    def pack(self, quantized: QuantizedTensor) -> PackedTensor:
        """Pack; raises WeightError for a plane that holds other than 0 and 1."""
        spec = self.spec(quantized.scheme, quantized.shape)
        buffers = {}
        for name, part in quantized.parts.items():
            if name == "planes":
                part = to_words(part, quantized.scheme.group_size).permute(1, 2, 0)
            elif name in ("left", "right"):
                part = to_words(part, None)
            elif name == "scales":
                part = part.permute(1, 2, 0)
            buffers[name] = part.contiguous()
        return PackedTensor(spec, buffers)

    def unpack(self, packed: PackedTensor) -> QuantizedTensor:
        """Undo ``pack``."""
        parts = {}
        for name, spec in part_specs(packed.scheme, packed.shape).items():
            part = packed.buffers[name]
            if name == "planes":
                part = from_words(part.permute(2, 0, 1), spec.shape[-1], packed.scheme.group_size)
            elif name in ("left", "right"):
                part = from_words(part, spec.shape[-1], None)
            elif name == "scales":
                part = part.permute(2, 0, 1).contiguous()
            parts[name] = part
        return QuantizedTensor(packed.scheme, packed.shape, parts)


def to_words(bits: Tensor, group_size: int | None) -> Tensor:
    """Pack uint8 0/1 (..., columns) into int32 (..., words), every group from a word of its own. Raises WeightError."""
    if int(bits.amax()) > 1:
        raise WeightError(f"a sign plane holds {int(bits.amax())}, not 0 or 1; the quantizer that made it is broken")
    columns = bits.shape[-1]
    size = min(group_size or columns, columns)
    if size % WORD:
        groups = pad(bits, (0, -columns % size)).reshape(*bits.shape[:-1], -1, size)
        bits = pad(groups, (0, -size % WORD)).flatten(-2)
    else:
        bits = pad(bits, (0, -columns % WORD))
    words = pack_bits(bits.reshape(-1, bits.shape[-1]), 1).view(torch.int32)
    return words.view(*bits.shape[:-1], -1)[..., : _words(columns, group_size)]


def from_words(words: Tensor, columns: int, group_size: int | None) -> Tensor:
    """Undo ``to_words``."""
    size = min(group_size or columns, columns)
    padded = -(-size // WORD) * WORD
    groups = -(-columns // size)
    words = pad(words, (0, groups * padded // WORD - words.shape[-1])).contiguous()
    bits = unpack_bits(words.view(-1, words.shape[-1]).view(torch.uint8), 1, groups * padded)
    bits = bits.view(*words.shape[:-1], groups, padded)[..., :size].flatten(-2)
    return bits[..., :columns].contiguous()


def _words(columns: int, group_size: int | None) -> int:
    size = min(group_size or columns, columns)
    whole, rest = divmod(columns, size)
    return whole * -(-size // WORD) + -(-rest // WORD)
