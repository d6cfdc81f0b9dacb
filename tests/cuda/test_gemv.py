"""GEMV on a GPU against float64: ``make test-gpu``."""

import pytest
import torch

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

from lowbit_cuda.gemv import Gemv, GemvShape
from lowbit_cuda.units import pack_units

CASES = [
    (4, 128, False, 4096, 1024, 1, torch.float16),
    (4, 128, True, 4096, 1000, 3, torch.float16),
    (4, 32, True, 1088, 720, 8, torch.bfloat16),
    (3, 128, False, 4096, 1024, 7, torch.float16),
    (3, 64, True, 8192, 250, 1, torch.bfloat16),
    (2, 128, False, 8192, 1024, 8, torch.float16),
    (1, 128, False, 4096, 512, 1, torch.float16),
    (8, 64, True, 2048, 512, 2, torch.float16),
]


@pytest.mark.parametrize("dependent", [False, True])
@pytest.mark.parametrize(("bits", "group", "zeros", "columns", "rows", "tokens", "dtype"), CASES)
def test_gemv_equals_float64(bits, group, zeros, columns, rows, tokens, dtype, dependent):
    generator = torch.Generator("cuda").manual_seed(bits * rows)
    codes = torch.randint(2**bits, (rows, columns), dtype=torch.uint8, device="cuda", generator=generator)
    groups = -(-columns // group)
    scales = torch.randn(rows, groups, device="cuda", generator=generator).mul(0.01).half()
    own = torch.randint(2**bits, (rows, groups), device="cuda", generator=generator).half() if zeros else None
    x = torch.randn(tokens, columns, device="cuda", generator=generator).to(dtype)
    bias = torch.randn(rows, device="cuda", generator=generator).to(dtype)
    middle = float(2 ** (bits - 1))
    zero = own if own is not None else torch.full_like(scales, middle)
    spread = lambda values: values.double().repeat_interleave(group, 1)[:, :columns]
    weight = (codes.double() - spread(zero)) * spread(scales)
    expected = x.double() @ weight.T + bias.double()
    # fp32 accumulation of `columns` products, fp16 rounding of scaled x (bf16: steps of 2^-18), one rounding of the output
    eps = torch.finfo(dtype).eps
    bound = (
        columns * 2.0**-24 * (x.double().abs() @ weight.abs().T) + eps * expected.abs() + 2.0**-18 * weight.abs().sum(1)
    )

    gemv = Gemv(GemvShape(bits, group, zeros, columns, rows, tokens, dtype, dependent))
    out = torch.full((tokens, rows), float("nan"), device="cuda", dtype=dtype)
    units = pack_units(codes, scales, own, bits, group)
    gemv(units, x, out, bias, zero=middle)
    assert bool(((out.double() - expected).abs() <= bound).all())
    again = torch.empty_like(out)
    gemv(units, x, again, bias, zero=middle)
    assert torch.equal(out, again)
