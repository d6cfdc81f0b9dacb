from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowbit import Grid, Outliers, PackedSpec, PackedTensor, QuantizedTensor, Scheme, TensorSpec, Zero, dequantize
from lowbit.errors import SchemeError, WeightError
from lowbit.grids import decode_rows
from lowbit.tensors import bit_equal
from lowbit.testing import samples, strategies

SCHEME, SHAPE = Scheme(Grid.AFFINE, 4, 32, Zero.INTEGER), (4, 64)


def parts(**changes):
    return {**samples.quantized(SCHEME, SHAPE).parts, **changes}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"extra": torch.ones(1)}, r"has no 'extra'; it has codes, scales, zeros"),
        ({"scales": torch.ones(4, 2)}, r"scales must be torch.float16 \(4, 2\), got torch.float32 \(4, 2\)"),
        ({"zeros": torch.zeros(4, 3, dtype=torch.int16)}, r"zeros must be torch.int16 \(4, 2\), got .*\(4, 3\)"),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes, sentence):
    with pytest.raises(SchemeError, match=sentence):
        QuantizedTensor(SCHEME, SHAPE, parts(**changes))


def test_missing_parts_are_named():
    incomplete = parts()
    del incomplete["zeros"]
    with pytest.raises(
        SchemeError, match=r"affine 4-bit g32 asym weight of \(4, 64\) needs 'zeros'; got codes, scales"
    ):
        QuantizedTensor(SCHEME, SHAPE, incomplete)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"codes": torch.full(SHAPE, 16, dtype=torch.uint8)}, "up_proj: code 16 is out of range, .* has 16 codes"),
        ({"zeros": torch.full((4, 2), -1, dtype=torch.int16)}, "up_proj: a zero point is negative"),
        ({"scales": torch.full((4, 2), float("nan")).half()}, "up_proj: scales holds NaN or infinity"),
        ({"scales": torch.full((4, 2), float("inf")).half()}, "up_proj: scales holds NaN or infinity"),
    ],
)
def test_values_out_of_range_are_found_by_validate(changes, sentence):
    broken = QuantizedTensor(SCHEME, SHAPE, parts(**changes))
    with pytest.raises(WeightError, match=sentence):
        broken.validate("up_proj")


def test_fewer_levels_mean_fewer_codes():
    scheme = Scheme(Grid.AFFINE, 2, 32, levels=3)
    valid = samples.quantized(scheme, SHAPE, integers="highest")
    valid.validate()
    codes = torch.full_like(valid.parts["codes"], 3)
    with pytest.raises(WeightError, match="code 3 is out of range"):
        QuantizedTensor(scheme, SHAPE, {**valid.parts, "codes": codes}).validate()


@given(strategies.any_quantized(), st.data())
def test_rows_decode_like_the_whole(quantized, data):
    if not quantized.row_separable:
        with pytest.raises(AssertionError):
            quantized.rows(0, 1)
        return
    start = data.draw(st.integers(0, quantized.shape[0] - 1))
    stop = data.draw(st.integers(start + 1, quantized.shape[0]))
    assert bit_equal(dequantize(quantized.rows(start, stop)), dequantize(quantized)[start:stop])


@given(strategies.any_quantized(), st.data())
def test_decoded_rows_are_those_of_the_whole_outliers_and_all(quantized, data):
    if not quantized.dense.row_separable:
        return
    start = data.draw(st.integers(0, quantized.shape[0] - 1))
    stop = data.draw(st.integers(start + 1, quantized.shape[0]))
    assert bit_equal(decode_rows(quantized, start, stop), dequantize(quantized)[start:stop])


def test_dense_is_the_weight_without_its_outliers():
    scheme = Scheme(Grid.AFFINE, 4, 32, outliers=Outliers(0.1))
    quantized = samples.quantized(scheme, SHAPE)
    assert quantized.dense.scheme == replace(scheme, outliers=None)
    assert quantized.dense.parts.keys() == quantized.parts.keys() - {
        "outlier_rows",
        "outlier_columns",
        "outlier_values",
    }
    dense = quantized.dense
    assert dense.dense is dense
    sparse = dequantize(quantized) - dequantize(quantized.dense)
    assert int((sparse != 0).sum()) == len(quantized.parts["outlier_values"])


def test_packed_tensors_fit_their_specs():
    buffers = {"a": TensorSpec(torch.uint8, (4, 32)), "b": TensorSpec(torch.float16, (4, 2))}
    spec = PackedSpec("toy", SCHEME, SHAPE, buffers)
    assert spec.nbytes == 4 * 32 + 2 * 8
    assert spec.bits_per_weight == 8 * 144 / 256
    packed = PackedTensor(spec, {"a": torch.zeros(4, 32, dtype=torch.uint8), "b": torch.zeros(4, 2).half()})
    assert (packed.layout, packed.scheme, packed.shape) == ("toy", SCHEME, SHAPE)
    with pytest.raises(SchemeError, match=r"a toy weight of \(4, 64\) needs 'b'; got a"):
        PackedTensor(spec, {"a": packed.buffers["a"]})
    with pytest.raises(SchemeError, match=r"b must be torch.float16"):
        PackedTensor(spec, {"a": packed.buffers["a"], "b": torch.zeros(4, 2)})


def test_bit_equality_sees_what_torch_equal_does_not():
    nan = torch.tensor([float("nan"), 1.0])
    assert bit_equal(nan, nan.clone())
    assert not bit_equal(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not bit_equal(torch.zeros(2), torch.zeros(2, dtype=torch.int32))
    assert not bit_equal(torch.zeros(2), torch.zeros(1, 2))
    assert bit_equal(torch.arange(6).reshape(2, 3).T, torch.arange(6).reshape(2, 3).T.contiguous())
    assert bit_equal(torch.zeros(4, 1)[:1], torch.zeros(1, 1))
    assert bit_equal(torch.zeros(()), torch.zeros(()))
    assert bit_equal(torch.zeros(0, 3), torch.zeros(0, 3))
