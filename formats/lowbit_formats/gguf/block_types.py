"""ggml's tensor types: id, weights in a block, bytes of a block (ggml.h and ggml-common.h of llama.cpp, 2026).

Quantized rows are sequences of blocks; a row never shares a block with the next one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class BlockType:
    """One ggml type: ``weights`` weights take ``nbytes`` bytes."""

    name: str
    id: int
    weights: int
    nbytes: int

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of ``columns`` weights; columns must be a multiple of ``weights``."""
        return columns // self.weights * self.nbytes


_TABLE = """
F32      0   1   4
F16      1   1   2
Q4_0     2  32  18
Q4_1     3  32  20
Q5_0     6  32  22
Q5_1     7  32  24
Q8_0     8  32  34
Q8_1     9  32  40
Q2_K    10 256  84
Q3_K    11 256 110
Q4_K    12 256 144
Q5_K    13 256 176
Q6_K    14 256 210
Q8_K    15 256 292
IQ2_XXS 16 256  66
IQ2_XS  17 256  74
IQ3_XXS 18 256  98
IQ1_S   19 256  50
IQ4_NL  20  32  18
IQ3_S   21 256 110
IQ2_S   22 256  82
IQ4_XS  23 256 136
I8      24   1   1
I16     25   1   2
I32     26   1   4
I64     27   1   8
F64     28   1   8
IQ1_M   29 256  56
BF16    30   1   2
TQ1_0   34 256  54
TQ2_0   35 256  66
MXFP4   39  32  17
NVFP4   40  64  36
Q1_0    41 128  18
Q2_0    42  64  18
"""

TYPES = {
    name: BlockType(name, *map(int, numbers))
    for name, *numbers in (line.split() for line in _TABLE.split("\n") if line)
}
"""Every type by name."""

BY_ID = {type.id: type for type in TYPES.values()}

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The plain float types and their dtypes."""

FLOAT_TYPES = {dtype: TYPES[name] for name, dtype in FLOATS.items()}

DEQUANTIZED = tuple(name for name in TYPES if name.startswith("IQ") and name != "IQ4_NL")
"""Types without a packer here: the gguf package dequantizes them to float32 when they are read."""

FILE_TYPES = {
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q8_0": 7,
    "Q5_0": 8,
    "Q5_1": 9,
    "Q2_K": 10,
    "Q3_K": 11,
    "Q4_K": 14,
    "Q5_K": 16,
    "Q6_K": 18,
    "IQ4_NL": 25,
    "BF16": 32,
    "TQ1_0": 36,
    "TQ2_0": 37,
    "MXFP4": 38,
    "Q1_0": 40,
    "Q2_0": 41,
}
"""``general.file_type`` of a file that holds mostly one type (enum llama_ftype; the _S value where K-types have mixes)."""
