"""Settings of modules: read strictly, and written as patterns that match what they should and nothing else."""

import re

import pytest

from lowbit.errors import CheckpointError
from lowbit_formats.module_settings import Setting, is_in_block, matcher, patterns, read_kept, read_setting, with_fused

KEYS = {"bits": ("bits", "w_bit"), "group_size": ("group_size",), "symmetric": ("sym",), "act_order": ()}


def test_settings_are_read_under_any_of_their_names():
    assert read_setting({"w_bit": 4, "group_size": -1}, "it", KEYS) == Setting(4, None)
    assert read_setting({"bits": 3, "group_size": 64, "sym": False}, "it", KEYS) == Setting(3, 64, False)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"group_size": 64}, "it must give bits from 2 to 8, got None"),
        ({"bits": True, "group_size": 64}, "it must give bits from 2 to 8, got True"),
        ({"bits": 9, "group_size": 64}, "it must give bits from 2 to 8, got 9"),
        ({"bits": 4, "group_size": 0}, "it must give a positive group_size or -1, got 0"),
        ({"bits": 4, "group_size": "64"}, "it must give a positive group_size or -1, got '64'"),
        ({"bits": 4, "group_size": 64, "sym": 1}, "it: sym must be true or false, got 1"),
    ],
)
def test_nonsense_is_one_sentence(config, sentence):
    with pytest.raises(CheckpointError, match=re.escape(sentence)):
        read_setting(config, "it", KEYS)


def test_a_pattern_stands_for_every_block_only_where_it_may():
    gates = [f"model.layers.{layer}.mlp.gate" for layer in range(12)]
    downs = [f"model.layers.{layer}.mlp.down_proj" for layer in range(12)]
    assert patterns(gates, downs) == [r"^model\.layers\.\d+\.mlp\.gate$"]
    some, rest = downs[:2], [*gates, *downs[2:]]
    found = patterns(some, rest)
    assert found == [r"^model\.layers\.0\.mlp\.down_proj$", r"^model\.layers\.1\.mlp\.down_proj$"]
    for pattern in found:
        assert not any(re.match(pattern, name) for name in rest)
    assert patterns(["lm_head"], gates) == ["^lm_head$"]


def test_fused_modules_are_named_when_all_their_parts_are():
    attention = [f"l.0.self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj", "o_proj")]
    assert with_fused(attention) == [*attention, "l.0.self_attn.qkv_proj"]
    assert with_fused(attention[:2]) == attention[:2]
    assert with_fused(["l.0.mlp.gate_proj", "l.0.mlp.up_proj"])[2:] == ["l.0.mlp.gate_up_proj"]
    assert with_fused(["l.0.mlp.gate_proj", "l.1.mlp.up_proj"])[2:] == []


def test_blocks_are_numbered():
    assert is_in_block("model.layers.3.mlp.up_proj")
    assert not is_in_block("lm_head")


def test_a_broken_pattern_is_named():
    with pytest.raises(CheckpointError, match=r"it has the pattern '\(', which is no regular expression"):
        matcher("(", "it")


@pytest.mark.parametrize("document", [7, ["zeros"], {"a": "zeros"}, {"a": [1]}])
def test_what_lowbit_did_not_keep_is_refused(document):
    with pytest.raises(CheckpointError, match="'lowbit' must map modules to lists of words"):
        read_kept({"lowbit": document}, "it")
