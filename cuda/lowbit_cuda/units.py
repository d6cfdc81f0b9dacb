"""Weights in units: 16 rows x 256 columns in the order of tensor cores, which every kernel here reads.

``include/lowbit/unit.cuh`` draws units and fragments. Packing runs on the device that holds the codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lowbit_cuda.decoder import Decoder
from lowbit_cuda.errors import CudaError
from lowbit_cuda.program import KernelProgram

ROWS, COLUMNS = 16, 256
GROUP_SIZES = (16, 32, 64, 128, 256)
OFFSETS = ("CONSTANT", "ZEROS", "MINIMUMS")
"""One zero for all groups; a zero for each: ``w = s * (q - z)``; a minimum for each: ``w = s * q + m``."""
_SCALES = {torch.float16: "__half", torch.float32: "float"}


@dataclass(frozen=True, slots=True)
class UnitFormat:
    """What is in a unit. Raises ValueError for groups, scales or offsets that no kernel has.

    Attributes:
        decoder: Reads the codes.
        group_size: Columns that share a scale: 16, 32, 64, 128 or 256; 16 takes columns in the order of ``columns.py``.
        scale_dtype: float16 or float32, of scales and offsets.
        offset: One of ``OFFSETS``; a codebook has none, which is CONSTANT.
    """

    decoder: Decoder
    group_size: int
    scale_dtype: torch.dtype = torch.float16
    offset: str = "CONSTANT"

    def __post_init__(self) -> None:
        """Check."""
        if self.group_size not in GROUP_SIZES:
            raise ValueError(f"group_size must be one of {GROUP_SIZES}, got {self.group_size}")
        if self.scale_dtype not in _SCALES or self.offset not in OFFSETS:
            raise ValueError(
                f"scales are float16 or float32 and offsets one of {OFFSETS}, got {self.scale_dtype}, {self.offset}"
            )

    @property
    def groups(self) -> int:
        """Groups of a row in a unit."""
        return COLUMNS // self.group_size

    @property
    def nbytes(self) -> int:
        """Bytes of one unit: codes, scales, and offsets when each group has its own."""
        scales = ROWS * self.groups * self.scale_dtype.itemsize
        return 512 * self.decoder.bits + scales * (1 if self.offset == "CONSTANT" else 2)

    def defines(self) -> dict[str, str | int]:
        """Return the macros that tell a kernel."""
        return {
            "LOWBIT_HEADER": f"<{self.decoder.header}>",
            "LOWBIT_DECODER": self.decoder.name,
            "LOWBIT_GROUP": self.group_size,
            "LOWBIT_SCALE": _SCALES[self.scale_dtype],
            "LOWBIT_OFFSET": self.offset,
        }

    def program(self, source: Path, entry: str, defines: Mapping[str, str | int]) -> KernelProgram:
        """Return a kernel that reads these units; ``defines`` are its other macros."""
        include = self.decoder.include
        return KernelProgram(source, entry, {**self.defines(), **defines}, (include,) if include else ())


def units_across(in_features: int) -> int:
    """Return the units of a row."""
    return -(-in_features // COLUMNS)


def row_tiles(out_features: int) -> int:
    """Return the units of a column."""
    return -(-out_features // ROWS)


def pack_units(format: UnitFormat, codes: Tensor, scales: Tensor, offsets: Tensor | None = None) -> Tensor:
    """Arrange codes uint8 (out, in) and scales, offsets (out, groups) as uint8 (row tiles, units across, ``format.nbytes``).

    Rows and columns are padded with codes and scales of 0. Raises ValueError when offsets are missing or too many, CudaError when a
    code has more bits than the decoder reads.
    """
    if (offsets is None) != (format.offset == "CONSTANT"):
        raise ValueError(f"offsets {format.offset} {'need' if offsets is None else 'take no'} values for every group")
    bits = format.decoder.bits
    if bits < 8 and codes.numel() and (highest := int(codes.max())) >= 2**bits:
        raise CudaError(f"code {highest} does not fit the {bits} bits of {format.decoder.name}; what made it is broken")
    tiles, units = row_tiles(codes.shape[0]), units_across(codes.shape[1])
    parts = [_code_bytes(_padded(codes, tiles * ROWS, units * COLUMNS), format.decoder)]
    for values in (scales,) if offsets is None else (scales, offsets):
        groups = _padded(values.to(format.scale_dtype), tiles * ROWS, units * format.groups)
        split = groups.view(tiles, 2, 8, units, -1)  # (tile, row half, g, unit, group)
        parts.append(split.permute(0, 3, 2, 4, 1).reshape(tiles, units, -1).view(torch.uint8))
    return torch.cat(parts, dim=2)


def _padded(values: Tensor, rows: int, columns: int) -> Tensor:
    if values.shape == (rows, columns):
        return values
    return torch.nn.functional.pad(values, (0, columns - values.shape[1], 0, rows - values.shape[0]))


def _code_bytes(codes: Tensor, decoder: Decoder) -> Tensor:
    tiles, units, bits = codes.shape[0] // ROWS, codes.shape[1] // COLUMNS, decoder.bits
    # rows: (tile, row half, g); columns: (unit, chunk, pair, t, fragment of the pair, register half, code of the register)
    split = codes.view(tiles, 2, 8, units, 4, 2, 4, 2, 2, 2)
    words = torch.zeros(tiles, units, 4, bits, 8, 4, dtype=torch.int32, device=codes.device)  # (.., chunk, word, g, t)
    for fragment in range(4):
        for register in range(4):
            pair, half = divmod(fragment, 2)
            chosen = split[:, register % 2, :, :, :, pair, :, half, register // 2]  # (tile, g, unit, chunk, t, code)
            for code in range(2):
                values = chosen[..., code].permute(0, 2, 3, 1, 4).int()  # (tile, unit, chunk, g, t)
                for bit, (word, place) in enumerate(decoder.places(fragment, register, code)):
                    words[:, :, :, word] |= (values >> bit & 1) << place
    lanes = words.reshape(tiles, units, 4 * bits, 32).transpose(2, 3)  # (tile, unit, lane, words of the lane)
    slabs = (
        lanes.reshape(tiles, units, 32, bits, 4).transpose(2, 3).contiguous()
    )  # 16 bytes of every lane, slab by slab
    return slabs.view(tiles, units, -1).view(torch.uint8)
