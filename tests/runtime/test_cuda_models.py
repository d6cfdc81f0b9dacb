"""Packed layers and models on a GPU: moving, capturing, decoding by replay."""

import pytest
import torch

import lowbit
from lowbit import QuantLinear
from lowbit.runtime.bench import measure_layers, replayed
from lowbit.runtime.generate import stream
from lowbit.runtime.graphs import GraphedSteps, can_graph
from lowbit.tensors import bit_equal
from lowbit.testing import budgets

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
SHAPE = (24, 16)


def test_moving_prepares_again_and_keeps_the_bits(packed, registry):
    layer = QuantLinear.from_packed(packed, torch.ones(SHAPE[0]), registry=registry)
    x = torch.randn(3, SHAPE[1])
    there = layer.cuda()(x.cuda())
    assert layer.weight.device.type == "cuda"
    assert ((there.cpu() - layer.cpu()(x)).abs() <= 2 * budgets.matmul_bound(x, layer.dequantize(), x.dtype)).all()
    assert all(bit_equal(layer._buffers[name], buffer) for name, buffer in packed.buffers.items())


@pytest.mark.parametrize("through_operator", [False, True])
def test_a_layer_is_captured_and_replayed(packed, registry, through_operator):
    layer = QuantLinear.from_packed(packed, dtype=torch.float16, registry=registry).cuda()
    x = torch.randn(1, SHAPE[1], device="cuda", dtype=torch.float16)

    def run():
        if through_operator:
            return torch.ops.lowbit.linear(x, layer._operands(), layer._binding, None)
        return layer(x)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side), torch.no_grad():
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = run()
    x.copy_(torch.randn(1, SHAPE[1]))
    graph.replay()
    with torch.no_grad():
        torch.testing.assert_close(out, run())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch 2.11's own, of its compiler
def test_compiled_without_graph_break_on_cuda(packed, registry):
    layer = QuantLinear.from_packed(packed, dtype=torch.bfloat16, registry=registry).cuda()
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(2, SHAPE[1], device="cuda", dtype=torch.bfloat16)
    torch.testing.assert_close(compiled(x), layer(x))


def test_models_load_onto_a_gpu_and_decode_by_replay(llama_folder):
    model = lowbit.load(llama_folder, "cuda", torch.float32)
    assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
    assert can_graph(model)
    prompt = [5, 9, 30, 77]
    ids = torch.tensor([prompt], device="cuda")
    expected = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert list(stream(model, prompt, 12)) == expected[0, 4:].tolist()


def test_steps_are_replayed_from_the_third_on(llama_folder):
    steps = GraphedSteps(lowbit.load(llama_folder, "cuda", torch.float32), 16)
    steps.prefill(torch.tensor([[5, 9, 30]], device="cuda"))
    steps.step(1)
    steps.step(2)
    assert steps.graph is None
    first = steps.step(3).clone()
    assert steps.graph is not None
    assert not torch.equal(steps.step(4), first)


def test_layers_are_timed_by_replay(llama_folder):
    times = measure_layers(lowbit.load(llama_folder, "cuda", torch.float16), repeat=3)
    assert {(each.shape, each.count) for each in times} == {((64, 64), 4), ((32, 64), 4), ((96, 64), 4), ((64, 96), 2)}
    assert all(each.replayed and each.packed > 0 < each.dense for each in times)


def test_what_waits_for_the_gpu_is_not_captured():
    x = torch.ones(4, device="cuda")
    assert replayed([lambda: x.sum().item()]) is None
    run, count = replayed([lambda: x.add_(1), lambda: x.mul_(1)])
    before = x[0].item()
    run()
    assert count == 64
    assert x[0].item() == before + 32
