"""``lowbit.grids`` against a second implementation: one weight at a time, in numpy scalars, from the formulas alone."""

import math
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowbit import Across, BinaryForm, Grid, Outliers, QuantizedTensor, ScaleCoding, Scheme, Zero, dequantize
from lowbit.grids import hadamard
from lowbit.tensors import bit_equal
from lowbit.testing import samples, strategies
from lowbit.trellis import decode_tiles

F32 = np.float32
FILLS = (
    "ordinary",
    "negative",
    "subnormal",
    "zeros",
)  # products of the largest floats overflow, and then order matters


def in_numpy(part):
    """Return a part as numpy has it: floats, which numpy lacks some of, as float32."""
    return part.float().numpy() if part.is_floating_point() else part.numpy()


class Slow:
    """Decodes one weight at a time."""

    def __init__(self, quantized):
        self.q, self.scheme, self.shape = quantized, quantized.scheme, quantized.shape
        self.parts = {name: in_numpy(part) for name, part in quantized.parts.items()}

    def weight(self):
        weight = {
            Grid.AFFINE: self.affine,
            Grid.CODEBOOK: self.codebook,
            Grid.TRELLIS: self.trellis,
            Grid.BINARY: self.binary,
        }[self.scheme.grid]
        out = np.array([[weight(i, j) for j in range(self.shape[1])] for i in range(self.shape[0])], dtype=F32)
        if self.scheme.rotation:
            out = self.rotate(out)
        return self.add_outliers(out) if self.scheme.outliers else out

    def group(self, i, j):
        """Return the row and the group of a weight."""
        size = self.scheme.group_size
        if self.scheme.permutation:
            return i, int(self.parts["group_index"][j])
        if self.scheme.flat:
            return 0, (i * self.shape[1] + j) // size if size else 0
        return i, j // size if size else 0

    def level(self, name, row, group):
        """Return one scale, zero or minimum, its second level applied."""
        scales, value = self.scheme.scales, self.parts[name][row, group]
        if not scales.two_level:
            return F32(value)
        place = [row, group]
        axis = 1 if scales.across is Across.GROUPS else 0
        place[axis] = place[axis] // scales.super_group if scales.super_group else 0
        outer = F32(self.parts[f"super_{name}"][tuple(place)])
        if scales.coding is ScaleCoding.CODEBOOK:
            return F32(self.parts[f"{name}_codebook"][value]) * outer + F32(self.parts[f"{name}_offset"][0])
        if scales.coding is ScaleCoding.AFFINE:
            return (F32(value) - F32(self.parts[f"super_{name}_zeros"][tuple(place)])) * outer
        return F32(value) * outer

    def affine(self, i, j):
        q, scale = F32(self.parts["codes"][i, j]), self.level("scales", *self.group(i, j))
        if self.scheme.zero is Zero.SYMMETRIC:
            return (q - F32((self.scheme.levels or 2**self.scheme.bits) // 2)) * scale
        if self.scheme.zero is Zero.INTEGER:
            return (q - F32(self.parts["zeros"][self.group(i, j)])) * scale
        if self.scheme.zero is Zero.FLOAT:
            return (q - self.level("zeros", *self.group(i, j))) * scale
        return q * scale + self.level("minimums", *self.group(i, j))

    def codebook(self, i, j):
        code = self.parts["codes"][i, j // self.scheme.vector]
        return F32(self.parts["codebook"][code, j % self.scheme.vector]) * self.level("scales", *self.group(i, j))

    def trellis(self, i, j):
        height, width = self.scheme.trellis.tile
        tile = self.tiles()[i // height, j // width]
        return F32(tile[i % height, j % width]) * self.level("scales", *self.group(i, j))

    @cache  # noqa: B019  # the instance lives for one example
    def tiles(self):
        """Return decoded tiles, which test_trellis checks on its own."""
        return decode_tiles(self.q.parts["codes"], self.scheme.trellis, self.q.parts.get("codebook")).numpy()

    def binary(self, i, j):
        parts, binary, total = self.parts, self.scheme.binary, F32(0)
        if binary.form is BinaryForm.PRODUCT:
            signs = zip(parts["left"][i], parts["right"][:, j], parts["middle_scales"], strict=True)
            total = sum(float(m) * (1 if a == b else -1) for a, b, m in signs)
            return float(parts["row_scales"][i]) * total * float(parts["column_scales"][j])
        for plane in range(binary.planes):
            row, group = self.group(i, j)
            term = F32(1 if parts["planes"][plane, i, j] else -1) * F32(parts["scales"][plane, row, group])
            total = total + (term * F32(parts["column_scales"][plane, j]) if binary.column_scales else term)
        return total

    def rotate(self, weight):
        """Return diag(u) H_out W H_in diag(v) in float64, with Hadamard matrices from their definition."""
        rotation, weight = self.scheme.rotation, weight.astype(np.float64)
        if rotation.in_block:
            signs = self.parts["input_signs"].astype(np.float64)
            weight = weight @ block_hadamard(self.shape[1], rotation.in_block) * signs
        if rotation.out_block:
            signs = self.parts["output_signs"].astype(np.float64)
            weight = signs[:, None] * (block_hadamard(self.shape[0], rotation.out_block) @ weight)
        return weight

    def add_outliers(self, weight):
        rows, columns, values = (self.parts[f"outlier_{name}"] for name in ("rows", "columns", "values"))
        added = np.zeros_like(weight)
        for i in range(self.shape[0]):
            for k in range(rows[i], rows[i + 1]):
                added[i, columns[k]] += values[k]
        return weight + added


def block_hadamard(length, block):
    """Return the block-diagonal matrix of entries (-1)**popcount(i & j) / sqrt(block)."""
    matrix = np.zeros((length, length))
    for start in range(0, length, block):
        for i in range(block):
            for j in range(block):
                matrix[start + i, start + j] = (-1) ** (i & j).bit_count() / math.sqrt(block)
    return matrix


@st.composite
def small(draw, grids, addons):
    scheme = draw(strategies.schemes(grids, addons))
    shape = draw(strategies.shapes(scheme, largest=20))
    return samples.quantized(scheme, shape, draw(st.integers(0, 999)), draw(st.sampled_from(FILLS)))


def compare(quantized):
    scheme, found = quantized.scheme, dequantize(quantized).numpy()
    with np.errstate(over="ignore", invalid="ignore"):  # two levels of the widest float dtypes may pass float32's range
        expected = Slow(quantized).weight()
    if not np.isfinite(expected).all():
        return
    if scheme.rotation or (
        scheme.binary and scheme.binary.form is BinaryForm.PRODUCT
    ):  # sums, whose order float32 rounding depends on
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * max(1e-30, float(np.abs(expected).max())))
    else:
        np.testing.assert_array_equal(found.view(np.int32), expected.view(np.int32))


@pytest.mark.parametrize("grid", Grid)
def test_every_grid_means_its_formula(grid):
    given(small((grid,), addons=False))(compare)()


@pytest.mark.parametrize("grid", Grid)
def test_add_ons_compose_with_every_grid(grid):
    given(small((grid,), addons=True))(compare)()


@pytest.mark.parametrize(("scheme", "shape"), samples.REPRESENTATIVES)
def test_representative_schemes(scheme, shape):
    compare(samples.quantized(scheme, shape, 5))


def test_large_weights_decode_in_pieces_like_whole_ones():
    scheme = Scheme(Grid.AFFINE, 4, 64, Zero.MINIMUM)
    quantized = samples.quantized(scheme, (2100, 512))
    codes, scales, minimums = (quantized.parts[name].float() for name in ("codes", "scales", "minimums"))
    expected = codes * scales.repeat_interleave(64, 1) + minimums.repeat_interleave(64, 1)
    assert bit_equal(dequantize(quantized), expected)


def test_outliers_may_share_a_place():
    scheme = Scheme(Grid.AFFINE, 4, outliers=Outliers(0.5))
    parts = dict(samples.quantized(scheme, (1, 4)).parts)
    parts |= {"outlier_columns": torch.tensor([2, 2], dtype=torch.int16), "outlier_values": torch.ones(2).half()}
    parts["codes"] = torch.full((1, 4), 8, dtype=torch.uint8)
    assert dequantize(QuantizedTensor(scheme, (1, 4), parts)).tolist() == [[0, 0, 2, 0]]


@pytest.mark.parametrize("block", [1, 2, 4, 32])
def test_hadamard_is_its_definition_and_its_own_inverse(block):
    values = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    rotated = hadamard(values, block)
    np.testing.assert_allclose(rotated.numpy(), values.double().numpy() @ block_hadamard(64, block), atol=1e-6)
    torch.testing.assert_close(hadamard(rotated, block), values)
