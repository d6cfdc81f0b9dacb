from dataclasses import dataclass, field
from typing import Literal

import pytest

from lowbit.errors import OptionError
from lowbit.options import build_options, describe_options, parse_settings


@dataclass(frozen=True)
class Options:
    bits: int = field(default=4, metadata={"help": "Bits of a code."})
    group_size: int | None = 64
    symmetric: bool = True
    damp: float = 0.01
    scale: Literal["absmax", "search"] = "absmax"


@dataclass(frozen=True)
class Stepped:
    iters: int | None = 7


def test_settings_become_fields_by_their_types():
    settings = parse_settings(["bits=3", "group-size=none", "symmetric=no", "damp=1e-3", "scale=search"])
    assert build_options(Options, settings, "x") == Options(3, None, False, 1e-3, "search")


@pytest.mark.parametrize("word", ["none", "row", "channel", "-1"])
def test_the_whole_row_has_names(word):
    assert build_options(Options, {"group_size": word}, "x").group_size is None


def test_only_groups_can_be_a_row():
    with pytest.raises(OptionError, match="iters must be int"):
        build_options(Stepped, {"iters": "row"}, "x")
    assert build_options(Stepped, {"iters": "-1"}, "x").iters == -1
    assert build_options(Stepped, {"iters": "none"}, "x").iters is None


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"bits": "four"}, "x option bits must be int, got 'four'"),
        ({"scale": "max"}, r"x option scale must be absmax \| search, got 'max'"),
        ({"symmetric": "perhaps"}, "must be bool"),
        ({"group_size": "big"}, r"must be int \| none, got 'big'"),
        ({"grup_size": "32"}, "x has no option 'grup_size'; it has bits, .*; did you mean 'group_size'"),
    ],
)
def test_bad_values_name_the_option_and_what_it_takes(settings, sentence):
    with pytest.raises(OptionError, match=sentence):
        build_options(Options, settings, "x")


@pytest.mark.parametrize(
    ("texts", "sentence"), [(["bits"], "key=value"), (["=3"], "key=value"), (["a=1", "a=2"], "set twice")]
)
def test_bad_settings_are_refused(texts, sentence):
    with pytest.raises(OptionError, match=sentence):
        parse_settings(texts)


def test_descriptions_come_from_the_dataclass():
    first, second, *_ = describe_options(Options)
    assert first == {"name": "bits", "type": "int", "default": "4", "help": "Bits of a code."}
    assert second["type"] == "int | none"
