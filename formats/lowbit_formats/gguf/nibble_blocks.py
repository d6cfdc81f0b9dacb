"""Q4_0 and Q4_1 as bit streams: whole 64-bit words are cut and joined, and no byte is ever written for a code.

numpy does it: on pieces that fit a cache, what an operation of torch costs before it starts (5 us) is what it takes.

A block holds 32 codes as a stream does, four bits each, in another order. Two words A and B of a stream hold the codes of a
block one after the other; byte e of a block holds q(e) and q(e + 16)::

    A        [ q15 q14 | ... | q3 q2 | q1 q0 ]              even, odd: the low and the high nibbles of A, those of B above them
    B        [ q31 q30 | ... | q19 q18 | q17 q16 ]
    even     [ q30 q14 | ... | q18 q2 | q16 q0 ]
    odd      [ q31 q15 | ... | q19 q3 | q17 q1 ]
    a block  even and odd byte by byte:  [ ... | q19 q3 | q18 q2 | q17 q1 | q16 q0 ]
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy
import torch
from torch import Tensor

from lowbit.compiled import CLoops
from lowbit.streams import StreamPacker
from lowbit.tensors import PackedTensor
from lowbit_formats.gguf.packing import BYTES, HALVES, BlockPacker, Parts

_LOOPS = CLoops(Path(__file__).with_name("nibble_blocks.c"))
_LOW, _HIGH = numpy.uint64(0x0F * BYTES), numpy.uint64(0xF0 * BYTES)
_NIBBLE, _BYTE = numpy.uint64(4), numpy.uint16(8)
_CODES = 16
"""Bytes of the codes of a block; its scales and minimums come before them."""


class NibbleBlockPacker(BlockPacker, StreamPacker):
    """A type whose block is one or two fp16 values, in the order of the parts, and 32 codes of four bits."""

    def read_parts(self, packed: PackedTensor, start: int, stop: int) -> dict[str, Tensor]:
        """Return scales, and minimums where the type has them."""
        floats = self._floats(packed, start, stop)
        if (loop := HALVES.find("halves_get")) is None:
            return {name: floats[..., at].contiguous() for at, name in enumerate(self._names())}
        parts = {name: floats.new_empty(floats.shape[:2]) for name in self._names()}
        for at, values in enumerate(parts.values()):
            loop(floats[..., at], values, values.numel(), self.type.nbytes)
        return parts

    def write_parts(self, packed: PackedTensor, start: int, stop: int, parts: Mapping[str, Tensor]) -> None:
        """Write scales and minimums."""
        if self._put_halves(parts, packed.buffers["blocks"][start:stop]):
            return
        floats = self._floats(packed, start, stop)
        for at, name in enumerate(self._names()):
            floats[..., at] = parts[name]

    def streams(self, packed: PackedTensor, start: int, stop: int) -> Tensor:
        """Cut the codes out of the blocks and put them in their order."""
        if (loop := _LOOPS.find("nibbles_get")) is not None:
            found = torch.empty(stop - start, packed.shape[1] // 8, dtype=torch.int32)
            loop(self._codes(packed, start, stop), found, found.numel() // 4, self.type.nbytes)
            return found
        near = numpy.empty((stop - start) * packed.shape[1] // 32, dtype=f"V{_CODES}")
        near[...] = self._records(packed, start, stop)["codes"]
        pairs = near.view(numpy.uint16)
        even = pairs.astype(numpy.uint8).view(numpy.uint64)  # the lower byte of each pair
        odd = numpy.right_shift(pairs, _BYTE, out=pairs).astype(numpy.uint8).view(numpy.uint64)
        words = numpy.empty((len(even), 2), dtype=numpy.uint64)
        numpy.bitwise_and(even, _LOW, out=words[:, 0])
        words[:, 0] |= (odd & _LOW) << _NIBBLE
        numpy.bitwise_and(even >> _NIBBLE, _LOW, out=words[:, 1])
        words[:, 1] |= odd & _HIGH
        return torch.from_numpy(words.view(numpy.int32)).view(stop - start, -1)

    def put_streams(self, packed: PackedTensor, start: int, stop: int, streams: Tensor) -> None:
        """Put the codes in the order of blocks, and into these."""
        if (loop := _LOOPS.find("nibbles_put")) is not None:
            dense = streams.contiguous()
            loop(dense, self._codes(packed, start, stop), dense.numel() // 4, self.type.nbytes)
            return
        words = streams.contiguous().numpy().view(numpy.uint64).reshape(-1, 2)
        first, second = words[:, 0], words[:, 1]
        even = (second & _LOW) << _NIBBLE
        even |= first & _LOW
        odd = (first >> _NIBBLE) & _LOW
        odd |= second & _HIGH
        pairs = odd.view(numpy.uint8).astype(numpy.uint16)
        pairs <<= _BYTE
        pairs |= even.view(numpy.uint8).astype(numpy.uint16)
        self._records(packed, start, stop)["codes"] = pairs.view(f"V{_CODES}")

    def holds_streams(self, packed: PackedTensor, start: int, stop: int, streams: Tensor) -> bool:
        """Compare block by block."""
        if not streams.is_contiguous() or (loop := _LOOPS.find("nibbles_same")) is None:
            return super().holds_streams(packed, start, stop, streams)
        return loop(self._codes(packed, start, stop), streams, streams.numel() // 4, self.type.nbytes) == 1

    def _put(self, parts: Parts, target: Tensor) -> None:
        loop = _LOOPS.find("nibbles_pack")
        if loop is not None and target.device.type == "cpu":
            codes, at = parts["codes"].contiguous(), self.type.nbytes - _CODES
            highest = loop(codes, target.view(-1)[at:], codes.numel() // 32, self.type.nbytes)
            if highest < 16 and self._put_halves(parts, target):
                return
        super()._put(parts, target)

    def _floats(self, packed: PackedTensor, start: int, stop: int) -> Tensor:
        """Return a view of the fp16 values of some rows: (rows, blocks, one or two)."""
        halves = packed.buffers["blocks"][start:stop].view(torch.float16)
        return halves.view(stop - start, -1, self.type.nbytes // 2)[..., : len(self.floats)]

    def _codes(self, packed: PackedTensor, start: int, stop: int) -> Tensor:
        """Return the bytes of some rows from the first block's codes on."""
        return packed.buffers["blocks"][start:stop].view(-1)[self.type.nbytes - _CODES :]

    def _records(
        self, packed: PackedTensor, start: int, stop: int
    ) -> numpy.ndarray[tuple[int], numpy.dtype[numpy.void]]:
        """Return the blocks of some rows as records; numpy copies 16 bytes of each in one move, 20 GB/s in cache.

        The fields of torch are of one dtype and a power of two of bytes apart from each other at most: 2 GB/s.
        """
        dtype = numpy.dtype([("floats", f"V{self.type.nbytes - _CODES}"), ("codes", f"V{_CODES}")])
        return packed.buffers["blocks"][start:stop].view(-1).numpy().view(dtype)


class ByteBlockPacker(BlockPacker):
    """Q8_0: a scale, and codes as signed bytes."""

    def _put(self, parts: Parts, target: Tensor) -> None:
        loop = _LOOPS.find("bytes_pack")
        if loop is None or not self._put_halves(parts, target):
            super()._put(parts, target)
            return
        codes, at = parts["codes"].contiguous(), self.type.nbytes - self.type.weights
        loop(codes, target.view(-1)[at:], codes.numel() // self.type.weights, self.type.nbytes)
