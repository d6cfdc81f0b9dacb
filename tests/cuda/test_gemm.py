"""GEMM and dequantize on a GPU: the products against float64, the weight against its definition bit for bit."""

import pytest
import torch
from unit_problems import BF16, FLOAT, HALF, WEIGHTS, assert_close, problem

from lowbit_cuda.gemm import Dequantizer, Gemm, GemmShape

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


@pytest.mark.parametrize("number", range(len(WEIGHTS)))
def test_gemm_equals_float64(number):
    columns, rows = WEIGHTS[number][-2:]
    given = problem(*WEIGHTS[number])
    for tokens, dtype in ((9, HALF), (17, BF16), (33, HALF), (64, HALF), (64, BF16)):
        x = torch.randn(tokens, columns, device="cuda").to(dtype)
        bias = torch.randn(rows, device="cuda").to(dtype)
        shape = GemmShape(given.format, columns, rows, tokens, dtype)
        if shape.why_not(torch.cuda.get_device_capability()):
            assert (
                given.format.nbytes > 2500 or given.format.decoder.table_bytes > 9000
            )  # torch multiplies by the dense weight
            continue
        gemm, arrived = Gemm(shape), torch.zeros(shape.row_blocks, dtype=torch.int32, device="cuda")
        out, again = torch.full((2, tokens, rows), float("nan"), device="cuda", dtype=dtype)
        gemm(given.units, x, out, arrived, bias, **given.options())
        assert_close(out, x, given.weight, bias)
        assert not arrived.any()
        gemm(given.units, x, again, arrived, bias, **given.options())
        assert torch.equal(out, again)


@pytest.mark.parametrize("dtype", [HALF, BF16, FLOAT])
@pytest.mark.parametrize("number", range(len(WEIGHTS)))
def test_dequantize_gives_the_same_bits(number, dtype):
    given = problem(*WEIGHTS[number])
    out = torch.full(given.weight.shape, float("nan"), device="cuda", dtype=dtype)
    Dequantizer(given.format, dtype)(given.units, out, **given.options())
    assert torch.equal(out, given.weight.to(dtype))


def test_dequantize_of_ragged_rows():
    from lowbit_cuda.decoder import AFFINE

    given = problem(AFFINE[3], 64, HALF, "ZEROS", 333, 21)
    out = torch.empty(given.weight.shape, device="cuda", dtype=HALF)
    Dequantizer(given.format, HALF)(given.units, out, **given.options())
    assert torch.equal(out, given.weight.half())
