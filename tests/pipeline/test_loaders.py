"""Preflight checks: each rule of a loader, broken once, and the command's sentences."""

from dataclasses import replace

import pytest
import torch

from lowbit import Grid, Metadata, PackedSpec, ScaleFormat, Scheme, TensorSpec, Zero
from lowbit.errors import NoRouteError, OptionError, UnknownComponentError
from lowbit.loaders import LoaderRule, check_loader, judge

W4 = Scheme(Grid.AFFINE, 4, 128)
LAYER = "model.layers.0.{}.weight"


def entries(scheme=W4, shape=(512, 512), **different):
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj")
    schemes = {LAYER.format(name): different.get(name.rpartition(".")[2], scheme) for name in names}
    return {name: PackedSpec("some-layout", each, shape, {}) for name, each in schemes.items()}


def rule(**fields):
    return LoaderRule("engine", "1.0", **fields)


@pytest.mark.parametrize(
    ("rule", "entries", "sentence"),
    [
        (rule(bits=(2, 8)), entries(), "it takes symmetric weights of 2 or 8 bits, not 4"),
        (rule(symmetric=True), entries(replace(W4, zero=Zero.INTEGER)), "it takes symmetric weights only"),
        (
            rule(bits=(2, 4), asymmetric_bits=(8,)),
            entries(replace(W4, zero=Zero.INTEGER)),
            "asymmetric weights of 8 bits",
        ),
        (rule(group_sizes=(None, 32)), entries(), "groups of the whole row or 32, not 128"),
        (rule(permutation=False), entries(replace(W4, permutation=True)), "it takes no act-order"),
        (rule(uniform=True), entries(o_proj=replace(W4, bits=8)), "one scheme for all weights, not 2"),
        (rule(fused=True), entries(k_proj=replace(W4, bits=8)), "must share one setting"),
        (rule(out_multiple=1024), entries(), "a part of 512x512 is no multiple of 1024x1"),
        (rule(refused_layouts=("some-layout",)), entries(), "it does not know layout some-layout"),
        (rule(model_types=("llama",)), entries(), "it takes model types llama, not 'other'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_rule_refuses_with_a_sentence(rule, entries, sentence):
    verdict = judge(rule, entries, Metadata({"model_type": "other"}))
    assert len(verdict.refusals) == 1, verdict.refusals
    assert sentence in verdict.refusals[0]


def test_tensor_parallel_parts_must_hold_whole_groups():
    grouped = rule(whole_groups=True)
    assert judge(grouped, entries(), Metadata(), tp=4).refusals == ()
    (refusal,) = judge(grouped, entries(), Metadata(), tp=8).refusals
    assert "o_proj.weight: in_features of a part is 64, no multiple of the group size 128" in refusal
    (refusal, *_) = judge(rule(), entries(), Metadata(), tp=3).refusals
    assert "512 features do not divide by --tp 3" in refusal


def test_unquantized_siblings_count_as_another_setting():
    some = {name: entry for name, entry in entries().items() if "k_proj" not in name}
    some[LAYER.format("self_attn.k_proj")] = TensorSpec(torch.float16, (512, 512))
    assert judge(rule(fused=True), some, Metadata()).refusals


def test_scales_that_the_loader_rounds_are_a_warning():
    warn = rule(casts_scales=True, note="needs a package")
    warnings = judge(warn, entries(), Metadata({"torch_dtype": "bfloat16"})).warnings
    assert warnings[0] == "needs a package"
    assert "rounds most of them" in warnings[1]
    exact = entries(replace(W4, scales=ScaleFormat("bfloat16")))
    assert len(judge(warn, exact, Metadata({"torch_dtype": "bfloat16"})).warnings) == 1


def test_unknown_loaders_and_formats_list_the_known(registry, monkeypatch):
    rules = (rule(bits=(8,)),)
    monkeypatch.setattr(registry.exporters["any"], "loaders", lambda: rules, raising=False)
    with pytest.raises(UnknownComponentError, match="no loader named 'vlm'; known: engine"):
        check_loader("vlm", "any", entries(), Metadata(), registry)
    with pytest.raises(NoRouteError, match="engine does not load format 'floats'; it loads any"):
        check_loader("engine", "floats", entries(), Metadata(), registry)
    with pytest.raises(NoRouteError, match=r"engine would not load this any checkpoint \(engine 1.0: .*8 bits, not 4"):
        check_loader("engine", "any", entries(), Metadata(), registry)
    with pytest.raises(OptionError, match="--tp must be at least 1, got 0"):
        check_loader("engine", "any", entries(), Metadata(), registry, tp=0)
