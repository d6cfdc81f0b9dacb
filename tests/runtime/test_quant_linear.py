"""``QuantLinear``: state, dtypes, devices, forward and backward."""

import copy
import pickle

import pytest
import torch
from torch.nn import functional as F

from lowbit import Grid, PackedTensor, QuantLinear, ScaleFormat, Scheme
from lowbit.errors import CheckpointError, NoRouteError
from lowbit.runtime.cpu import register_cpu_kernels
from lowbit.tensors import bit_equal
from lowbit.testing import budgets, samples

SHAPE = (24, 16)
SCHEME = Scheme(Grid.AFFINE, 4, 8, scales=ScaleFormat("float16"))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def same_buffers(layer, packed):
    return all(bit_equal(layer._buffers[name], buffer) for name, buffer in packed.buffers.items())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("leading", [(), (0,), (1,), (2, 3)])
def test_forward_is_the_product_with_the_dequantized_weight(packed, registry, dtype, leading):
    layer = QuantLinear.from_packed(packed, torch.randn(SHAPE[0]), dtype=dtype, registry=registry)
    x = torch.randn(*leading, SHAPE[1]).to(dtype)
    weight = layer.dequantize(torch.float32)
    out = layer(x)
    assert out.dtype == dtype
    assert out.shape == (*leading, SHAPE[0])
    exact = x.double() @ weight.double().T + layer.bias.to(dtype).double()
    assert ((out.double() - exact).abs() <= budgets.matmul_bound(x, weight, dtype, layer.bias.to(dtype))).all()


def test_x_of_another_dtype_than_the_layers_is_served(layer):
    x = torch.randn(3, SHAPE[1])
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(layer(x.bfloat16()).float(), layer(x), atol=0.05, rtol=0.05)


def test_autocast_decides_the_dtype(layer):
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(3, SHAPE[1])).dtype == torch.bfloat16


def test_backward_goes_through_the_packed_weight(layer):
    x = torch.randn(4, 5, SHAPE[1], requires_grad=True)
    layer.bias.requires_grad_()
    dense = layer.dequantize()
    y = x.detach().clone().requires_grad_()
    bias = layer.bias.detach().clone().requires_grad_()
    slope = torch.randn(4, 5, SHAPE[0])
    layer(x).backward(slope)
    F.linear(y, dense, bias).backward(slope)
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(layer.bias.grad, bias.grad)


def test_gradients_agree_with_finite_differences(packed, registry):
    layer = QuantLinear.from_packed(packed, dtype=torch.float64, registry=registry)
    x = torch.randn(2, SHAPE[1], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)
    operands, number = layer._operands(), layer._binding
    assert torch.autograd.gradcheck(lambda x: torch.ops.lowbit.linear(x, operands, number, None), x)


def test_only_without_checkpointing_the_weight_is_kept_for_the_backward_pass(packed, registry):
    def kept(layer):
        sizes = []

        def note(tensor):
            sizes.append(tensor.numel() * tensor.is_floating_point())
            return tensor

        x = torch.randn(2, SHAPE[1], requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            out = layer(x)
        out.sum().backward()
        return max(sizes), x.grad

    again, first = kept(QuantLinear.from_packed(packed, registry=registry))
    once, second = kept(QuantLinear.from_packed(packed, registry=registry, checkpoint=False))
    assert again < SHAPE[0] * SHAPE[1] <= once
    torch.testing.assert_close(first.expand(2, -1), second.expand(2, -1))


def test_a_cached_weight_serves_long_inputs(packed, registry):
    layer = QuantLinear.from_packed(packed, registry=registry, cache_dequantized=True)
    x = torch.randn(3, SHAPE[1])
    expected = QuantLinear.from_packed(packed, registry=registry)(x)
    assert layer._dense is None
    torch.testing.assert_close(layer(x), expected)
    assert layer._dense.shape == SHAPE
    kept = layer._dense
    layer(x)
    assert layer._dense is kept
    assert layer.half()._dense is None


@pytest.mark.parametrize("options", [{}, {"cache_dequantized": True}])
def test_what_is_prepared_in_inference_mode_trains_later(packed, registry, options):
    register_cpu_kernels(registry)
    layer = QuantLinear(packed.spec, registry=registry, **options)
    layer._buffers.update(packed.buffers)
    x = torch.randn(3, SHAPE[1], requires_grad=True)
    with torch.inference_mode():
        layer(x)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.dequantize().sum(0).expand(3, -1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_weights_run_in_inference_mode(registry, dtype):
    """Large enough for several threads, which must share the mode."""
    register_cpu_kernels(registry)
    packed = registry.packers["parts"].pack(samples.quantized(SCHEME, (2048, 1088)))
    layer = QuantLinear.from_packed(packed, dtype=dtype, registry=registry)
    x = torch.randn(2, 1088).to(dtype)
    with torch.inference_mode():
        found = layer(x)
    assert torch.equal(found, layer(x))


def test_state_dict_round_trip_is_exact(layer, packed, registry):
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    assert set(state) == {*packed.buffers, "bias"}
    other = QuantLinear(packed.spec, True, registry=registry)
    other.load_state_dict(state)
    assert same_buffers(other, packed)
    x = torch.randn(2, SHAPE[1])
    assert torch.equal(other(x), layer(x))


def test_loading_again_prepares_again(layer, packed, registry):
    changed = dict(layer.state_dict())
    changed["qweight"] = 15 - changed["qweight"]
    before = layer(torch.ones(1, SHAPE[1]))
    layer.load_state_dict(changed)
    assert not torch.equal(layer(torch.ones(1, SHAPE[1])), before)


@pytest.mark.parametrize("name", ["qweight", "scales", "bias"])
def test_strict_loading_names_what_is_missing(layer, packed, registry, name):
    state = dict(layer.state_dict())
    del state[name]
    with pytest.raises(RuntimeError, match=name):
        QuantLinear(packed.spec, True, registry=registry).load_state_dict(state)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("scales", torch.zeros(24, 2), "scales must be torch.float16"),
        ("qweight", torch.zeros(24, 16, dtype=torch.int32), "qweight must be torch.uint8"),
        ("qweight", torch.zeros(24, 8, dtype=torch.uint8), "size mismatch for qweight"),
    ],
)
def test_buffers_that_do_not_fit_the_scheme_are_refused(layer, name, value, words):
    with pytest.raises(RuntimeError, match=words):
        layer.load_state_dict({**layer.state_dict(), name: value})


@pytest.mark.parametrize("cast", ["half", "float", "double", "bfloat16"])
def test_casting_never_touches_packed_buffers(layer, packed, cast):
    getattr(layer, cast)()
    assert same_buffers(layer, packed)
    assert (
        layer.bias.dtype
        == layer.compute_dtype
        == getattr(torch, {"half": "float16", "double": "float64"}.get(cast, cast))
    )
    layer.to(torch.float16).type(torch.float32)
    assert same_buffers(layer, packed)


def test_casting_a_whole_model_never_touches_packed_buffers(layer, packed):
    model = torch.nn.Sequential(layer, torch.nn.LayerNorm(SHAPE[0])).to(torch.bfloat16)
    assert model[1].weight.dtype == torch.bfloat16
    assert same_buffers(layer, packed)
    assert model(torch.randn(2, SHAPE[1], dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_the_kernel_follows_the_dtype(packed, registry):
    class HalfOnly(type(registry.kernels["torch-parts"])):
        priority = 5

        def __init__(self, packer):
            super().__init__(packer)
            self.name = "half-only"

        def why_not(self, problem):
            return None if problem.dtype == torch.float16 else "float16 only"

    registry.kernels.register(HalfOnly(registry.packers["parts"]))
    layer = QuantLinear.from_packed(packed, registry=registry)
    assert layer.kernel.name == "torch-parts"
    assert layer.choice.refusals == {"half-only": "float16 only"}
    assert layer.half().kernel.name == "half-only"
    assert "kernel=half-only" in repr(layer)


def test_a_layer_is_laid_out_on_meta_without_memory(packed, registry, layer):
    huge = QuantLinear(packed.spec, True, device="meta", registry=registry)
    assert all(buffer.is_meta for buffer in huge.state_dict().values())
    assert "kernel=not prepared" in repr(huge)
    huge.half()
    assert huge.compute_dtype == torch.float16
    huge.float().load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(huge(torch.ones(1, SHAPE[1])), layer(torch.ones(1, SHAPE[1])))


def test_to_empty_then_load(packed, registry, layer):
    other = QuantLinear(packed.spec, True, device="meta", registry=registry)
    other._apply(lambda tensor: torch.zeros_like(tensor, device="cpu"))
    other.load_state_dict(layer.state_dict())
    assert same_buffers(other, packed)


def test_repr_shows_shape_scheme_layout_and_kernel(layer):
    text = repr(layer)
    for part in (
        "in_features=16",
        "out_features=24",
        "affine 4-bit g8",
        "layout=parts",
        "kernel=torch-parts",
        "bias=True",
    ):
        assert part in text


def test_copies_and_pickles_run(layer):
    x = torch.randn(2, SHAPE[1])
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
        assert other.state_dict().keys() == layer.state_dict().keys()


def test_a_layout_may_call_a_buffer_weight(registry, packed):
    quantized = registry.packers["parts"].unpack(packed)
    packed = registry.packers["awkward-names"].pack(quantized)
    layer = QuantLinear.from_packed(packed, registry=registry)
    assert set(layer.state_dict()) == {"weight", "weight.absmax"}
    assert layer.weight.shape == SHAPE
    layer.half()
    assert same_buffers(layer, packed)


def test_without_a_kernel_the_plugin_is_named(packed):
    from lowbit import PackedSpec, Registry

    spec = PackedSpec("kbit-3", packed.scheme, packed.shape, packed.spec.buffers)
    with pytest.raises(NoRouteError, match="pip install lowbit-kbit"):
        QuantLinear.from_packed(PackedTensor(spec, packed.buffers), registry=Registry())


def test_released_weights_run_but_cannot_be_saved_moved_or_cast(registry, packed):
    register_cpu_kernels(registry)
    layer = QuantLinear.from_packed(packed, registry=registry)
    x = torch.randn(2, SHAPE[1])
    expected = layer(x)
    assert layer.kernel.name == "cpu-rows"
    layer.release()
    assert torch.equal(layer(x), expected)
    layer.float()
    for use in (layer.state_dict, layer.half, lambda: layer.packed, lambda: layer.load_state_dict({})):
        with pytest.raises(CheckpointError, match="keep_packed=True"):
            use()


def test_releasing_keeps_buffers_that_the_kernel_reads(layer, packed):
    layer.release()
    assert same_buffers(layer, packed)
    assert layer.state_dict().keys() == {*packed.buffers, "bias"}
