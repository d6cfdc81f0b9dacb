from dataclasses import replace

import pytest

from lowbit import Grid, Scheme
from lowbit.errors import OptionError, UnknownComponentError
from lowbit.recipe import Recipe, Rule, is_linear_name, parse_rules


@pytest.fixture
def entries(registry, source):
    with registry.open(source) as checkpoint:
        return checkpoint.entries


def test_the_default_takes_linears_and_leaves_the_rest(registry, entries):
    choices = Recipe(Rule("*", "round")).choose(entries, registry)
    assert set(choices) == {"model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"}


def test_rules_choose_tensors_and_inherit_the_default_settings(registry, entries):
    recipe = Recipe(Rule("*", "round", {"group_size": "4"}), parse_rules(["*.down_proj.weight=round,bits=3"]))
    choices = recipe.choose(entries, registry)
    down = choices["model.layers.0.mlp.down_proj.weight"].options
    up = choices["model.layers.0.mlp.up_proj.weight"].options
    assert (down.bits, down.group_size) == (3, 4)
    assert (up.bits, up.group_size) == (4, 4)


def test_the_first_matching_rule_decides_and_none_keeps(registry, entries):
    rules = parse_rules(
        ["*.down_proj.weight=none", "*_proj.weight=round,bits=2", "model.embed_tokens.weight=round,bits=8"]
    )
    choices = Recipe(None, rules).choose(entries, registry)
    assert {name: choice.options.bits for name, choice in choices.items()} == {
        "model.layers.0.mlp.up_proj.weight": 2,
        "model.embed_tokens.weight": 8,
    }


def test_a_rule_that_matches_nothing_is_a_mistake(registry, entries):
    with pytest.raises(OptionError, match=r"'model\.layer\.\*' matches no 2-D weight"):
        Recipe(None, parse_rules(["model.layer.*=round"])).choose(entries, registry)


def test_unknown_quantizers_list_the_known(registry, entries):
    with pytest.raises(UnknownComponentError, match="installed: round"):
        Recipe(Rule("*", "rund")).choose(entries, registry)


@pytest.mark.parametrize("text", ["*", "=round", "*=", "*=bits=3", "*=round,bits"])
def test_malformed_rules_are_refused(text):
    with pytest.raises(OptionError):
        Rule.parse(text)


@pytest.mark.parametrize(
    ("name", "linear"),
    [
        ("model.layers.3.self_attn.q_proj.weight", True),
        ("model.layers.3.mlp.gate_proj.weight", True),
        ("model.layers.3.mlp.gate.weight", False),
        ("model.layers.3.input_layernorm.weight", False),
        ("model.embed_tokens.weight", False),
        ("transformer.wte.weight", False),
        ("lm_head.weight", False),
        ("model.layers.3.self_attn.q_proj.bias", False),
    ],
)
def test_names_of_linears(name, linear):
    assert is_linear_name(name) is linear


def test_a_variant_fits_the_options_and_contradictions_are_refused(registry, entries):
    name = "model.layers.0.mlp.up_proj.weight"
    four = registry.exporters["wide-only"].variants()["four"]
    choices = Recipe(Rule("*", "round")).choose(entries, registry, {name: replace(four, bits=3, group_size=4)})
    assert (choices[name].options.bits, choices[name].options.group_size) == (3, 4)
    assert choices.keys() == {name}, "what the variant leaves out is not quantized"
    with pytest.raises(OptionError, match=r"round is asked for bits=3, but model.*up_proj.weight needs bits=4"):
        Recipe(Rule("*", "round", {"bits": "3"})).choose(entries, registry, {name: four})
    with pytest.raises(OptionError, match=r"must become codebook 4-bit g8, and quantizer 'round' .* gives affine"):
        Recipe(Rule("*", "round")).choose(entries, registry, {name: Scheme(Grid.CODEBOOK, 4, 8)})


def test_a_mix_reaches_what_the_default_leaves_alone(registry, entries):
    scheme = registry.exporters["wide-only"].variants()["four"]
    assert "model.embed_tokens.weight" in Recipe(Rule("*", "round")).choose(
        entries, registry, {"model.embed_tokens.weight": scheme}
    )
