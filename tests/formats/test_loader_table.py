"""``--for LOADER`` on real plans: what each program refuses of what lowbit could write for it."""

import pytest
import torch

from lowbit import Grid, Metadata, ScaleFormat, Scheme, TensorSpec, Zero, installed
from lowbit.errors import NoRouteError
from lowbit.loaders import check_loader
from lowbit_formats.loader_table import TABLE

REGISTRY = installed()
LAYER = "model.layers.0.{}.weight"
NAMES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
NAMES += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
SHAPE = (1024, 1024)


def affine(bits=4, group_size=128, zero=Zero.SYMMETRIC, **fields):
    return Scheme(Grid.AFFINE, bits, group_size, zero, **fields)


def packed(format, scheme, shape=SHAPE):
    return REGISTRY.route(scheme, shape, format).packer.spec(scheme, shape)


def entries(format, scheme, shape=SHAPE, **others):
    """Return the linears of a block as a format stores them; ``others`` by the last part of their name."""
    found = {LAYER.format(name): packed(format, scheme, shape) for name in NAMES}
    changed = {
        LAYER.format(name): others[name.rpartition(".")[2]] for name in NAMES if name.rpartition(".")[2] in others
    }
    return {**found, **changed, **{f"{name}.weight": it for name, it in others.items() if "proj" not in name}}


def check(loader, format, found, tp=1, **config):
    return check_loader(loader, format, found, Metadata({"model_type": "llama", **config}), REGISTRY, tp)


@pytest.mark.parametrize("format", TABLE)
def test_every_row_says_which_version_it_was_read_from(format):
    assert format in REGISTRY.exporters
    assert list(REGISTRY.exporters[format].loaders()) == list(TABLE[format])
    for rule in TABLE[format]:
        assert any(character.isdigit() for character in rule.version), rule
    loaders = [rule.loader for rule in TABLE[format]]
    assert len(loaders) == len(set(loaders))


TAKEN = [
    ("vllm", "gptq", affine()),
    ("vllm", "gptq", affine(8, None)),
    ("vllm", "awq", affine(4, 64, Zero.INTEGER)),
    ("vllm", "compressed-tensors", affine(3, 32, Zero.INTEGER)),
    ("sglang", "gptq", affine(4, 32, permutation=True)),
    ("sglang", "compressed-tensors", affine(8, 128, Zero.INTEGER)),
    ("transformers", "gptq", affine(3, 64, Zero.INTEGER)),
    ("transformers", "compressed-tensors", affine(3)),
    ("mlx", "mlx", affine(5, 64, Zero.MINIMUM)),
    ("llama.cpp", "gguf", affine(4, 32)),
]


@pytest.mark.parametrize(("loader", "format", "scheme"), TAKEN)
def test_what_a_loader_takes(loader, format, scheme):
    assert check(loader, format, entries(format, scheme)).refusals == ()


REFUSED = [
    ("vllm", "gptq", affine(3), "symmetric weights of 4 or 8 bits, not 3"),
    ("vllm", "gptq", affine(4, 128, Zero.INTEGER), "symmetric weights only"),
    ("vllm", "gptq", affine(4, 256), "groups of the whole row, 32, 64 or 128, not 256"),
    ("vllm", "gptq", affine(permutation=True), "no act-order"),
    ("vllm", "awq", affine(4, 16, Zero.INTEGER), "not 16"),
    ("sglang", "compressed-tensors", affine(3), "4 or 8 bits, not 3"),
    ("sglang", "gguf", affine(2, 64), "does not know layout gguf-q2_0"),
    ("transformers", "compressed-tensors", affine(4, 128, Zero.INTEGER), "symmetric weights only"),
]


@pytest.mark.parametrize(("loader", "format", "scheme", "sentence"), REFUSED)
def test_what_a_loader_refuses_is_said_before_work(loader, format, scheme, sentence):
    with pytest.raises(NoRouteError, match=f"{loader} would not load this {format} checkpoint") as raised:
        check(loader, format, entries(format, scheme))
    assert sentence in str(raised.value)
    assert LAYER.format("self_attn.q_proj") in str(raised.value)


@pytest.mark.parametrize(("tp", "fits"), [(1, True), (8, True), (16, False), (3, False)])
def test_tensor_parallel_parts_hold_whole_groups(tp, fits):
    found = entries("gptq", affine())
    if fits:
        assert check("vllm", "gptq", found, tp).refusals == ()
        return
    with pytest.raises(NoRouteError) as raised:
        check("vllm", "gptq", found, tp)
    assert ("1024 features do not divide by --tp 3" if tp == 3 else "in_features of a part is 64") in str(raised.value)


@pytest.mark.parametrize("odd", ["k_proj", "up_proj"])
@pytest.mark.parametrize("loader", ["vllm", "sglang"])
@pytest.mark.parametrize("kept", [False, True], ids=["other bits", "not quantized"])
def test_fused_linears_share_one_setting(loader, odd, kept):
    other = TensorSpec(torch.float16, SHAPE) if kept else packed("compressed-tensors", affine(8))
    found = entries("compressed-tensors", affine(), **{odd: other})
    with pytest.raises(NoRouteError, match="fused on load and must share one setting"):
        check(loader, "compressed-tensors", found)
    alone = entries("compressed-tensors", affine(), down_proj=packed("compressed-tensors", affine(8)))
    assert check(loader, "compressed-tensors", alone).refusals == ()
    assert check("transformers", "compressed-tensors", found).refusals == ()


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_scales_that_the_loader_rounds_are_a_warning(key):
    """A model of float16 scales is written as float16; where scales differ, it keeps its dtype and some are rounded."""
    half, brain = (packed("gptq", affine(scales=ScaleFormat(dtype))) for dtype in ("float16", "bfloat16"))
    alike, mixed = entries("gptq", half.scheme), entries("gptq", half.scheme, down_proj=brain)
    assert REGISTRY.exporters["gptq"].model_config(alike, Metadata({key: "bfloat16"})) == {key: "float16"}
    assert check("vllm", "gptq", alike, **{key: "bfloat16"}).warnings == ()
    (warning,) = check("vllm", "gptq", mixed, **{key: "bfloat16"}).warnings
    assert "casts float16 scales to the model's bfloat16, which rounds most of them" in warning
    assert check("vllm", "gptq", entries("gptq", brain.scheme), **{key: "bfloat16"}).warnings == ()


def test_a_quantized_head_is_for_those_who_look_for_it():
    found = entries("gptq", affine(), lm_head=packed("gptq", affine()))
    assert check("vllm", "gptq", found).refusals == ()
    with pytest.raises(NoRouteError, match=r"lm_head\.weight: it takes no quantized lm_head"):
        check("transformers", "gptq", found)


def test_formats_and_architectures_that_a_loader_does_not_know():
    with pytest.raises(NoRouteError, match=r"llama\.cpp does not load format 'gptq'; it loads gguf"):
        check("llama.cpp", "gptq", entries("gptq", affine()))
    with pytest.raises(NoRouteError, match=r"it takes model types llama, .*, not 'mamba'"):
        check("llama.cpp", "gguf", entries("gguf", affine(4, 32)), model_type="mamba")
