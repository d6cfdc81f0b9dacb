"""``torch.ops.lowbit``: what torch asks of an operator, and compiled layers without a graph break."""

import pytest
import torch

from lowbit import QuantLinear
from lowbit.runtime import ops

SHAPE = (24, 16)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("differentiated", [False, True])
def test_opcheck_linear(layer, with_bias, differentiated):
    x = torch.randn(3, SHAPE[1], requires_grad=differentiated)
    bias = torch.randn(SHAPE[0], requires_grad=differentiated) if with_bias else None
    torch.library.opcheck(torch.ops.lowbit.linear.default, (x, layer._operands(), layer._binding, bias))


def test_opcheck_dequantize(layer):
    torch.library.opcheck(torch.ops.lowbit.dequantize.default, (layer._operands(), layer._binding, torch.float16))


def test_equal_kernels_and_specs_share_a_number(layer, packed, registry):
    other = QuantLinear.from_packed(packed, registry=registry)
    assert other._binding == layer._binding
    assert ops.binding(layer._binding).kernel is layer.kernel


@pytest.mark.parametrize("differentiated", [False, True])
def test_compiled_without_graph_break(layer, packed, registry, differentiated):
    """backend aot_eager traces forward and backward without a C++ compiler."""
    model = torch.nn.Sequential(layer, torch.nn.ReLU(), torch.nn.Linear(SHAPE[0], 2))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for rows in (1, 5):
        x = torch.randn(rows, SHAPE[1], requires_grad=differentiated)
        expected = model(x)
        torch.testing.assert_close(compiled(x), expected)
        if differentiated:
            gradient = torch.autograd.grad(expected.sum(), x)[0]
            torch.testing.assert_close(torch.autograd.grad(compiled(x).sum(), x)[0], gradient)


def test_compiling_a_layer_that_is_not_prepared_says_what_to_do(packed, registry):
    x = torch.randn(2, SHAPE[1])
    with pytest.raises(torch._dynamo.exc.Unsupported, match="prepare=True"):
        torch.compile(QuantLinear.holding(packed, registry=registry), fullgraph=True, backend="eager")(x)
    layer = QuantLinear.holding(packed, registry=registry)
    found = torch.compile(layer, backend="eager")(x)  # a graph break, and the layer prepares itself
    assert torch.equal(found, layer(x))


def test_equal_layers_share_compiled_code(packed, registry):
    square = torch.nn.Linear(SHAPE[0], SHAPE[1])
    count = torch._dynamo.testing.CompileCounter()

    @torch.compile(backend=count, fullgraph=True)
    def run(x, buffers, number):
        return square(torch.ops.lowbit.linear(x, buffers, number, None))

    with torch.no_grad():
        for _ in range(3):
            layer = QuantLinear.from_packed(packed, registry=registry)
            run(torch.ones(2, SHAPE[1]), layer._operands(), layer._binding)
    assert count.frame_count == 1
