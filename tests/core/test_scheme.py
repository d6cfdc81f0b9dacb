import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowbit import (
    Across,
    Binary,
    BinaryForm,
    Grid,
    Outliers,
    Rotation,
    ScaleCoding,
    ScaleFormat,
    Scheme,
    Trellis,
    Zero,
)
from lowbit.errors import SchemeError
from lowbit.scheme import SCHEME_VERSION
from lowbit.testing import strategies

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 300) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
DOCUMENT = {
    "version": 1,
    "grid": "trellis",
    "bits": 0,
    "scales": {"dtype": "float16", "bits": 4},
    "trellis": {"code": "mul1", "step_bits": [2]},
    "rotation": {"in_block": 128},
    "outliers": {"density": 0.01},
}


@given(strategies.schemes())
def test_json_round_trip(scheme):
    document = json.loads(json.dumps(scheme.to_json()))
    assert Scheme.from_json(document) == scheme
    assert hash(Scheme.from_json(document)) == hash(scheme)


def test_json_leaves_out_defaults():
    assert Scheme(Grid.AFFINE, 4, 128).to_json() == {
        "version": SCHEME_VERSION,
        "grid": "affine",
        "bits": 4,
        "group_size": 128,
    }


def test_json_of_a_k_quant():
    scheme = Scheme(Grid.AFFINE, 4, 32, Zero.MINIMUM, ScaleFormat(bits=6, super_group=8))
    assert scheme.to_json()["scales"] == {
        "dtype": "float16",
        "bits": 6,
        "super_group": 8,
        "across": "groups",
        "coding": "linear",
        "signed": False,
    }


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"version": 2}, "reads scheme version 1, got 2; install a newer lowbit"),
        ({"version": None}, "reads scheme version 1, got None"),
        ({"flavour": 3}, "unknown Scheme field 'flavour'; this lowbit is older than the file"),
        ({"scales": {"shape": 1}}, "unknown ScaleFormat field 'shape'"),
        ({"grid": "cubic"}, "grid must be one of affine, codebook, trellis, binary, got 'cubic'"),
        ({"zero": ["integer"]}, "zero must be one of"),
        ({"bits": "4"}, "Scheme bits must be int, got '4'"),
        ({"bits": 4.0}, "Scheme bits must be int, got 4.0"),
        ({"bits": True}, "Scheme bits must be int, got True"),
        ({"flat": 1}, "Scheme flat must be bool, got 1"),
        ({"outliers": "many"}, "a Outliers must be a JSON object, got 'many'"),
        ({"trellis": {"code": "mul1"}}, "incomplete Trellis: .*step_bits"),
        ({"trellis": {"code": "mul1", "step_bits": [2.5]}}, "step_bits must be a list of whole numbers"),
        ({"trellis": {"code": "mul1", "step_bits": [2], "tile": [16]}}, "tile must be a list of whole numbers"),
    ],
)
def test_json_of_another_version_or_with_wrong_values_is_refused(change, sentence):
    with pytest.raises(SchemeError, match=sentence):
        Scheme.from_json({**DOCUMENT, **change})


@pytest.mark.parametrize("document", [None, [], "affine", 3])
def test_json_that_is_no_object_is_refused(document):
    with pytest.raises(SchemeError, match="must be a JSON object"):
        Scheme.from_json(document)


def test_the_document_that_is_damaged_below_is_sound():
    assert Scheme.from_json(DOCUMENT).trellis == Trellis("mul1", (2,))


@given(st.sampled_from(sorted(DOCUMENT)), st.none() | st.text(max_size=8), JSON)
def test_damaged_json_raises_nothing_but_scheme_error(key, inner, value):
    document = json.loads(json.dumps(DOCUMENT))
    if inner is not None and isinstance(document[key], dict):
        document[key][inner] = value
    else:
        document[key] = value
    try:
        scheme = Scheme.from_json(document)
    except SchemeError:
        return
    assert Scheme.from_json(scheme.to_json()) == scheme


MUL1 = Trellis("mul1", (2,))
CONTRADICTIONS = [
    (lambda: Scheme(Grid.AFFINE, 0), "bits must be 1 to 8 for a affine grid, got 0"),
    (lambda: Scheme(Grid.AFFINE, 9), "got 9"),
    (lambda: Scheme(Grid.CODEBOOK, 17), "bits must be 1 to 16"),
    (lambda: Scheme(Grid.TRELLIS, 2, trellis=MUL1), "bits must be 0 to 0"),
    (lambda: Scheme(Grid.TRELLIS, 0), "the trellis field goes with the trellis grid"),
    (lambda: Scheme(Grid.AFFINE, 4, trellis=MUL1), "the trellis field goes with the trellis grid"),
    (lambda: Scheme(Grid.AFFINE, 4, binary=Binary(4)), "the binary field goes with the binary grid"),
    (lambda: Scheme(Grid.BINARY, 2, binary=Binary(1)), "number of planes, got 2 and 1"),
    (lambda: Scheme(Grid.BINARY, 1, flat=True, binary=Binary(1)), "flat groups and two-level scales do not apply"),
    (lambda: Scheme(Grid.BINARY, 1, scales=ScaleFormat(bits=4), binary=Binary()), "two-level scales do not apply"),
    (lambda: Scheme(Grid.BINARY, 1, 8, binary=Binary(1, BinaryForm.PRODUCT, 4)), "no groups to size or permute"),
    (lambda: Scheme(Grid.CODEBOOK, 4, zero=Zero.INTEGER), "only an affine grid has a zero of its own"),
    (lambda: Scheme(Grid.AFFINE, 2, levels=4), "levels must be 2 to 3"),
    (lambda: Scheme(Grid.AFFINE, 2, levels=1), "levels must be 2 to 3"),
    (lambda: Scheme(Grid.BINARY, 2, levels=3, binary=Binary(2)), "levels count codes, and a binary grid has none"),
    (lambda: Scheme(Grid.AFFINE, 4, vector=2), "only a codebook has vectors"),
    (lambda: Scheme(Grid.CODEBOOK, 8, 12, vector=8), "vector must divide group_size, got 8 and 12"),
    (lambda: Scheme(Grid.AFFINE, 4, 0), "group_size must be positive"),
    (lambda: Scheme(Grid.AFFINE, 4, 32, flat=True, permutation=True), "flat groups and vectors have none"),
    (lambda: Scheme(Grid.CODEBOOK, 4, 32, vector=2, permutation=True), "flat groups and vectors have none"),
    (lambda: ScaleFormat("float64"), "scale dtype must be one of"),
    (lambda: ScaleFormat(bits=9), "sub-scale bits must be 1 to 8"),
    (lambda: ScaleFormat(super_group=8), "describe a second level: give bits"),
    (lambda: ScaleFormat(signed=True), "describe a second level: give bits"),
    (lambda: ScaleFormat(across=Across.ROWS), "describe a second level: give bits"),
    (lambda: ScaleFormat(bits=4, super_group=0), "super_group must be positive"),
    (lambda: ScaleFormat(bits=4, coding=ScaleCoding.CODEBOOK, signed=True), "have no sign"),
    (lambda: Trellis("4inst", (2,)), "trellis code must be one of"),
    (lambda: Trellis("mul1", ()), "step_bits must be 1 to state_bits"),
    (lambda: Trellis("mul1", (17,)), "step_bits must be 1 to state_bits"),
    (lambda: Trellis("mul1", (2,), 25), "state_bits must be 1 to 24"),
    (lambda: Trellis("mul1", (2,), table_bits=9), "table_bits goes with the codes lut and hyb only"),
    (lambda: Trellis("hyb", (2,), step_weights=2), "table_bits goes with the codes lut and hyb only"),
    (lambda: Trellis("hyb", (2,), table_bits=9), "hyb has 16-bit states, 2 weights a step"),
    (lambda: Trellis("lut", (2,), 8, table_bits=4), "needs a table entry for each of the 2..8 states"),
    (lambda: Trellis("mul1", (2,), step_weights=2), "computes one weight a step"),
    (lambda: Trellis("lut", (2,), 4, 3, 4), "step_weights must divide the tile"),
    (lambda: Trellis("mul1", (2,), tile=(0, 4)), "step_weights must divide the tile"),
    (lambda: Trellis("mul1", (2,), tile=(8, 8), order="mma_b"), "walks tiles of 16x16"),
    (lambda: Binary(0), "binary planes must be positive"),
    (lambda: Binary(rate=1.5), "rank or rate goes with the product form only"),
    (lambda: Binary(1, BinaryForm.PRODUCT), "rank or rate goes with the product form only"),
    (lambda: Binary(1, BinaryForm.PRODUCT, rank=8, rate=1.5), "a rank or a rate, got both: 8 and 1.5"),
    (lambda: Binary(1, BinaryForm.PRODUCT, rate=0.0), "rate must be above 0 and at most 16, got 0.0"),
    (lambda: Scheme(Grid.BINARY, 1, 8, binary=Binary(1, BinaryForm.PRODUCT, rate=1.5)), "no groups to size"),
    (lambda: Binary(1, BinaryForm.PRODUCT, 0), "rank must be positive"),
    (lambda: Outliers(0.0), "density must lie between 0 and 1"),
    (lambda: Outliers(float("nan")), "density must lie between 0 and 1"),
    (lambda: Outliers(0.1, "float8_e4m3fn"), "outlier dtype must be"),
    (lambda: Rotation(96), "in_block must be a power of two or 0, got 96"),
    (lambda: Rotation(0, 0), "needs in_block or out_block"),
    (lambda: Rotation(dtype="int16"), "rotation dtype must be int8 or a float dtype"),
]


@pytest.mark.parametrize(("build", "sentence"), CONTRADICTIONS)
def test_contradictions_are_refused_with_a_sentence(build, sentence):
    with pytest.raises(SchemeError, match=sentence):
        build()


def test_schemes_are_values():
    scheme = Scheme(Grid.AFFINE, 4, 128)
    assert scheme == Scheme(Grid.AFFINE, 4, 128)
    assert len({scheme, Scheme(Grid.AFFINE, 4, 128), replace(scheme, bits=3)}) == 2
    with pytest.raises(AttributeError):
        scheme.bits = 3


@pytest.mark.parametrize(
    ("scheme", "count", "midpoint"),
    [
        (Scheme(Grid.AFFINE, 4), 16, 8),
        (Scheme(Grid.AFFINE, 2, levels=3), 3, 1),
        (Scheme(Grid.AFFINE, 1), 2, 1),
    ],
)
def test_code_counts(scheme, count, midpoint):
    assert (scheme.code_count, scheme.midpoint) == (count, midpoint)


@pytest.mark.parametrize(
    ("scheme", "groups"),
    [
        (Scheme(Grid.AFFINE, 4, 32), 4),
        (Scheme(Grid.AFFINE, 4), 1),
        (Scheme(Grid.AFFINE, 4, 128), 1),
        (Scheme(Grid.AFFINE, 4, 64, flat=True), 8),
        (Scheme(Grid.AFFINE, 4, flat=True), 1),
    ],
)
def test_groups_of_a_weight_of_5_by_100(scheme, groups):
    assert scheme.groups((5, 100)) == groups


def test_a_trellis_counts_its_bits():
    trellis = Trellis("mul1", (2, 3))
    assert (trellis.steps, trellis.tile_bits) == (256, 640)
    assert Trellis("hyb", (4,), step_weights=2, table_bits=9).tile_bits == 512


@pytest.mark.parametrize(
    ("scheme", "text"),
    [
        (Scheme(Grid.AFFINE, 4, 128, Zero.INTEGER), "affine 4-bit g128 asym"),
        (Scheme(Grid.CODEBOOK, 3, 64, outliers=Outliers(0.01)), "codebook 3-bit g64 +outliers"),
        (Scheme(Grid.CODEBOOK, 16, vector=8), "codebook 2-bit per-channel"),
        (Scheme(Grid.AFFINE, 8, scales=ScaleFormat("bfloat16")), "affine 8-bit per-channel bfloat16"),
        (Scheme(Grid.AFFINE, 4, 32, Zero.MINIMUM, ScaleFormat(bits=6)), "affine 4-bit g32 min 6-bit-scales"),
        (
            Scheme(Grid.TRELLIS, 0, trellis=Trellis("mul1", (2, 3)), rotation=Rotation()),
            "trellis 2.5-bit per-channel +rotation",
        ),
    ],
)
def test_summaries(scheme, text):
    assert scheme.summary() == text
