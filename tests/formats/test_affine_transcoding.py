"""GPTQ, AWQ, compressed-tensors, auto-round and native into each other: the same weights, proved by ``convert``."""

import itertools

import pytest
import torch

from lowbit import Grid, Metadata, PackedTensor, ScaleFormat, Scheme, TensorSpec, Zero
from lowbit.convert import convert
from lowbit.errors import NoRouteError
from lowbit.plan import Target
from lowbit.plugins import registry
from lowbit.testing import samples
from lowbit_formats import auto_round, awq, compressed_tensors, gptq, hf, native, plain

REGISTRY = registry(plain, native, hf, gptq, awq, compressed_tensors, auto_round)
FORMATS = ("gptq", "awq", "compressed-tensors", "auto-round", "native")
UP = "model.layers.0.mlp.up_proj.weight"
SHAPE = (64, 256)


def pairs(formats):
    return list(itertools.permutations(formats, 2))


def affine(bits=4, group_size=64, zero=Zero.SYMMETRIC, **fields):
    return Scheme(Grid.AFFINE, bits, group_size, zero, **fields)


def write(path, format, scheme, shape=SHAPE):
    """Write two packed weights, a bias, an embedding and a norm."""
    packer = REGISTRY.route(scheme, shape, format).packer
    values = {
        "model.embed_tokens.weight": torch.ones(10, 256, dtype=torch.bfloat16),
        UP: packer.pack(samples.quantized(scheme, shape, 1, "bits")),
        UP.replace("weight", "bias"): torch.ones(64, dtype=torch.float16),
        UP.replace(".0.", ".1."): packer.pack(samples.quantized(scheme, shape, 2)),
        "model.norm.weight": torch.ones(256),
    }
    entries = {
        name: value.spec if isinstance(value, PackedTensor) else TensorSpec.of(value) for name, value in values.items()
    }
    REGISTRY.exporters[format].write(path, entries, iter(values.items()), Metadata({"model_type": "llama"}))
    return path


@pytest.mark.parametrize(("source", "target"), pairs(FORMATS))
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_symmetric_four_bits_go_everywhere_and_back(tmp_path, source, target, dtype):
    scheme = affine(scales=ScaleFormat(dtype))
    first = write(tmp_path / "first", source, scheme)
    there = convert(first, tmp_path / "there", Target(target), REGISTRY)
    assert there.error.exact
    assert there.plan.entries[UP].scheme == scheme
    back = convert(tmp_path / "there", tmp_path / "back", Target(source), REGISTRY)
    assert back.error.exact
    if source != "native":  # which takes the layouts of the other as they are
        written = (tmp_path / "back" / "model.safetensors").read_bytes()
        assert written == (first / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("source", "target"), pairs(("gptq", "awq", "compressed-tensors", "native")))
@pytest.mark.parametrize("group_size", [64, None])
def test_asymmetric_four_bits_keep_their_scheme(tmp_path, source, target, group_size):
    scheme = affine(4, group_size, Zero.INTEGER)
    report = convert(write(tmp_path / "a", source, scheme), tmp_path / "b", Target(target), REGISTRY)
    assert report.error.exact
    assert report.plan.entries[UP].scheme == scheme


@pytest.mark.parametrize(("source", "target"), pairs(("gptq", "compressed-tensors", "auto-round", "native")))
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_other_widths_keep_their_scheme(tmp_path, source, target, bits):
    scheme = affine(bits)
    report = convert(write(tmp_path / "a", source, scheme), tmp_path / "b", Target(target), REGISTRY)
    assert report.error.exact
    assert report.plan.entries[UP].scheme == scheme


@pytest.mark.parametrize(
    ("target", "scheme", "found"),
    [
        ("awq", affine(3), affine(4)),  # a wider code
        ("gptq", affine(5), affine(8)),
        ("gptq", affine(7, 64, Zero.INTEGER), affine(8, 64, Zero.INTEGER)),
        ("auto-round", affine(4, 64, Zero.INTEGER), affine(8)),  # an asymmetric value needs a bit more
    ],
)
def test_what_a_format_lacks_becomes_the_smallest_that_means_the_same(tmp_path, target, scheme, found):
    source = write(tmp_path / "a", "compressed-tensors", scheme)
    report = convert(source, tmp_path / "b", Target(target), REGISTRY)
    assert report.error.exact
    assert report.plan.entries[UP].scheme == found


@pytest.mark.parametrize("target", ["awq", "compressed-tensors", "auto-round"])
def test_act_order_goes_to_gptq_and_native_only(tmp_path, target):
    source = write(tmp_path / "a", "gptq", affine(permutation=True))
    assert convert(source, tmp_path / "native", Target("native"), REGISTRY).error.exact
    assert convert(tmp_path / "native", tmp_path / "gptq", Target("gptq"), REGISTRY).error.exact
    with pytest.raises(NoRouteError, match="act-order") as raised:
        convert(source, tmp_path / "b", Target(target), REGISTRY)
    assert "these formats can, exactly: gptq, native; of act-order only that of down_proj can be" in str(raised.value)


def test_a_scale_that_float16_lacks_is_refused_where_only_float16_would_do(tmp_path):
    """compressed-tensors holds float32 scales; GPTQ does not, and rounding them would not be exact."""
    source = write(tmp_path / "a", "compressed-tensors", affine(scales=ScaleFormat("float32")))
    with pytest.raises(NoRouteError, match="float16 or bfloat16 scales, not float32"):
        convert(source, tmp_path / "b", Target("gptq"), REGISTRY)


def test_dequantized_weights_are_the_same_from_every_format(tmp_path):
    weights = []
    for format in FORMATS:
        convert(write(tmp_path / format, format, affine()), tmp_path / f"{format}-hf", Target("hf"), REGISTRY)
        with REGISTRY.open(tmp_path / f"{format}-hf") as checkpoint:
            weights.append(checkpoint.read(UP))
    assert all(torch.equal(weight, weights[0]) for weight in weights)
