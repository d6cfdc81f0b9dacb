"""The table in the docstring of lowbit.parts, case by case."""

import pytest
import torch
from hypothesis import given

from lowbit import (
    Across,
    Binary,
    BinaryForm,
    Grid,
    Outliers,
    Rotation,
    ScaleCoding,
    ScaleFormat,
    Scheme,
    TensorSpec,
    Trellis,
    Zero,
)
from lowbit.grids import empty_parts
from lowbit.parts import outlier_count, part_specs
from lowbit.testing import strategies

U8, I8, I16, I32 = torch.uint8, torch.int8, torch.int16, torch.int32
F16, BF16, F32, E4M3 = torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn


def specs(scheme, shape):
    return {name: (spec.dtype, spec.shape) for name, spec in part_specs(scheme, shape).items()}


CASES = {
    "symmetric, ragged last group": (
        Scheme(Grid.AFFINE, 4, 32),
        (5, 100),
        {"codes": (U8, (5, 100)), "scales": (F16, (5, 4))},
    ),
    "integer zeros, per channel, bfloat16": (
        Scheme(Grid.AFFINE, 8, None, Zero.INTEGER, ScaleFormat("bfloat16")),
        (3, 8),
        {"codes": (U8, (3, 8)), "scales": (BF16, (3, 1)), "zeros": (I16, (3, 1))},
    ),
    "float zeros": (
        Scheme(Grid.AFFINE, 2, 4, Zero.FLOAT),
        (3, 8),
        {"codes": (U8, (3, 8)), "scales": (F16, (3, 2)), "zeros": (F16, (3, 2))},
    ),
    "K-quant Q4_K": (
        Scheme(Grid.AFFINE, 4, 32, Zero.MINIMUM, ScaleFormat(bits=6, super_group=8)),
        (2, 512),
        {
            "codes": (U8, (2, 512)),
            "scales": (U8, (2, 16)),
            "super_scales": (F16, (2, 2)),
            "minimums": (U8, (2, 16)),
            "super_minimums": (F16, (2, 2)),
        },
    ),
    "K-quant Q6_K": (
        Scheme(Grid.AFFINE, 6, 16, scales=ScaleFormat(bits=8, super_group=16, signed=True)),
        (2, 512),
        {"codes": (U8, (2, 512)), "scales": (I8, (2, 32)), "super_scales": (F16, (2, 2))},
    ),
    "SpQR": (
        Scheme(
            Grid.AFFINE,
            3,
            16,
            Zero.FLOAT,
            ScaleFormat(bits=3, super_group=16, across=Across.ROWS, coding=ScaleCoding.AFFINE),
            outliers=Outliers(0.01),
        ),
        (40, 64),
        {
            "codes": (U8, (40, 64)),
            "scales": (U8, (40, 4)),
            "super_scales": (F16, (3, 4)),
            "super_scales_zeros": (F16, (3, 4)),
            "zeros": (U8, (40, 4)),
            "super_zeros": (F16, (3, 4)),
            "super_zeros_zeros": (F16, (3, 4)),
            "outlier_rows": (I32, (41,)),
            "outlier_columns": (I16, (26,)),
            "outlier_values": (F16, (26,)),
        },
    ),
    "second level over the whole row, float8": (
        Scheme(Grid.AFFINE, 4, 16, scales=ScaleFormat("float8_e4m3fn", bits=4)),
        (2, 64),
        {"codes": (U8, (2, 64)), "scales": (U8, (2, 4)), "super_scales": (E4M3, (2, 1))},
    ),
    "bitsandbytes: flat groups, double quantization": (
        Scheme(Grid.CODEBOOK, 4, 64, flat=True, scales=ScaleFormat("float32", 8, 256, coding=ScaleCoding.CODEBOOK)),
        (6, 100),
        {
            "codes": (U8, (6, 100)),
            "codebook": (F32, (16, 1)),
            "scales": (U8, (1, 10)),
            "super_scales": (F32, (1, 1)),
            "scales_codebook": (F32, (256,)),
            "scales_offset": (F32, (1,)),
        },
    ),
    "vectors of 8 in 12 bits": (
        Scheme(Grid.CODEBOOK, 12, 16, vector=8),
        (4, 44),
        {"codes": (I32, (4, 6)), "codebook": (F32, (4096, 8)), "scales": (F16, (4, 3))},
    ),
    "trellis with a table, partial tiles": (
        Scheme(Grid.TRELLIS, 0, trellis=Trellis("hyb", (3, 4), step_weights=2, table_bits=9)),
        (20, 40),
        {"codes": (I16, (2, 3, 28)), "codebook": (F32, (512, 2)), "scales": (F16, (20, 1))},
    ),
    "EXL3: computed trellis, one scale, float signs": (
        Scheme(Grid.TRELLIS, 0, flat=True, trellis=Trellis("mul1", (2,)), rotation=Rotation(128, 128, dtype="float16")),
        (128, 256),
        {
            "codes": (I16, (8, 16, 32)),
            "scales": (F16, (1, 1)),
            "input_signs": (F16, (256,)),
            "output_signs": (F16, (128,)),
        },
    ),
    "binary planes with column scales": (
        Scheme(Grid.BINARY, 2, 32, binary=Binary(2, column_scales=True)),
        (4, 64),
        {"planes": (U8, (2, 4, 64)), "scales": (F16, (2, 4, 2)), "column_scales": (F16, (2, 64))},
    ),
    "DBF: double binary factorization": (
        Scheme(Grid.BINARY, 1, binary=Binary(1, BinaryForm.PRODUCT, rank=10)),
        (4, 64),
        {
            "left": (U8, (4, 10)),
            "right": (U8, (10, 64)),
            "row_scales": (F16, (4,)),
            "middle_scales": (F16, (10,)),
            "column_scales": (F16, (64,)),
        },
    ),
    "DBF at a rate: 1.5 bits for each of 4 * 64 weights make 384 signs, 5.65 for each row and column": (
        Scheme(Grid.BINARY, 1, binary=Binary(1, BinaryForm.PRODUCT, rate=1.5)),
        (4, 64),
        {
            "left": (U8, (4, 6)),
            "right": (U8, (6, 64)),
            "row_scales": (F16, (4,)),
            "middle_scales": (F16, (6,)),
            "column_scales": (F16, (64,)),
        },
    ),
    "act-order and an input rotation": (
        Scheme(Grid.AFFINE, 4, 32, permutation=True, rotation=Rotation(32)),
        (4, 64),
        {
            "codes": (U8, (4, 64)),
            "scales": (F16, (4, 2)),
            "group_index": (I32, (64,)),
            "input_signs": (I8, (64,)),
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_table(case):
    scheme, shape, expected = CASES[case]
    assert specs(scheme, shape) == expected


@pytest.mark.parametrize(("columns", "dtype"), [(2**15, torch.int16), (2**15 + 1, torch.int32)])
def test_outlier_columns_are_as_narrow_as_the_weight_allows(columns, dtype):
    scheme = Scheme(Grid.AFFINE, 4, outliers=Outliers(0.5))
    assert part_specs(scheme, (1, columns))["outlier_columns"].dtype is dtype


def test_outliers_are_counted_from_the_density():
    assert outlier_count(Scheme(Grid.AFFINE, 4, outliers=Outliers(0.01)), (30, 50)) == 15
    assert outlier_count(Scheme(Grid.AFFINE, 4), (30, 50)) == 0


@given(strategies.any_quantized())
def test_the_table_describes_every_tensor(quantized):
    found = {name: TensorSpec.of(part) for name, part in quantized.parts.items()}
    assert found == part_specs(quantized.scheme, quantized.shape)
    assert {name: TensorSpec.of(part) for name, part in empty_parts(quantized.scheme, quantized.shape).items()} == found


def test_a_spec_counts_bytes():
    assert TensorSpec(torch.float16, (3, 5)).nbytes == 30
    assert TensorSpec(torch.float8_e4m3fn, ()).nbytes == 1
    assert TensorSpec(torch.float32, (0, 5)).nbytes == 0
