"""Moving codes between layouts as dense bit streams, a few rows at a time in cache: no byte for each code is ever written.

Formats differ in the order of the same bits. A packer that can hand over its codes as what ``lowbit.bits`` packs, and take them
back, is a ``StreamPacker``; between two of them a weight whose codes stay the same goes

    source buffers -> streams of some rows -> target buffers -> streams again -> compared, while all of it is in cache

and scales and zeros go through ``lift`` as ever. What no stream can tell (other codes, other packers) takes the way of
``QuantizedTensor``, with the same result.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from lowbit import memory
from lowbit.interfaces import Packer
from lowbit.lift import lift
from lowbit.proof import alike, same_numbers
from lowbit.scheme import Grid, Scheme, Zero
from lowbit.tensors import PackedSpec, PackedTensor, QuantizedTensor
from lowbit.workers import map_ranges

SCALES_PIECE, CODES_PIECE = 1 << 23, 1 << 21
"""Weights whose scales, or whose codes, are moved at once: the best of several, with loops in C and without (2026-11-21). Smaller pieces
cut GPTQ's columns too short, and a call takes too large a share."""


class StreamPacker(Packer):
    """A packer that can move the codes of some rows as bit streams.

    Contract: ``streams`` of any rows are ``pack_bits`` of the codes that ``unpack`` gives, in words; ``read_parts`` gives the
    other parts of these rows; a tensor whose rows ``write_parts`` and ``put_streams`` have filled equals what ``pack`` makes.
    Ranges start at multiples of ``stream_rows`` and may be worked on in any order and in several threads.
    """

    stream_rows: ClassVar[int] = 1

    @abstractmethod
    def read_parts(self, packed: PackedTensor, start: int, stop: int) -> dict[str, Tensor]:
        """Return every part but the codes, as a weight of rows start to stop has them."""

    @abstractmethod
    def write_parts(self, packed: PackedTensor, start: int, stop: int, parts: Mapping[str, Tensor]) -> None:
        """Write every part but the codes into the buffers; what belongs to no row is written with row 0."""

    @abstractmethod
    def streams(self, packed: PackedTensor, start: int, stop: int) -> Tensor:
        """Return the codes of the rows, int32 (stop - start, in * bits / 32); perhaps a view, which nobody changes."""

    @abstractmethod
    def put_streams(self, packed: PackedTensor, start: int, stop: int, streams: Tensor) -> None:
        """Write such codes into the buffers."""

    def holds_streams(self, packed: PackedTensor, start: int, stop: int, streams: Tensor) -> bool:
        """Whether ``streams`` would return these codes: the default asks it, others need not write them out."""
        return alike(self.streams(packed, start, stop), streams)


def streamed(value: PackedTensor, source: Packer, packer: Packer, target: PackedSpec) -> PackedTensor | None:
    """Return the same weight as ``packer`` stores it, proved to be the same numbers; None where streams cannot do it or tell.

    Raises SchemeError when the target cannot hold a scale or a minimum of this weight.
    """
    if not isinstance(source, StreamPacker) or not isinstance(packer, StreamPacker):
        return None
    if not _same_codes(value.scheme, target.scheme) or value.shape[1] * target.scheme.bits % 32:
        return None
    buffers = {name: memory.empty(spec.shape, spec.dtype) for name, spec in target.buffers.items()}
    result = PackedTensor(target, buffers)
    multiple = math.lcm(source.stream_rows, packer.stream_rows)

    def codes(start: int, stop: int) -> bool:
        streams = source.streams(value, start, stop)
        packer.put_streams(result, start, stop, streams)
        return packer.holds_streams(result, start, stop, streams)

    def work(first: int, last: int) -> bool:
        weight = _without_codes(value.scheme, (last - first, value.shape[1]), source.read_parts(value, first, last))
        packer.write_parts(result, first, last, lift(weight, target.scheme).parts)
        written = _without_codes(target.scheme, weight.shape, packer.read_parts(result, first, last), weight)
        pieces = map_ranges(lambda a, b: codes(first + a, first + b), *weight.shape, multiple, CODES_PIECE)
        return same_numbers(weight, written) and all(pieces)

    return result if all(map_ranges(work, *value.shape, multiple, SCALES_PIECE)) else None


def _same_codes(source: Scheme, target: Scheme) -> bool:
    """Whether ``lift`` leaves the codes alone, and rows can be cut: no part mixes them."""
    mixed = source.flat or source.outliers or source.rotation or source.vector > 1
    kept = source.zero is target.zero or target.zero is not Zero.SYMMETRIC
    alike = (source.grid, source.bits, source.code_count) == (Grid.AFFINE, target.bits, target.code_count)
    return alike and kept and not mixed


def _without_codes(
    scheme: Scheme, shape: tuple[int, int], parts: Mapping[str, Tensor], like: QuantizedTensor | None = None
) -> QuantizedTensor:
    """Return a weight whose codes are a placeholder without memory, the one of ``like`` if given: they are compared elsewhere."""
    codes = like.parts["codes"] if like else torch.zeros(1, 1, dtype=torch.uint8).expand(shape)
    return QuantizedTensor(scheme, shape, {**parts, "codes": codes})
