"""Counting bits gives exact integers, and its kernel keeps the bound that its module states."""

import pytest
import torch

import lowbit
from lowbit import Binary, Grid, MatmulProblem, Scheme
from lowbit.testing import samples, weights
from lowbit_binary import popcount
from lowbit_binary.kernel import PopcountKernel, one_bit_linear
from lowbit_binary.packer import WordsPacker


@pytest.mark.parametrize("planes", [1, 8, 16])
@pytest.mark.parametrize(("columns", "size"), [(64, 64), (200, 48), (257, 128), (100, 100)])
def test_the_counts_are_the_integer_product(columns, size, planes):
    bits = torch.randint(2, (5, columns), generator=weights.generator(0)).byte()
    x = torch.randn(columns, generator=weights.generator(1))
    signs, steps = popcount.split_activations(x, size, planes)
    lengths = torch.tensor([min(size, columns - start) for start in range(0, columns, size)]).numpy()
    words = popcount.to_lanes(bits, size)
    found = popcount.sign_product(words.numpy().view("u8"), signs.numpy().view("u8"), lengths)
    top = 2**planes - 1
    for group, start in enumerate(range(0, columns, size)):
        part = x[start : start + size].double() / float(steps[group])
        integers = ((part + top) / 2).round().clamp(0, top) * 2 - top
        expected = (bits[:, start : start + size].double() * 2 - 1) @ integers
        assert found[:, group].tolist() == expected.long().tolist()


@pytest.mark.parametrize(("columns", "size"), [(64, 64), (200, 48), (1, 1), (130, 130)])
def test_lanes_come_back(columns, size):
    bits = torch.randint(2, (7, columns), generator=weights.generator(2)).byte()
    assert torch.equal(popcount.from_lanes(popcount.to_lanes(bits, size), columns, size), bits)


@pytest.mark.parametrize("planes", [6, 8, 12, 16])
def test_the_bound_on_rounded_activations_holds(planes):
    """Each activation is off by a step at most: the sum over groups of |scale| * columns * absmax / (2**planes - 1)."""
    bits = torch.randint(2, (32, 384), generator=weights.generator(3)).byte()
    scales = torch.rand(32, 3, generator=weights.generator(4)) + 0.1
    x = torch.randn(384, generator=weights.generator(5))
    found = one_bit_linear(x, popcount.to_lanes(bits, 128), scales, 128, planes)
    weight = (bits.double() * 2 - 1) * scales.repeat_interleave(128, 1)
    bound = (scales.double() * 128 * x.view(3, 128).abs().amax(1) / (2**planes - 1)).sum(1)
    rounding = 1e-6 * (weight.abs() @ x.double().abs())
    error = (found.double() - weight @ x.double()).abs()
    assert (error <= bound + rounding).all()
    if planes == 6:  # the bound is not empty: the error is a good part of it
        assert float((error / bound).max()) > 0.02


def test_two_layers_are_added():
    scheme = Scheme(Grid.BINARY, 2, 64, binary=Binary(2))
    packed = WordsPacker().pack(samples.quantized(scheme, (48, 128)))
    kernel = PopcountKernel()
    prepared = kernel.prepare(packed)
    x = torch.randn(128, generator=weights.generator(6)).half()
    layers = [
        one_bit_linear(x.float(), words, scales.float(), 64, 16)
        for words, scales in zip(prepared.buffers["planes"], prepared.buffers["scales"], strict=True)
    ]
    assert torch.equal(kernel.matmul(x, prepared), (layers[0] + layers[1]).half())


def test_zeros_give_zeros():
    scheme = Scheme(Grid.BINARY, 2, 64, binary=Binary(2))
    prepared = PopcountKernel().prepare(WordsPacker().pack(samples.quantized(scheme, (48, 128))))
    assert not PopcountKernel().matmul(torch.zeros(2, 128).half(), prepared).any()


def test_it_is_chosen_for_half_precision_on_a_cpu_and_says_why_not_elsewhere(monkeypatch):
    registry, scheme = lowbit.installed(), Scheme(Grid.BINARY, 2, 128, binary=Binary(2))
    assert registry.route(scheme, (64, 256), "native").packer.layout == "binary-words"
    problem = MatmulProblem("binary-words", scheme, (64, 256), torch.bfloat16)
    assert registry.kernel_for(problem).name == "binary-popcount"
    exact = MatmulProblem("binary-words", scheme, (64, 256), torch.float32)
    assert registry.kernel_for(exact).name == "torch-binary-words"
    assert "too coarse" in PopcountKernel().why_not(exact)
    monkeypatch.setattr("lowbit_binary.kernel.available", lambda: False)
    assert "numpy>=2" in PopcountKernel().why_not(problem)
