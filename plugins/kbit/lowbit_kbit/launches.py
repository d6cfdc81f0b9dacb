"""The CUDA programs of ``kbit``, and how they are launched: which template instance serves a tensor, and what it is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from lowbit.errors import WeightError
from lowbit_cuda.loaded import LoadedKernel, check_buffer, load
from lowbit_cuda.program import KernelProgram
from lowbit_kbit.arithmetic import NOT_FINITE, overflow
from lowbit_kbit.codebooks import midpoints
from lowbit_kbit.streams import MOST_CODES
from lowbit_kbit.tables import SearchTables, search_tables

FOLDER = Path(__file__).parent / "cuda"
TYPES: Mapping[torch.dtype, str] = MappingProxyType(
    {torch.float32: "float", torch.float16: "__half", torch.bfloat16: "__nv_bfloat16"}
)
SCALE_TYPES: Mapping[torch.dtype, str] = MappingProxyType(
    {**TYPES, torch.uint8: "unsigned char", torch.int8: "signed char"}
)
LAYOUTS = ("Codes", "Words", "Dense")
RULES = ("absmax", "signed", "given")
THREADS = 256
BLOCKS_PER_PROCESSOR = 32  # 57 us with 8, 54 with 16, 32 and 64 (14336x4096 fp16, k = 4, H200, 2026-11-21)
DEQUANTIZE_THREADS = 256
BYTES_PER_BLOCK = 16 * 2 * DEQUANTIZE_THREADS  # that the dequantize kernel writes at a time
WORD_CHUNKS = MappingProxyType({32: 4, 16: 8, 10: 5, 8: 4, 6: 3, 5: 5, 4: 2})
"""Chunks of eight codes that a thread of ``repack.cu`` packs into words, by codes in a word."""
KEPT_BYTES = 128
"""Weights of a group that a lane keeps in registers; of larger groups it reads them twice, the second time from a cache."""


@dataclass(frozen=True, slots=True)
class Team:
    """How lanes share a group: ``vector`` weights at once, ``lanes`` of them, ``loops`` vectors kept (0: read twice)."""

    vector: int
    lanes: int
    loops: int


def team_for(group: int, columns: int, stride: int, itemsize: int) -> Team:
    """Return the widest loads whose addresses are multiples of their size, and as many lanes as a group has of them."""
    vector = 16 if itemsize == 2 else 8
    while group % vector or columns % vector or stride % vector:
        vector //= 2
    vectors = -(-group // vector)
    lanes = min(THREADS, 1 << (vectors - 1).bit_length())
    if lanes > 32 and vectors <= 32 * KEPT_BYTES // (vector * itemsize):
        lanes = 32  # a warp keeps the group, and need not wait for others
    loops = -(-vectors // lanes)
    return Team(vector, lanes, loops if loops * vector * itemsize <= KEPT_BYTES else 0)


def quantize_program(
    dtype: torch.dtype, scale_dtype: torch.dtype, rule: str, team: Team, compares: int, stochastic: bool = False
) -> KernelProgram:
    """Return an instance of ``quantize.cu``."""
    defines: dict[str, str | int] = {
        "LOWBIT_TYPE": TYPES[dtype],
        "LOWBIT_SCALE": TYPES[scale_dtype],
        "LOWBIT_RULE": RULES.index(rule),
        "LOWBIT_VECTOR": team.vector,
        "LOWBIT_LANES": team.lanes,
        "LOWBIT_LOOPS": team.loops,
        "LOWBIT_COMPARES": compares,
        "LOWBIT_RANDOM": int(stochastic),
    }
    return KernelProgram(FOLDER / "quantize.cu", "lowbit_kbit_quantize", defines, (FOLDER,))


def repack_program(source: str, target: str, bits: int) -> KernelProgram:
    """Return an instance of ``repack.cu``; layouts are named as in ``LAYOUTS``."""
    defines: dict[str, str | int] = {"LOWBIT_FROM": source, "LOWBIT_TO": target, "LOWBIT_BITS": bits}
    defines["LOWBIT_WORD_CHUNKS"] = WORD_CHUNKS[32 // bits]
    return KernelProgram(FOLDER / "repack.cu", "lowbit_kbit_repack", defines, (FOLDER,))


def dequantize_program(
    layout: str, bits: int, dtype: torch.dtype, scale: torch.dtype, super_scale: torch.dtype | None, whole: bool
) -> KernelProgram:
    """Return an instance of ``dequantize.cu``."""
    defines: dict[str, str | int] = {
        "LOWBIT_FROM": layout,
        "LOWBIT_BITS": bits,
        "LOWBIT_TYPE": TYPES[dtype],
        "LOWBIT_SCALE": SCALE_TYPES[scale],
        "LOWBIT_SUPER": "float" if super_scale is None else TYPES[super_scale],
        "LOWBIT_WHOLE": int(whole),
    }
    return KernelProgram(FOLDER / "dequantize.cu", "lowbit_kbit_dequantize", defines, (FOLDER,))


def programs(arch: str) -> Sequence[KernelProgram]:
    """Return an instance of every kernel for each thing that changes its code; ``lowbit kernels`` builds them for ``arch``."""
    half, brain, single = torch.float16, torch.bfloat16, torch.float32
    usual = team_for(64, 4096, 4096, 2)
    return (
        quantize_program(half, half, "signed", usual, 1),
        quantize_program(brain, half, "absmax", usual, 1),
        quantize_program(brain, brain, "signed", team_for(4096, 4096, 4096, 2), 2),
        quantize_program(single, single, "absmax", team_for(17, 51, 51, 4), 0),
        quantize_program(single, half, "given", team_for(128, 4096, 4096, 4), 4),
        quantize_program(half, half, "absmax", usual, 1, stochastic=True),
        *(repack_program("Codes", layout, bits) for layout in LAYOUTS[1:] for bits in (3, 4)),
        *(repack_program(layout, "Codes", 5) for layout in LAYOUTS[1:]),
        repack_program("Words", "Dense", 6),
        repack_program("Dense", "Words", 7),
        *(dequantize_program("Dense", bits, half, half, None, True) for bits in (2, 3, 4)),
        dequantize_program("Words", 4, brain, half, None, True),
        dequantize_program("Words", 3, single, single, None, False),
        dequantize_program("Dense", 4, half, torch.uint8, single, True),
        dequantize_program("Words", 5, brain, torch.int8, half, False),
    )


def quantize(
    weight: Tensor,
    group: int,
    rule: str,
    codebook: Tensor,
    codes: Tensor,
    scales: Tensor,
    seed: int | None = None,
    first_row: int = 0,
    check: bool = True,
) -> None:
    """Fill ``codes`` uint8 (out, in), and ``scales`` (out, groups) unless ``rule`` is ``given``, for groups along the rows.

    Args:
        weight: (out, in), float16, bfloat16 or float32; the elements of a row lie side by side.
        group: Weights of a group, the last of a row perhaps fewer.
        rule: ``absmax``, ``signed``, or ``given``: the scales are there, finite, and 0 or at least 2^-126.
        codebook: Ascending float32 ``(2**k,)``.
        codes: Contiguous.
        scales: Contiguous, float16, bfloat16 or float32.
        seed: Draws random numbers for stochastic rounding; None rounds to nearest.
        first_row: Where ``weight`` starts in the whole weight, for those numbers.
        check: Look for what is refused, which waits for the GPU; False to capture the launch.

    Raises WeightError for NaN, infinity, or an extreme that the scales cannot hold.
    """
    rows, columns = weight.shape
    check_buffer("codes", codes)
    check_buffer("scales", scales)
    tables, entries = _tables(codebook, weight.device, seed is not None)
    stride = weight.stride(0) if rows > 1 else columns
    team = team_for(group, columns, stride, weight.dtype.itemsize)
    kernel = load(
        quantize_program(weight.dtype, scales.dtype, rule, team, tables.compares, seed is not None), weight.device.index
    )
    # Whole groups without gaps are the groups of one long row, whose numbers need no division
    flat = stride == columns and columns % group == 0
    grid = (1, rows * columns, group, rows * columns // group) if flat else (rows, columns, group, -(-columns // group))
    status = torch.zeros(2, dtype=torch.int32, device=weight.device)
    blocks = -(-grid[0] * grid[3] * team.lanes // THREADS)
    kernel(
        min(blocks, kernel.processors * BLOCKS_PER_PROCESSOR),
        THREADS,
        *(weight, codes, scales, tables.edges, entries, tables.below, status),
        *(np.uint32(value) for value in grid),
        np.uint64(stride),
        np.uint64(first_row * columns),
        *(np.uint32(value) for value in (len(entries), len(tables.below), (seed or 0) & 0xFFFFFFFF)),
        np.float32(tables.step),
        np.float32(tables.start),
    )
    if not check:
        return
    broken, largest = status.tolist()
    if broken:
        raise WeightError(NOT_FINITE)
    if largest:
        raise overflow(float(np.array(largest, np.int32).view(np.float32)), scales.dtype)


def why_not_quantize(weight: Tensor, group: int) -> str | None:
    """Return None when ``quantize`` takes this weight, else the reason; views are copied by the caller."""
    if weight.dtype not in TYPES:
        return f"the kernel reads float16, bfloat16 and float32, not {weight.dtype}"
    if weight.numel() >= MOST_CODES:
        return f"the kernel counts fewer than {MOST_CODES} weights, got {weight.numel()}"
    if weight.stride(1) != 1 and weight.shape[1] > 1:
        return "the elements of a row must lie side by side"
    if weight.data_ptr() % 16:
        return "the weight must start at a multiple of 16 bytes"
    return None


def repack(source: str, target: str, bits: int, buffer: Tensor, count: int, out: Tensor, check: bool = True) -> None:
    """Write ``count`` codes of one layout into ``out`` in another.

    Raises WeightError for a byte that is no code, unless ``check`` is False, as it must be to capture the launch.
    """
    check_buffer("the source", buffer)
    check_buffer("the target", out)
    status = torch.zeros(1, dtype=torch.int32, device=buffer.device)
    threads = -(-count // (8 * _repack_chunks(target, bits)))
    _load(repack_program(source, target, bits), buffer)(
        max(1, -(-threads // THREADS)), THREADS, buffer, out, np.uint64(count), status
    )
    if check and source == "Codes" and int(status):
        raise WeightError(f"a code does not fit {bits} bits; the quantizer that made it is broken")


def _repack_chunks(target: str, bits: int) -> int:
    """Return the chunks of eight codes that a thread of ``repack.cu`` takes."""
    return WORD_CHUNKS[32 // bits] if target == "Words" else 2 if target == "Codes" else 4


def _divider(divisor: int) -> tuple[int, int]:
    """Return multiplier and shift of a Divider of ``dequantize.cu``: exact for numbers below 2^31."""
    shift = (divisor - 1).bit_length() - 1
    return (0, 0) if divisor == 1 else (-(-(1 << 32 + shift) // divisor), shift)


def dequantize(
    layout: str,
    bits: int,
    buffer: Tensor,
    codebook: Tensor,
    scales: Tensor,
    out: Tensor,
    grid: tuple[int, int, int],
    second: tuple[Tensor, int, int] | None = None,
) -> None:
    """Write the weight into ``out`` (contiguous, any of ``TYPES``).

    Args:
        layout: ``Words`` or ``Dense``, of ``buffer``.
        bits: Bits of a code.
        buffer: int32 words of all codes.
        codebook: float32 with 2**bits entries.
        scales: One for each group, row by row: floats, or integers of ``second``.
        out: The weight.
        grid: Columns of a row, weights of a group, groups of a row (for flat groups, of the weight as one row).
        second: Second-level floats, how many groups share one, and how many of them a row has.
    """
    columns, group, groups = grid
    for name, tensor in (("codes", buffer), ("codebook", codebook), ("scales", scales), ("out", out)):
        check_buffer(name, tensor, 16 if name in ("codes", "out") else tensor.element_size())
    whole = columns % group == 0 and group % 8 == 0
    supers, super_group, second_levels = second or (None, 1, 1)
    super_dtype = None if supers is None else supers.dtype
    kernel = _load(dequantize_program(layout, bits, out.dtype, scales.dtype, super_dtype, whole), buffer)
    tiles = max(1, -(-out.numel() * out.element_size() // BYTES_PER_BLOCK))
    kernel(
        min(tiles, kernel.processors * _blocks(layout, bits)),
        DEQUANTIZE_THREADS,
        *(buffer, codebook, scales, supers, out),
        np.uint64(out.numel()),
        *(np.uint32(value) for value in (columns, group, groups, second_levels)),
        *(np.uint32(value) for each in (max(1, group // 8), groups, super_group) for value in _divider(each)),
    )


def _blocks(layout: str, bits: int) -> int:
    """Return the most blocks of the dequantize kernel for a multiprocessor.

    Where eight codes lie in one word or two, as many as there is work; else fewer, which read ahead (81 instead of 76 % of the copy
    rate for dense 7-bit codes, 87 instead of 85 % for 4-bit ones the other way; H200, 2026-11-21).
    """
    ahead = bits == 7 or (bits == 6 if layout == "Dense" else bits in (3, 5, 6))
    return 32 if ahead else 128


def _load(program: KernelProgram, buffer: Tensor) -> LoadedKernel:
    return load(program, buffer.device.index)


def _tables(codebook: Tensor, device: torch.device, stochastic: bool) -> tuple[SearchTables, Tensor]:
    return _cached_tables(tuple(codebook.tolist()), device, stochastic)


@lru_cache(maxsize=256)
def _cached_tables(entries: tuple[float, ...], device: torch.device, stochastic: bool) -> tuple[SearchTables, Tensor]:
    """Return the search tables of a codebook and its entries, on a device; they are small, and fixed codebooks recur."""
    codebook = torch.tensor(entries)
    tables = search_tables(codebook[1:] if stochastic else midpoints(codebook))
    return tables.to(device), codebook.to(device)
