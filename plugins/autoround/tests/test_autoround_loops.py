"""The loops of C do to a weight what torch does, bit for bit: a job may go on without the compiler that it began with."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.compiled import why_not_compiled
from lowbit_autoround import loops
from lowbit_autoround.options import AutoRoundOptions
from lowbit_autoround.quantizer import AutoRoundQuantizer
from lowbit_autoround.starts import tuned_weight
from lowbit_autoround.tuned_weight import decode_all

QUANTIZER = AutoRoundQuantizer()
KINDS = {
    "symmetric": {},
    "integer": {"symmetric": False},
    "minimum": {"symmetric": False, "zero": "minimum"},
    "searched": {"scale": "search"},
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def steps(weight, options, gradients, dtype):
    """Return the decoded weights of all steps, the last V, and what the ranges learned."""
    tuned = tuned_weight(weight, QUANTIZER.scheme(options), None, options.tuning.search, 0.1)
    decoded = []
    for step, gradient in enumerate(gradients):
        out = torch.empty(weight.shape, dtype=dtype)
        tuned.decode(out)
        tuned.learn([each.clone() for each in gradient], 1 - step / len(gradients), tune_scales=True)
        decoded.append(out)
    return [*decoded, tuned._values, tuned.ranges.below, tuned.ranges.above]


@pytest.mark.skipif(why_not_compiled() is not None, reason=str(why_not_compiled()))
@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    kind=st.sampled_from(list(KINDS)),
    bits=st.integers(2, 8),
    group_size=st.sampled_from((1, 7, 16, 32, 48, 300, None)),
    rows=st.integers(1, 5),
    columns=st.integers(1, 600),
    dtype=st.sampled_from(DTYPES),
    gradients=st.integers(1, 3),
    seed=st.integers(0, 999),
)
def test_loops_and_torch_agree(kind, bits, group_size, rows, columns, dtype, gradients, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    weight[0, : columns // 2] = 0  # groups whose scale is 0
    options = AutoRoundOptions(bits, group_size, iters=3, **KINDS[kind])
    drawn = [
        [torch.randn(rows, columns, generator=generator).to(dtype) for _ in range(gradients)]
        for _ in range(options.iters)
    ]
    with pytest.MonkeyPatch.context() as patch:
        found = steps(weight, options, drawn, dtype)
        patch.setenv("LOWBIT_CC", "")
        expected = steps(weight, options, drawn, dtype)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.skipif(why_not_compiled() is not None, reason=str(why_not_compiled()))
def test_a_view_of_a_larger_tensor_is_written_and_nothing_else(monkeypatch):
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    tuned = tuned_weight(weight, QUANTIZER.scheme(AutoRoundOptions(4, 16)), None, False, 0.1)
    whole, expected = torch.full((6, 100), 7.0), torch.empty(6, 40)
    decode_all([(tuned, whole[:, 30:70])])
    monkeypatch.setenv("LOWBIT_CC", "")
    decode_all([(tuned, expected)])
    assert torch.equal(whole[:, 30:70], expected)
    assert (whole[:, :30] == 7).all()
    assert (whole[:, 70:] == 7).all()


@pytest.mark.parametrize("size", [1, 5, 16, 64, 100])
def test_sums_are_those_of_all_values(size):
    values = torch.randn(3, 4, size, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(loops.summed(values), values.double().sum(-1).float(), rtol=1e-5, atol=1e-5)
