"""GEMV on a GPU: every kind of unit, split and dtype against float64, within the rounding of its parts; two runs, one result."""

import pytest
import torch
from unit_problems import BF16, HALF, WEIGHTS, assert_close, problem

from lowbit_cuda.gemv import Gemv, GemvShape

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


@pytest.mark.parametrize("dependent", [False, True])
@pytest.mark.parametrize("number", range(len(WEIGHTS)))
def test_gemv_equals_float64(number, dependent):
    columns, rows = WEIGHTS[number][-2:]
    given = problem(*WEIGHTS[number])
    for tokens, dtype in ((1, HALF), (1, BF16), (3, BF16), (8, HALF), (13, HALF), (16, BF16)):
        x = torch.randn(tokens, columns, device="cuda").to(dtype)
        bias = torch.randn(rows, device="cuda").to(dtype)
        gemv = Gemv(GemvShape(given.format, columns, rows, tokens, dtype, dependent))
        out, again = torch.full((2, tokens, rows), float("nan"), device="cuda", dtype=dtype)
        gemv(given.units, x, out, bias, **given.options())
        assert_close(out, x, given.weight, bias)
        gemv(given.units, x, again, bias, **given.options())
        assert torch.equal(out, again)


def test_rows_of_x_and_of_the_result_may_lie_apart():
    given = problem(*WEIGHTS[0])
    x, out = torch.randn(4, 5000, device="cuda").half()[:, :4096], torch.zeros(4, 2000, device="cuda").half()
    Gemv(GemvShape(given.format, 4096, 1024, 4))(given.units, x, out[:, :1024], **given.options())
    assert_close(out[:, :1024], x, given.weight, torch.zeros(1024, device="cuda"))
    assert not out[:, 1024:].any()
