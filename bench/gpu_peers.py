"""Other people's low-bit products, each by the way its own documentation shows, on random weights: what ours are compared with.

A peer that is not installed, or does not run here, gives a sentence instead of calls. Versions go into the record.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import torch
from gpu_products import copies

Calls = list[Callable[[], object]]
GROUP = 128
FAILURES = (ImportError, RuntimeError, ValueError, TypeError, AssertionError, OSError, LookupError, AttributeError)
"""What a peer may raise when it does not run here: that is its result, then."""


def _copied(make: Callable[[], tuple[Callable[[], object], int]]) -> Calls:
    """Return as many calls, each with a weight of its own, as make L2 cold; ``make`` returns one and the bytes of its weight."""
    first, nbytes = make()
    return [first, *(make()[0] for _ in range(copies(nbytes) - 1))]


def cublas(dtype: torch.dtype, columns: int, rows: int, tokens: int) -> Calls:
    """Return torch's dense product."""
    x = torch.randn(tokens, columns, device="cuda", dtype=dtype)

    def make():
        weight = torch.randn(rows, columns, device="cuda", dtype=dtype)
        return partial(torch.nn.functional.linear, x, weight), weight.nbytes

    return _copied(make)


def torch_int4(columns: int, rows: int, tokens: int) -> Calls:
    """Return torch's int4 product: bf16, groups of 128 with scales and zeros."""
    x = torch.randn(tokens, columns, device="cuda").bfloat16()

    def make():
        codes = torch.randint(256, (rows, columns // 2), dtype=torch.uint8, device="cuda")
        weight = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
        scales = torch.rand(columns // GROUP, rows, 2, device="cuda").bfloat16()
        return partial(torch.ops.aten._weight_int4pack_mm, x, weight, GROUP, scales), weight.nbytes

    return _copied(make)


def _bitsandbytes(columns: int, rows: int):
    from bitsandbytes.functional import quantize_4bit

    return quantize_4bit(torch.randn(rows, columns, device="cuda").half(), blocksize=64, quant_type="nf4")


def bitsandbytes_nf4(columns: int, rows: int, tokens: int) -> Calls:
    """Return bitsandbytes' product of NF4 in blocks of 64."""
    from bitsandbytes import matmul_4bit

    x = torch.randn(tokens, columns, device="cuda").half()

    def make():
        codes, state = _bitsandbytes(columns, rows)
        return partial(matmul_4bit, x, codes, state), codes.nbytes

    return _copied(make)


def bitsandbytes_dequantize(columns: int, rows: int) -> Calls:
    """Return bitsandbytes' way from NF4 to fp16."""
    from bitsandbytes.functional import dequantize_4bit

    def make():
        codes, state = _bitsandbytes(columns, rows)
        out = torch.empty(rows, columns, device="cuda", dtype=torch.float16)
        return partial(dequantize_4bit, codes, state, out=out), codes.nbytes + out.nbytes

    return _copied(make)


def humming(bits: int, columns: int, rows: int, tokens: int) -> Calls:
    """Return humming-kernels' product: unsigned integers, groups of 128."""
    from humming.layer import HummingLayer

    x = torch.randn(tokens, columns, device="cuda").half()
    layer = HummingLayer(
        rows,
        columns,
        {"dtype": f"uint{bits}", "group_size": GROUP, "scale_dtype": "float16"},
        torch_dtype=torch.float16,
    ).cuda()
    layer.load_from_unquantized(torch.randn(rows, columns, device="cuda").half())
    layer.transform()

    def make():
        each = copy.deepcopy(layer)
        return partial(each, x), sum(parameter.nbytes for parameter in each.parameters())

    return _copied(make)


def gemlite(bits: int, columns: int, rows: int, tokens: int) -> Calls:
    """Return gemlite's product: unsigned integers with scales and zeros, groups of 128; it tunes itself at the first call."""
    from gemlite.helper import A16Wn

    x = torch.randn(tokens, columns, device="cuda").half()

    def make():
        codes = torch.randint(2**bits, (rows, columns), dtype=torch.uint8, device="cuda")
        scales = torch.rand(rows * columns // GROUP, 1, device="cuda").half()
        layer = A16Wn(device="cuda:0", dtype=torch.float16).from_weights(
            codes, scales, torch.full_like(scales, 2.0 ** (bits - 1)), bits, GROUP
        )
        return partial(layer, x), rows * columns * bits // 8

    return _copied(make)


PRODUCTS: dict[str, Callable[[int, int, int], Calls]] = {
    "cuBLAS fp16": partial(cublas, torch.float16),
    "cuBLAS bf16": partial(cublas, torch.bfloat16),
    "torch int4 bf16": torch_int4,
    "bitsandbytes nf4 g64": bitsandbytes_nf4,
    **{f"humming {bits}-bit": partial(humming, bits) for bits in (4, 3, 2, 1)},
    **{f"gemlite {bits}-bit": partial(gemlite, bits) for bits in (4, 2)},
}
"""(columns, rows, tokens) to calls, one for each copy of the weight."""


def versions() -> dict[str, str]:
    """Return the versions of the peers that are there."""
    return {name: _version(name) for name in ("torch", "triton", "bitsandbytes", "humming-kernels", "gemlite")}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
