"""``PackedParameter``: a packed weight in the place of a tensor."""

import copy

import pytest
import torch
from torch.nn import functional as F

from lowbit import PackedParameter
from lowbit.errors import LowbitError

SHAPE = (24, 16)


@pytest.fixture
def parameter(packed, registry):
    return PackedParameter(packed, registry.kernels["torch-parts"])


def test_it_looks_like_the_weight(parameter):
    assert isinstance(parameter, torch.nn.Parameter)
    assert (parameter.shape, parameter.dtype, parameter.device.type) == (SHAPE, torch.float32, "cpu")
    assert parameter.numel() == SHAPE[0] * SHAPE[1]
    assert parameter.is_floating_point()
    assert not parameter.requires_grad
    assert "24x16, affine 4-bit g8, parts, torch-parts" in repr(parameter)


def test_a_plain_linear_runs_packed(parameter):
    linear = torch.nn.Linear(SHAPE[1], SHAPE[0])
    linear.weight = parameter
    x = torch.randn(2, 3, SHAPE[1], requires_grad=True)
    expected = F.linear(x, parameter.dequantize(), linear.bias)
    torch.testing.assert_close(linear(x), expected)
    slope = torch.randn(2, 3, SHAPE[0])
    torch.testing.assert_close(torch.autograd.grad(linear(x), x, slope)[0], torch.autograd.grad(expected, x, slope)[0])
    assert dict(linear.named_parameters())["weight"] is parameter


def test_x_of_another_dtype_is_served(parameter):
    assert F.linear(torch.ones(1, SHAPE[1]).half(), parameter).dtype == torch.float16


def test_copies_share_the_bits(parameter):
    assert copy.deepcopy(parameter) is parameter
    assert parameter.detach() is parameter


@pytest.mark.parametrize(
    "use",
    [
        lambda p: p + 1,
        lambda p: p.add_(1),
        lambda p: p.data,
        lambda p: p[0],
        lambda p: p.to(torch.float16),
        lambda p: p.tolist(),
        lambda p: torch.nn.init.zeros_(p),
        lambda p: F.linear(p, torch.ones(4, 16)),
        lambda p: setattr(p, "data", torch.zeros(SHAPE)),
        lambda p: p.__reduce_ex__(4),
        lambda p: torch.ops.aten.mul.Tensor(p, 2),
    ],
)
def test_everything_else_is_refused_in_a_sentence(parameter, use):
    with pytest.raises(LowbitError, match="packed weight"):
        use(parameter)
