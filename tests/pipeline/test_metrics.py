import math

import pytest
import torch

from lowbit import Grid, QuantizedTensor, Scheme, dequantize
from lowbit.grids import empty_parts
from lowbit.metrics import ErrorSum, compare, measure


def test_equal_tensors_are_exact_whatever_their_dtype():
    weight = torch.randn(8, 8).bfloat16()
    assert compare(weight, weight.float()).exact
    assert compare(weight, weight.float()).text() == "exact"


def test_nan_agrees_with_itself_and_zeros_of_either_sign_agree():
    assert compare(torch.tensor([float("nan")]), torch.tensor([float("nan")])).exact
    assert compare(torch.tensor([0.0]), torch.tensor([-0.0])).exact


def test_the_relative_error_is_the_root_of_the_nmse():
    error = compare(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5]))
    assert (error.exact, error.max_abs) == (False, 0.5)
    assert error.relative == pytest.approx(0.1)
    assert error.text() == "0.1000"


def test_the_smallest_difference_is_not_exact():
    assert not compare(torch.tensor([1.0]), torch.tensor([1.0]).nextafter(torch.tensor([2.0]))).exact


def test_a_zero_reference_has_no_relative_error():
    assert compare(torch.zeros(2), torch.ones(2)).relative == math.inf


def test_sums_join_tensors():
    first, second = compare(torch.ones(2), torch.zeros(2)), compare(torch.ones(2), torch.ones(2))
    assert (first + second).squared == 2
    assert not (first + second).exact
    assert sum([second, second], ErrorSum()).exact


def test_measuring_by_pieces_equals_measuring_at_once():
    scheme, shape = Scheme(Grid.AFFINE, 4, 64), (1200, 1024)
    parts = empty_parts(scheme, shape)
    generator = torch.Generator().manual_seed(1)
    parts["codes"].random_(0, 16, generator=generator)
    parts["scales"].fill_(0.1)
    quantized = QuantizedTensor(scheme, shape, parts)
    weight = torch.randn(shape, generator=generator)
    pieces, whole = measure(weight, quantized), compare(weight, dequantize(quantized))
    assert pieces.max_abs == whole.max_abs
    assert pieces.relative == pytest.approx(whole.relative, rel=1e-6)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="shapes differ"):
        compare(torch.zeros(2, 3), torch.zeros(3, 2))
