"""``Decoder``: the Python half of a device decoder: where ``pack_units`` must put the bits that its C++ half will look for.

A decoder is a struct in a header (``include/lowbit/affine.cuh``, ``codebook.cuh``; a plugin brings its own) and one of these. Places
below say the same as the drawings there: for fragment m and register r of a lane's chunk, and the even (0) or odd (1) column of the
register, which bit of which word holds bit b of the code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

Place = tuple[int, int]
"""(word of the chunk, bit of the word)."""
Places = Callable[[int, int, int], list[Place]]


@dataclass(frozen=True, slots=True)
class Decoder:
    """A decoder that the kernel templates can be built with.

    Attributes:
        name: C++ type, ``lowbit::AffineDecoder<4>``.
        header: What to include for it, ``lowbit/affine.cuh``.
        bits: Bits of a code, and words of a chunk of 32 weights.
        places: Where the code of (fragment, register, column) lies: one place for each bit, the lowest first.
        integer: Codes are integers, with zeros or minimums; else they are indices into a codebook.
        table_bytes: Shared memory of its table.
        include: The folder of the header, unless it is lowbit's own.
    """

    name: str
    header: str
    bits: int
    places: Places
    integer: bool = True
    table_bytes: int = 0
    include: Path | None = None


def _halves(table: Callable[[int, int], list[Place]]) -> Places:
    """The odd column of a register lies 16 bits above the even one."""
    return lambda fragment, register, code: [(word, bit + 16 * code) for word, bit in table(fragment, register)]


def _run(word: int, first: int, bits: int) -> list[Place]:
    return [(word, first + bit) for bit in range(bits)]


def _one_bit(fragment: int, register: int) -> list[Place]:
    return _run(0, 2 * fragment + register // 2 + 8 * (register % 2), 1)


def _two_bits(fragment: int, register: int) -> list[Place]:
    return _run(fragment // 2, 4 * (fragment % 2) + 2 * (register // 2) + 8 * (register % 2), 2)


def _three_bits(fragment: int, register: int) -> list[Place]:
    if fragment == 3:
        return _run(1 + register % 2, 9 + 3 * (register // 2), 3)
    if register < 3:
        return _run(register, 3 * fragment, 3)
    if fragment == 2:
        return [(0, 15), (1, 15), (2, 15)]  # the top bit of each word
    return _run(0, 9 + 3 * fragment, 3)


def _four_bits(fragment: int, register: int) -> list[Place]:
    return _run(fragment, 4 * (register // 2) + 8 * (register % 2), 4)


def _split(bits: int) -> Callable[[int, int], list[Place]]:
    """Four low bits as ever; the high ones of 16 (or 8) registers in each further word."""
    high = bits - 4
    each = 16 // high

    def table(fragment: int, register: int) -> list[Place]:
        number = 4 * fragment + register
        return [*_four_bits(fragment, register), *_run(4 + number // each, high * (number % each), high)]

    return table


def _eight_bits(fragment: int, register: int) -> list[Place]:
    return _run(2 * fragment + register // 2, 8 * (register % 2), 8)


def _pairs(bits: int) -> Places:
    """Fields of two codes, as many as fit in a word; three bits leave two spare bits a word for the last field."""
    each = 32 // (2 * bits)

    def places(fragment: int, register: int, code: int) -> list[Place]:
        number = 4 * fragment + register
        if bits == 3 and number == 15:  # the sixteenth field lies in the spare bits of the three words
            return [(bit // 2, 30 + bit % 2) for bit in range(code * bits, (code + 1) * bits)]
        return _run(number // each, 2 * bits * (number % each) + bits * code, bits)

    return places


def _singles(bits: int) -> Places:
    """Single codes in order, as many as fit in a word; the last of a chunk lie in what is left of its words."""
    each, spare = 32 // bits, 32 % bits

    def places(fragment: int, register: int, code: int) -> list[Place]:
        number = 2 * (4 * fragment + register) + code
        if number < each * bits:
            return _run(number // each, bits * (number % each), bits)
        first = bits * (number - each * bits)
        return [(bit // spare, each * bits + bit % spare) for bit in range(first, first + bits)]

    return places


_TABLES = {1: _one_bit, 2: _two_bits, 3: _three_bits, 4: _four_bits, 5: _split(5), 6: _split(6), 8: _eight_bits}

AFFINE: Mapping[int, Decoder] = MappingProxyType(
    {
        bits: Decoder(f"lowbit::AffineDecoder<{bits}>", "lowbit/affine.cuh", bits, _halves(_TABLES[bits]))
        for bits in _TABLES
    }
)
"""Integer codes by their bits."""


def _codebook(bits: int) -> Decoder:
    if bits <= 4:
        name, places, table = "CodebookDecoder", _pairs(bits), 128 << (8 if bits == 2 else 2 * bits)  # 2 bits: of quads
    else:
        name, places, table = "WideCodebookDecoder", _singles(bits), 128 << bits
    return Decoder(f"lowbit::{name}<{bits}>", "lowbit/codebook.cuh", bits, places, False, table)


CODEBOOK: Mapping[int, Decoder] = MappingProxyType({bits: _codebook(bits) for bits in range(2, 9)})
"""Codebook indices by their bits."""


def affine_decoder(bits: int) -> Decoder:
    """Return the narrowest decoder that holds integer codes of ``bits`` (1 to 8)."""
    return AFFINE[min(known for known in AFFINE if known >= bits)]
