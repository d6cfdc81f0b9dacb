"""Layouts ``kbit-words`` and ``kbit-dense``: the codes of a weight as one stream of 32-bit words, everything else as it is.

    buffer    dtype, shape                       what
    qweight   int32 (words,)                     codes row after row, drawn in cuda/stream.cuh
    others    those of the quantized tensor      scales (with a second level where there is one), codebook, zeros

``words`` wastes 32 mod k bits of a word (2 of 32 at k = 3, 5 and 6; 4 at k = 7), ``dense`` nothing. Blocks and rows may end within a word.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from lowbit import PackedTensor, QuantizedTensor, Scheme
from lowbit.interfaces import Packer
from lowbit.parts import TensorSpec, part_specs
from lowbit.scheme import Grid
from lowbit.tensors import row_parts
from lowbit_kbit.streams import DENSE, WORDS, convert_stream, pack_stream, unpack_stream, word_count


class StreamPacker(Packer):
    """Packs integer codes of 1 to 8 bits, whatever they index."""

    stream: ClassVar[str]

    def why_not(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """Refuse grids without such codes, vectors and add-ons, and empty weights."""
        if min(shape) < 1:
            return f"a weight needs rows and columns, got {shape[0]}x{shape[1]}; leave it unquantized"
        if scheme.grid not in (Grid.AFFINE, Grid.CODEBOOK) or scheme.bits > 8 or scheme.vector > 1:
            return f"holds one code of 1 to 8 bits for each weight, not {scheme.summary()}; use the layout plain"
        if scheme.outliers or scheme.rotation or scheme.permutation:
            return f"holds no outliers, rotation or permutation, and the scheme is {scheme.summary()}; use the layout plain"
        return None

    def specs(self, scheme: Scheme, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        """Return ``qweight`` in place of the codes, and the other parts."""
        words = word_count(self.stream, scheme.bits, shape[0] * shape[1])
        parts = part_specs(scheme, shape)
        del parts["codes"]
        return {"qweight": TensorSpec(torch.int32, (words,)), **parts}

    def row_buffers(self, scheme: Scheme, shape: tuple[int, int]) -> frozenset[str]:
        """The words, where no row shares one with the next, and the parts that are cut by rows."""
        parts = row_parts(scheme, part_specs(scheme, shape))
        spilled = shape[1] % (32 // scheme.bits) if self.stream == WORDS else shape[1] * scheme.bits % 32
        return frozenset() if not parts or spilled else parts - {"codes"} | {"qweight"}

    def pack(self, quantized: QuantizedTensor) -> PackedTensor:
        """Pack the codes; raises WeightError for a code of more bits than the scheme has."""
        spec = self.spec(quantized.scheme, quantized.shape)
        words = pack_stream(self.stream, quantized.parts["codes"], quantized.scheme.bits)
        rest = {name: quantized.parts[name].contiguous() for name in spec.buffers if name != "qweight"}
        return PackedTensor(spec, {"qweight": words, **rest})

    def unpack(self, packed: PackedTensor) -> QuantizedTensor:
        """Undo ``pack``."""
        rows, columns = packed.shape
        codes = unpack_stream(self.stream, packed.buffers["qweight"], packed.scheme.bits, rows * columns)
        rest = {name: buffer for name, buffer in packed.buffers.items() if name != "qweight"}
        return QuantizedTensor(packed.scheme, packed.shape, {"codes": codes.view(rows, columns), **rest})


class WordsPacker(StreamPacker):
    """floor(32 / k) codes in a word."""

    layout = "kbit-words"
    stream = WORDS


class DensePacker(StreamPacker):
    """No wasted bits."""

    layout = "kbit-dense"
    stream = DENSE


PACKERS: tuple[StreamPacker, ...] = (WordsPacker(), DensePacker())


def repack(packed: PackedTensor, layout: str) -> PackedTensor:
    """Return the same weight in the other of the two layouts, exactly, on its device. Raises KeyError for any other layout."""
    source = next(packer for packer in PACKERS if packer.layout == packed.layout)
    target = {packer.layout: packer for packer in PACKERS}[layout]
    count = packed.shape[0] * packed.shape[1]
    words = convert_stream(source.stream, target.stream, packed.buffers["qweight"], packed.scheme.bits, count)
    return PackedTensor(target.spec(packed.scheme, packed.shape), {**packed.buffers, "qweight": words})
