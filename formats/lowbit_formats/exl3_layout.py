"""Layout ``exl3``: trellis-coded 16x16 tiles between two Hadamard rotations, as exllamav3 stores them.

    buffer     dtype, shape                   holds (K = bits a weight, 1 to 8, or 1.5 to 7.5 with the code mul1)
    trellis    int16 (in / 16, out / 16, 16K) the stream of each tile, MSB first in 32-bit words, each two 16-bit words
    suh        float16 (in,)                  signs times scales of the input side
    svh        float16 (out,)                 signs times scales of the output side

    bits of a tile, first bit 0:     0 .. 15     16 .. 31     32 .. 47     48 .. 63    ...
    16-bit words in the file:        word 1      word 0       word 3       word 2      ...     bit 15 of a word comes first

W = diag(svh) H decode(trellis) H diag(suh) for W (out, in), with H the orthonormal 128-block Hadamard matrix; exllamav3 keeps
the transpose. Step t of a tile decodes weight t of the order ``mma_b`` (lowbit.trellis); in a fractional rate K + 1/2 odd steps
have one bit more than even ones. The code (3inst, mcg or mul1) is a part of the scheme; in files a scalar tensor
``mcg`` or ``mul1`` says it. Source: exllamav3 1.5, quant/pack.cu, quant/frac.cu, modules/quant/exl3_lib/quantize.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.errors import SchemeError
from lowbit.interfaces import Packer
from lowbit.parts import TensorSpec, part_specs
from lowbit.scheme import Grid, Rotation, ScaleFormat, Scheme, Trellis
from lowbit.tensors import PackedTensor, QuantizedTensor

BLOCK = 128
TILE = 16
CODES = ("3inst", "mcg", "mul1")


def exl3_scheme(half_bits: int, code: str) -> Scheme:
    """Return the scheme of a weight of ``half_bits / 2`` bits."""
    whole = half_bits // 2
    trellis = Trellis(code, (whole, whole + 1) if half_bits % 2 else (whole,), order="mma_b")
    rotation = Rotation(BLOCK, BLOCK, "float16")
    return Scheme(Grid.TRELLIS, 0, flat=True, scales=ScaleFormat("float16"), trellis=trellis, rotation=rotation)


SCHEMES = frozenset(
    exl3_scheme(half_bits, code) for code in CODES for half_bits in range(2, 17, 1 if code == "mul1" else 2)
)
"""Everything that EXL3 can hold."""


class Exl3Packer(Packer):
    """Packs trellis streams in EXL3's order of words and tiles."""

    layout = "exl3"

    def why_not(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """Refuse what is not one of ``SCHEMES``, and shapes that 128 does not divide."""
        if scheme not in SCHEMES:
            return (
                "EXL3 holds trellis weights of 16x16 tiles in the order mma_b, with the codes 3inst, mcg or mul1 and 128-wide "
                f"float16 rotations on both sides, not {scheme.summary()} weights"
            )
        if min(shape) < 1 or shape[0] % BLOCK or shape[1] % BLOCK:
            return (
                f"EXL3 needs both features to be multiples of {BLOCK}, got {shape[0]}x{shape[1]}; leave it unquantized"
            )
        return None

    def specs(self, scheme: Scheme, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        """Return the buffers in the table above."""
        assert scheme.trellis is not None
        words = scheme.trellis.tile_bits // 16
        return {
            "trellis": TensorSpec(torch.int16, (shape[1] // TILE, shape[0] // TILE, words)),
            "suh": TensorSpec(torch.float16, (shape[1],)),
            "svh": TensorSpec(torch.float16, (shape[0],)),
        }

    def pack(self, quantized: QuantizedTensor) -> PackedTensor:
        """Reorder the streams; raises SchemeError for a scale of the tensor that is not 1, for which EXL3 has no place."""
        parts = quantized.parts
        if (scale := float(parts["scales"])) != 1:
            raise SchemeError(
                f"EXL3 stores no scale of the whole tensor, and this one is {scale:g}; multiply the output signs by it"
            )
        buffers = {
            "trellis": _swap_words(parts["codes"].transpose(0, 1)),
            "suh": parts["input_signs"].contiguous(),
            "svh": parts["output_signs"].contiguous(),
        }
        return PackedTensor(self.spec(quantized.scheme, quantized.shape), buffers)

    def unpack(self, packed: PackedTensor) -> QuantizedTensor:
        """Undo ``pack``."""
        buffers, scale = packed.buffers, part_specs(packed.scheme, packed.shape)["scales"]
        parts = {
            "codes": _swap_words(buffers["trellis"].transpose(0, 1)),
            "scales": torch.ones(scale.shape, dtype=scale.dtype, device=buffers["suh"].device),
            "input_signs": buffers["suh"],
            "output_signs": buffers["svh"],
        }
        return QuantizedTensor(packed.scheme, packed.shape, parts)


def _swap_words(words: Tensor) -> Tensor:
    """Exchange the two words of each pair along the last dimension; the result is contiguous."""
    return words.reshape(*words.shape[:-1], -1, 2).flip(-1).reshape(words.shape).contiguous()
