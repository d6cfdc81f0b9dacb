"""``cpu-int4``: torch's int4 weight-only product for affine codes of up to 8 bits and bfloat16 activations."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.grids import decode_scales
from lowbit.interfaces import MatmulProblem
from lowbit.parts import TensorSpec
from lowbit.runtime import int4_order
from lowbit.runtime.unpacked import UnpackedKernel, matmul_rows
from lowbit.scheme import Across, Grid, Scheme, Zero
from lowbit.tensors import PackedTensor, QuantizedTensor

GROUPS = (256, 128, 64, 32)
"""Group sizes that the product knows."""
MOST_ROWS = 256
"""Rows of x from which decoding W once is faster."""
_SCALES = "scales_and_zeros"


class Int4Kernel(UnpackedKernel):
    """``w = (q - 8) * s + z`` with s and z in bfloat16: torch's own meaning, in which every affine grid can be said.

    Codes above 4 bits become two planes, ``q = 16 * high + low``, each a product of its own. Scales and zeros are rounded to
    bfloat16: by 2**-9 of ``|q - 8| s + |z|``, as much as rounding a symmetric weight itself would do. Long prompts (more than
    ``MOST_ROWS`` rows) are multiplied by the decoded weight instead.

    Only bfloat16 is vectorized in torch's CPU kernel (measured 2026-11, torch 2.13, AVX2, 2048x2048, one row: 0.3 ms in
    bfloat16, 16 ms in float16, 25 ms in float32), so other dtypes are refused.
    """

    name = "cpu-int4"
    priority = 20
    prepared_layout = "cpu-int4"

    def why_not_unpacked(self, problem: MatmulProblem) -> str | None:
        """Refuse other dtypes, other grids, add-ons, and shapes that torch's product does not know."""
        scheme, (rows, columns) = problem.scheme, problem.shape
        if problem.dtype != torch.bfloat16:
            return f"torch's int4 product is fast in bfloat16 only, not in {str(problem.dtype).removeprefix('torch.')}"
        if scheme.grid is not Grid.AFFINE:
            return f"multiplies by affine codes, not by a {scheme.grid.value} grid"
        if scheme.flat or scheme.permutation or scheme.rotation or scheme.outliers or _across_rows(scheme):
            return f"takes groups of neighbours and no add-ons, not {scheme.summary()}"
        if rows % 16 or group_size(scheme, columns) is None:
            return (
                f"needs out_features in multiples of 16 and groups in multiples of 32 that divide in_features, "
                f"not {rows}x{columns} in groups of {scheme.group_size or columns}"
            )
        if int4_order.orders(rows) is None:
            return f"this torch ({torch.__version__}) arranges int4 weights in an order that lowbit does not know"
        return None

    def code_specs(self, scheme: Scheme, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        """Nibbles and bfloat16 scales for each plane; buffers of their own, because taking a slice at each product costs 3 us."""
        size = group_size(scheme, shape[1])
        assert size is not None
        nibbles = TensorSpec(torch.uint8, (shape[0], shape[1] // 2))
        scales = TensorSpec(torch.bfloat16, (shape[1] // size, shape[0], 2))
        return {
            f"{name}{plane}": spec
            for plane in _planes(scheme)
            for name, spec in (("nibbles", nibbles), (_SCALES, scales))
        }

    def arrange(self, quantized: QuantizedTensor) -> dict[str, Tensor]:
        """Pack the planes, and say scales and zeros in torch's way."""
        codes = quantized.parts["codes"] + shift(quantized.scheme)
        planes = [codes] if len(_planes(quantized.scheme)) == 1 else [codes >> 4, codes & 0xF]
        arranged = {f"nibbles{number}": int4_order.pack(plane) for number, plane in enumerate(planes)}
        return arranged | {f"{_SCALES}{number}": scales for number, scales in enumerate(_scales_and_zeros(quantized))}

    def codes(self, prepared: PackedTensor) -> Tensor:
        """Read the planes back."""
        nibbles = [prepared.buffers[f"nibbles{plane}"] for plane in _planes(prepared.scheme)]
        planes = [int4_order.unpack(plane, *prepared.shape) for plane in nibbles]
        codes = planes[0] if len(planes) == 1 else planes[0] << 4 | planes[1]
        return codes - shift(prepared.scheme)

    def matmul(self, x: Tensor, packed: PackedTensor, bias: Tensor | None = None) -> Tensor:
        """Add the products of the planes; float32 sums inside torch, each product rounded once to bfloat16."""
        prepared = self.prepare(packed)
        rows, columns = prepared.shape
        flat = x.reshape(-1, columns)
        if flat.shape[0] > MOST_ROWS or x.dtype != torch.bfloat16:
            return matmul_rows(x, self.unpacked(prepared), bias)
        buffers, flat = prepared.buffers, flat.contiguous()
        size = columns // buffers[f"{_SCALES}0"].shape[0]
        product = _product(flat, buffers["nibbles0"], size, buffers[f"{_SCALES}0"])
        if "nibbles1" in buffers:
            product = product.float()
            product += _product(flat, buffers["nibbles1"], size, buffers[f"{_SCALES}1"])
        if bias is not None:
            product = product + bias
        return product.to(x.dtype).reshape(*x.shape[:-1], rows)


def _product(x: Tensor, nibbles: Tensor, size: int, scales: Tensor) -> Tensor:
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x, nibbles, size, scales)  # type: ignore[no-any-return]


def _planes(scheme: Scheme) -> range:
    return range(1 if scheme.bits <= 4 else 2)


def group_size(scheme: Scheme, columns: int) -> int | None:
    """Return the largest group that torch knows and that lies inside the scheme's groups; None if there is none."""
    length = scheme.group_size or columns
    return next((size for size in GROUPS if length % size == 0 and columns % size == 0), None)


def _across_rows(scheme: Scheme) -> bool:
    return scheme.scales.two_level and scheme.scales.across is Across.ROWS


def shift(scheme: Scheme) -> int:
    """Return what is added to codes so that their middle is torch's: 8, or 128 with two planes. Then zeros are small."""
    return (8 if scheme.bits <= 4 else 128) - scheme.midpoint


def _scales_and_zeros(quantized: QuantizedTensor) -> Tensor:
    """Return bfloat16 (planes, groups, out, 2): for each plane the s and z of ``(code - 8) * s + z``.

    With c the scheme's zero, h its midpoint and codes shifted by ``shift``:
        one plane    w = (q - 8) s + Z           Z = (h - c) s, or h s + m
        two planes   w = 16 s (high - 8)  +  s (low - 8) + Z + 8 s

    The scale is rounded first, so that scale and zero agree: what is left of the rounding is relative.
    """
    scheme, columns = quantized.scheme, quantized.shape[1]
    scales = decode_scales(quantized).bfloat16().float()
    if scheme.zero is Zero.MINIMUM:
        zeros = scheme.midpoint * scales + decode_scales(quantized, "minimums")
    elif scheme.zero is Zero.SYMMETRIC:
        zeros = torch.zeros_like(scales)
    elif scheme.zero is Zero.INTEGER:
        zeros = (scheme.midpoint - quantized.parts["zeros"].float()) * scales
    else:
        zeros = (scheme.midpoint - decode_scales(quantized, "zeros")) * scales
    low, high = (scales, zeros + 8 * scales), (16 * scales, torch.zeros_like(scales))
    planes = [(scales, zeros)] if len(_planes(scheme)) == 1 else [high, low]
    size = group_size(scheme, columns)
    assert size is not None
    group = (
        torch.arange(columns // size) * size // (scheme.group_size or columns)
    )  # the scheme's group of each of torch's
    stacked = torch.stack([torch.stack(pair, dim=-1) for pair in planes])  # (planes, out, groups, 2)
    return stacked[:, :, group].transpose(1, 2).bfloat16().contiguous()
