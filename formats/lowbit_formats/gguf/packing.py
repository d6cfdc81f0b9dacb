"""``BlockPacker``: a layout of GGUF blocks. One uint8 buffer ``blocks`` (out, bytes of a row) holds scales and codes.

A row is a sequence of blocks, each a few fields side by side (byte tables: SPEC.md). Codes are moved eight at a time: eight
uint8 codes are one int64, and a shift by less than eight bits with a mask moves every code within its own byte:

    int64:  [ 0000dddd | 0000cccc | ... | 0000aaaa ]  << 4  ->  [ dddd0000 | cccc0000 | ... | aaaa0000 ]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from lowbit.compiled import CLoops
from lowbit.errors import SchemeError, WeightError
from lowbit.interfaces import Packer
from lowbit.parts import TensorSpec, part_specs
from lowbit.scheme import Grid, Scheme
from lowbit.tensors import PackedTensor, QuantizedTensor
from lowbit.workers import map_ranges
from lowbit_formats.gguf.block_types import BlockType

Parts = Mapping[str, Tensor]
BYTES = 0x0101010101010101
"""Times a byte: that byte in each of the eight bytes of an int64."""
HALVES = CLoops(Path(__file__).with_name("halves.c"))
"""Loops over one fp16 value of every block."""
_EXPONENT = 0x7C00  # of an fp16; all ones means NaN or infinity


class BlockPacker(Packer):
    """Packs one scheme into one ggml type, rows in parallel.

    Args:
        type: The ggml type; ``Q4_0`` becomes layout ``gguf-q4_0``.
        scheme: The only scheme that the type can hold.
        encode: From the parts of some rows to blocks uint8 (rows, blocks, nbytes).
        decode: From such blocks to the parts, except the codebook.
        floats: Where the fp16 scales are in a block, as byte offsets.
        codebook: The table of a CODEBOOK scheme.
    """

    def __init__(
        self,
        type: BlockType,
        scheme: Scheme,
        encode: Callable[[Parts], Tensor],
        decode: Callable[[Tensor], dict[str, Tensor]],
        floats: tuple[int, ...],
        codebook: tuple[float, ...] | None = None,
    ) -> None:
        self.type = type
        self.scheme = scheme
        self.floats = floats
        self.codebook = None if codebook is None else torch.tensor(codebook, dtype=torch.float32).unsqueeze(1)
        self._encode, self._decode = encode, decode
        self._codebooks: dict[torch.device, Tensor] = {}
        self.layout = f"gguf-{type.name.lower()}"  # type: ignore[misc]  # one instance a layout, each with its own name

    def why_not(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """Refuse every scheme but one, and rows that are not whole blocks."""
        if scheme != self.scheme:
            return (
                f"{self.type.name} holds {_summary(self.scheme)} weights, not {_summary(scheme)}{self._unseen(scheme)}"
            )
        if min(shape) < 1:
            return f"a weight needs rows and columns, got {shape[0]}x{shape[1]}; leave it unquantized"
        if shape[1] % self.type.weights:
            return (
                f"a block of {self.type.name} is {self.type.weights} weights of a row, which does not divide in_features "
                f"{shape[1]}; choose a type with smaller blocks, or leave the weight unquantized"
            )
        return None

    def specs(self, scheme: Scheme, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        """Return ``blocks``: uint8 (out, bytes of a row)."""
        return {"blocks": TensorSpec(torch.uint8, (shape[0], self.type.row_bytes(shape[1])))}

    def row_buffers(self, scheme: Scheme, shape: tuple[int, int]) -> frozenset[str]:
        """The blocks."""
        return frozenset({"blocks"})

    def pack(self, quantized: QuantizedTensor) -> PackedTensor:
        """Arrange the parts into blocks.

        Raises WeightError for a code or sub-scale that its field cannot hold, SchemeError for another codebook than the
        type's own: a scheme names no codebook, so ``why_not`` cannot tell.
        """
        rows, columns = quantized.shape
        self._check_codebook(quantized)
        spec = self.spec(quantized.scheme, quantized.shape)
        blocks = torch.empty(spec.buffers["blocks"].shape, dtype=torch.uint8, device=_device(quantized.parts))

        def work(start: int, stop: int) -> None:
            self._put(_rows(quantized.parts, quantized.scheme, start, stop), blocks[start:stop])

        map_ranges(work, rows, columns, join=True)
        return PackedTensor(spec, {"blocks": blocks})

    def unpack(self, packed: PackedTensor) -> QuantizedTensor:
        """Undo ``pack``."""
        blocks = packed.buffers["blocks"]
        rows, columns = packed.shape
        parts = {
            name: torch.empty(spec.shape, dtype=spec.dtype, device=blocks.device)
            for name, spec in part_specs(packed.scheme, packed.shape).items()
        }

        def work(start: int, stop: int) -> None:
            decoded = self._decode(blocks[start:stop].reshape(stop - start, -1, self.type.nbytes))
            for name, view in _rows(parts, packed.scheme, start, stop).items():
                if name in decoded:
                    view.copy_(decoded[name].reshape(view.shape))

        map_ranges(work, rows, columns, join=True)
        if self.codebook is not None:
            parts["codebook"] = self._codebook_on(blocks.device)
        return QuantizedTensor(packed.scheme, packed.shape, parts)

    def _put(self, parts: Parts, target: Tensor) -> None:
        """Write the parts of some rows to their blocks, uint8 (rows, bytes of a row)."""
        target.copy_(self._encode(parts).reshape(target.shape))

    def _put_halves(self, parts: Parts, target: Tensor) -> bool:
        """Write scales, and minimums where the type has them; whether a loop was there to do it."""
        if target.device.type != "cpu" or (loop := HALVES.find("halves_put")) is None:
            return False
        for at, name in zip(self.floats, self._names(), strict=True):
            loop(parts[name].contiguous(), target.view(-1)[at:], parts[name].numel(), self.type.nbytes)
        return True

    def _names(self) -> tuple[str, ...]:
        """Return the parts that are fp16 values of a block, in the order of ``floats``."""
        return ("scales", "minimums")[: len(self.floats)]

    def _codebook_on(self, device: torch.device) -> Tensor:
        """Return the codebook; a copy on another device is kept, because a captured CUDA graph must not wait for one."""
        assert self.codebook is not None
        if device not in self._codebooks:
            with torch.inference_mode(False):
                self._codebooks[device] = self.codebook.to(device)
        return self._codebooks[device]

    def not_finite(self, packed: PackedTensor) -> str | None:
        """Return where a scale in the blocks is NaN or infinite and what it is, such as ``row 5 has the scale inf``."""
        blocks = aligned(packed.buffers["blocks"]).view(-1, self.type.nbytes)
        rows = packed.shape[0]
        if not self.floats:
            wrong = (blocks[:, 0] == 0xFF).nonzero()  # E8M0 of MXFP4, whose only NaN is 255
            return f"row {int(wrong[0]) // (len(blocks) // rows)} has the scale nan" if len(wrong) else None
        halves = blocks.view(torch.int16)
        for at in self.floats:
            if (block := _first_not_finite(halves[:, at // 2])) >= 0:
                value = float(halves[block, at // 2].view(torch.float16))
                return f"row {block // (len(blocks) // rows)} has the scale {value}"
        return None

    def _check_codebook(self, quantized: QuantizedTensor) -> None:
        if self.codebook is not None and not torch.equal(quantized.parts["codebook"].cpu(), self.codebook):
            raise SchemeError(
                f"{self.type.name} has a fixed codebook and this weight has another one; choose a format that stores "
                f"codebooks, such as native"
            )

    def _unseen(self, scheme: Scheme) -> str:
        """Name the first difference that the summaries do not show."""
        if _summary(scheme) != _summary(self.scheme):
            return ""
        name = next(f.name for f in fields(scheme) if getattr(scheme, f.name) != getattr(self.scheme, f.name))
        return f" with {name}={getattr(scheme, name)}"


@lru_cache(maxsize=4096)
def _summary(scheme: Scheme) -> str:
    """Kept, because twenty types refuse a scheme by name: 30,000 times to plan one conversion."""
    return scheme.summary()


def _first_not_finite(halves: Tensor) -> int:
    """Return the first of fp16 values, given as int16 (n,) with any stride, that is NaN or infinite; -1 when none is."""
    if halves.device.type == "cpu" and (loop := HALVES.find("first_not_finite")) is not None:
        return loop(halves, len(halves), 2 * halves.stride(0))
    wrong = (halves & _EXPONENT == _EXPONENT).nonzero()
    return int(wrong[0]) if len(wrong) else -1


def words(codes: Tensor, count: int, *shape: int) -> Tensor:
    """View uint8 codes (rows, columns) below ``count`` as int64 words of eight (rows, -1, *shape).

    Raises WeightError for a higher code: it would bleed into its neighbours. The check runs while the codes are in cache.
    """
    check_below(codes, count, "a code")
    return aligned(codes).view(torch.int64).view(len(codes), -1, *shape)


def aligned(values: Tensor) -> Tensor:
    """Return ``values`` contiguous and at a multiple of eight bytes, so that they can be viewed as wider integers."""
    if values.is_contiguous() and values.storage_offset() * values.itemsize % 8 == 0:
        return values
    return values.clone(memory_format=torch.contiguous_format)


def codes_of(words: Tensor) -> Tensor:
    """Return uint8 codes (rows, columns) of int64 words (rows, ...), eight in each."""
    return words.contiguous().view(len(words), -1).view(torch.uint8)


def check_below(values: Tensor, count: int, what: str) -> None:
    """Raise WeightError unless all of the integer ``values`` are below ``count``."""
    if count < 256 and values.numel() and (highest := int(values.max())) >= count:
        raise WeightError(f"{what} is {highest}, and this type has {count}; the quantizer that made it is broken")


def join(*parts: Tensor) -> Tensor:
    """Concatenate the fields of a block, each (rows, blocks, n) of any dtype, to uint8 (rows, blocks, nbytes)."""
    raw = [aligned(part).view(torch.uint8).view(*part.shape[:2], -1) for part in parts]
    if all(part.shape[2] % 2 == 0 for part in raw):  # two bytes at a time: 1.5 times as fast for Q4_0
        return torch.cat([part.view(torch.int16) for part in raw], dim=2).view(torch.uint8)
    return torch.cat(raw, dim=2)


def split(blocks: Tensor, *widths: int) -> list[Tensor]:
    """Cut blocks uint8 (rows, blocks, nbytes) into fields (rows, blocks, width), each in memory of its own.

    A copy even of a field that is contiguous where it is: only fresh memory is aligned for a view as wider integers.
    """
    if all(width % 2 == 0 for width in widths) and blocks.storage_offset() % 2 == 0:
        pairs = torch.split(blocks.contiguous().view(torch.int16), [width // 2 for width in widths], dim=2)
        return [part.clone(memory_format=torch.contiguous_format).view(torch.uint8) for part in pairs]
    return [part.clone(memory_format=torch.contiguous_format) for part in torch.split(blocks, list(widths), dim=2)]


def half(field: Tensor) -> Tensor:
    """Read a contiguous uint8 field (rows, blocks, 2) as fp16 (rows, blocks)."""
    return field.view(torch.float16).squeeze(2)


def flip_sign(scales: Tensor) -> Tensor:
    """Negate fp16 values by their sign bit, so that NaN and zero keep their other bits."""
    return (scales.contiguous().view(torch.int16) ^ -0x8000).view(torch.float16)


def _rows(parts: Parts, scheme: Scheme, start: int, stop: int) -> dict[str, Tensor]:
    """Cut rows out of every part but the codebook; the parts of sign planes have the plane first, and one plane only."""
    if scheme.grid is Grid.BINARY:
        return {name: part[0, start:stop] for name, part in parts.items()}
    return {name: part[start:stop] for name, part in parts.items() if name != "codebook"}


def _device(parts: Parts) -> torch.device:
    return next(iter(parts.values())).device
