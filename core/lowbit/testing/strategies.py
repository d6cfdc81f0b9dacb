"""Hypothesis strategies: schemes from the whole vocabulary, shapes that fit them, and quantized tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

from lowbit.scheme import (
    FLOAT_DTYPES,
    Across,
    Binary,
    BinaryForm,
    Grid,
    Outliers,
    Rotation,
    ScaleCoding,
    ScaleFormat,
    Scheme,
    Trellis,
    Zero,
)
from lowbit.tensors import QuantizedTensor
from lowbit.testing import samples

GROUP_SIZES = (None, 1, 2, 3, 4, 8, 16, 32, 50, 64, 128)
PLAIN_DTYPES = FLOAT_DTYPES[:3]


def quantized(scheme: Scheme, shape: tuple[int, int]) -> st.SearchStrategy[QuantizedTensor]:
    """Draw valid tensors of one scheme and shape: seeds, and every way of filling floats and integers."""
    return st.builds(
        samples.quantized,
        st.just(scheme),
        st.just(shape),
        seed=st.integers(0, 2**16),
        floats=st.sampled_from(samples.FLOAT_FILLS),
        integers=st.sampled_from(samples.INTEGER_FILLS),
    )


@st.composite
def schemes(draw: st.DrawFn, grids: Sequence[Grid] = tuple(Grid), addons: bool = True) -> Scheme:
    """Draw a scheme of the vocabulary; codebooks and trellis tables stay small."""
    grid = draw(st.sampled_from(grids))
    fields = draw(
        {Grid.AFFINE: _affine, Grid.CODEBOOK: _codebook, Grid.TRELLIS: _trellis, Grid.BINARY: _binary}[grid]()
    )
    if addons:
        fields |= draw(_addons())
    grouped = not (fields.get("binary") and fields["binary"].form is BinaryForm.PRODUCT)
    fields["permutation"] = (
        addons and grouped and not fields.get("flat") and fields.get("vector", 1) == 1 and draw(st.booleans())
    )
    return Scheme(grid, **fields)


@st.composite
def shapes(draw: st.DrawFn, scheme: Scheme, largest: int = 64) -> tuple[int, int]:
    """Draw a shape (out, in) that the scheme's rotation divides; the last group may be short."""
    rotation = scheme.rotation
    blocks = (rotation.out_block or 1, rotation.in_block or 1) if rotation else (1, 1)
    rows, columns = (block * draw(st.integers(1, max(1, largest // block))) for block in blocks)
    return rows, columns


@st.composite
def any_quantized(draw: st.DrawFn, grids: Sequence[Grid] = tuple(Grid), addons: bool = True) -> QuantizedTensor:
    """Draw a scheme, a shape and a tensor."""
    scheme = draw(schemes(grids, addons))
    return draw(quantized(scheme, draw(shapes(scheme))))


@st.composite
def scale_formats(draw: st.DrawFn) -> ScaleFormat:
    """Draw one-level and two-level scales."""
    dtype = draw(st.sampled_from(FLOAT_DTYPES))
    if draw(st.booleans()):
        return ScaleFormat(dtype)
    return ScaleFormat(
        dtype,
        bits=draw(st.integers(1, 8)),
        super_group=draw(st.sampled_from((None, 1, 4, 8, 16))),
        across=draw(st.sampled_from(Across)),
        coding=(coding := draw(st.sampled_from(ScaleCoding))),
        signed=coding is not ScaleCoding.CODEBOOK and draw(st.booleans()),  # a codebook is indexed
    )


@st.composite
def trellises(draw: st.DrawFn) -> Trellis:
    """Draw every trellis code, with whole and fractional rates."""
    code = draw(st.sampled_from(Trellis.CODES))
    tile = draw(st.sampled_from(((4, 4), (8, 16), (16, 16))))
    state_bits = 16 if code == "hyb" else draw(st.integers(4, 8 if code == "lut" else 16))
    table_bits = {"hyb": draw(st.integers(1, 9)), "lut": state_bits}.get(code, 0)
    step_weights = {"hyb": 2, "lut": draw(st.sampled_from((1, 2)))}.get(code, 1)
    steps = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    order = draw(st.sampled_from(Trellis.ORDERS)) if tile == (16, 16) else "rows"
    return Trellis(code, tuple(steps), state_bits, step_weights, table_bits, tile, order)


@st.composite
def _affine(draw: st.DrawFn) -> dict[str, Any]:
    bits = draw(st.integers(1, 8))
    return {
        "bits": bits,
        "group_size": draw(st.sampled_from(GROUP_SIZES)),
        "zero": draw(st.sampled_from(Zero)),
        "levels": draw(st.none() | st.integers(2, 2**bits - 1)) if bits > 1 else None,
        "scales": draw(scale_formats()),
        "flat": draw(st.booleans()),
    }


@st.composite
def _codebook(draw: st.DrawFn) -> dict[str, Any]:
    vector = draw(st.sampled_from((1, 2, 4)))
    sizes = [size for size in GROUP_SIZES if size is None or size % vector == 0]
    return {
        "bits": draw(st.integers(1, 10)),
        "group_size": draw(st.sampled_from(sizes)),
        "scales": draw(scale_formats()),
        "flat": vector == 1 and draw(st.booleans()),
        "vector": vector,
    }


@st.composite
def _trellis(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "bits": 0,
        "group_size": draw(st.sampled_from(GROUP_SIZES)),
        "scales": draw(scale_formats()),
        "flat": draw(st.booleans()),
        "trellis": draw(trellises()),
    }


@st.composite
def _binary(draw: st.DrawFn) -> dict[str, Any]:
    planes, scales = draw(st.integers(1, 3)), ScaleFormat(draw(st.sampled_from(PLAIN_DTYPES)))
    if draw(st.booleans()):
        if draw(st.booleans()):
            binary = Binary(planes, BinaryForm.PRODUCT, rank=draw(st.integers(1, 40)))
        else:
            binary = Binary(planes, BinaryForm.PRODUCT, rate=draw(st.floats(0.1, 4.0)))
        return {"bits": planes, "scales": scales, "binary": binary}
    binary = Binary(planes, column_scales=draw(st.booleans()))
    return {"bits": planes, "scales": scales, "binary": binary, "group_size": draw(st.sampled_from(GROUP_SIZES))}


@st.composite
def _addons(draw: st.DrawFn) -> dict[str, Any]:
    blocks = st.sampled_from((0, 1, 2, 8, 32))
    in_block, out_block = draw(blocks), draw(blocks)
    dtype = draw(st.sampled_from(("int8", *PLAIN_DTYPES)))
    outliers = Outliers(draw(st.sampled_from((1e-3, 0.02, 0.5))), draw(st.sampled_from(PLAIN_DTYPES)))
    return {
        "outliers": outliers if draw(st.booleans()) else None,
        "rotation": Rotation(in_block, out_block, dtype) if in_block or out_block else None,
    }
