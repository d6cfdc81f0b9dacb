"""Groups that cross rows, and codes that count a table's entries in the table's order: what bitsandbytes' layouts need."""

from dataclasses import replace

import pytest
import torch

from lowbit import Grid, ScaleFormat, Scheme, dequantize
from lowbit.errors import OptionError
from lowbit_kbit.nested import NESTED, dynamic_table, nest
from lowbit_kbit.options import KbitOptions
from lowbit_kbit.quantizer import KbitQuantizer

QUANTIZER = KbitQuantizer()
TABLE = torch.tensor([0.0, 0.5, 1.0, 0.25, -1.0, -0.25, -0.5, 0.75])[:, None]
FLAT = Scheme(Grid.CODEBOOK, 3, 64, scales=ScaleFormat("float32"), flat=True)


def weight(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def fitted(codebook=TABLE):
    options = QUANTIZER.fit(KbitOptions(bits=3), FLAT)
    return QUANTIZER.with_codebook(options, codebook)


@pytest.mark.parametrize("shape", [(6, 128), (5, 77), (3, 20)], ids=["whole rows", "across rows", "one short group"])
def test_flat_groups_are_those_of_the_flattened_weight(shape):
    """The same codes and scales as a weight of one row has, cut into rows."""
    options, w = KbitOptions(bits=3, codebook="nf", scale_dtype="float32", flat=True), weight(*shape)
    found = QUANTIZER.quantize(w, options)
    row = QUANTIZER.quantize(w.view(1, -1), replace(options, flat=False))
    assert torch.equal(found.parts["codes"].view(1, -1), row.parts["codes"])
    assert torch.equal(found.parts["scales"], row.parts["scales"])
    assert torch.equal(dequantize(found).view(1, -1), dequantize(row))


def test_codes_count_the_entries_as_given():
    options, w = fitted(), weight(8, 64)
    assert QUANTIZER.scheme(options) == FLAT
    found = QUANTIZER.quantize(w, options)
    assert torch.equal(found.parts["codebook"], TABLE)
    ascending = QUANTIZER.quantize(w, fitted(TABLE.sort(dim=0).values))
    assert torch.equal(dequantize(found), dequantize(ascending))
    assert not torch.equal(found.parts["codes"], ascending.parts["codes"])


def test_a_codebook_of_its_own_stays_and_a_foreign_one_is_checked():
    options = KbitOptions(bits=3, codebook="nf")
    own = QUANTIZER.codebook(options)
    assert QUANTIZER.with_codebook(options, own) is options
    assert QUANTIZER.codebook(KbitOptions()) is None
    assert torch.equal(QUANTIZER.codebook(fitted()), TABLE)
    assert QUANTIZER.with_codebook(options, TABLE * 2) is None
    assert QUANTIZER.with_codebook(replace(options, bits=4), TABLE) is None
    assert QUANTIZER.fit(options, replace(FLAT, scales=ScaleFormat(bits=8, super_group=256))) is None
    assert QUANTIZER.fit(options, replace(FLAT, scales=NESTED, flat=False)) is None


@pytest.mark.parametrize("shape", [(640, 130), (5, 77)], ids=["six blocks of scales", "one short block"])
def test_nested_scales_change_the_scales_and_no_codes(shape):
    options = QUANTIZER.fit(KbitOptions(bits=3, codebook="nf", group_size=None), replace(FLAT, scales=NESTED))
    plain, w = replace(options, nested=False), weight(*shape)
    found, float32 = QUANTIZER.quantize(w, options), QUANTIZER.quantize(w, plain)
    assert found.scheme == replace(FLAT, scales=NESTED)
    assert torch.equal(found.parts["codes"], float32.parts["codes"])
    scales, parts = float32.parts["scales"].flatten(), found.parts
    tops = parts["super_scales"].flatten().repeat_interleave(256)[: len(scales)]
    decoded = parts["scales_codebook"][parts["scales"].int().flatten()] * tops + parts["scales_offset"]
    gaps = parts["scales_codebook"].diff()
    assert ((decoded - scales).abs() <= gaps.max() / 2 * tops * 1.0001).all()
    assert float(parts["scales_offset"]) == float(scales.double().mean().float())


def test_equal_scales_nest_to_the_offset():
    parts = nest(torch.full((1, 300), 0.5))
    assert parts["super_scales"].tolist() == [[0, 0]]
    assert dynamic_table()[parts["scales"].int()].abs().max() == 0
    assert float(parts["scales_offset"]) == 0.5


def test_the_table_rises_from_below_minus_one_to_one():
    table = dynamic_table()
    assert len(table) == 256
    assert (table.diff() > 0).all()
    assert 0 in table
    assert table.max() == 1
    assert -1 < table.min() < -0.99


@pytest.mark.parametrize("changes", [{}, {"flat": True}, {"scale_dtype": "float32"}])
def test_nested_scales_are_flat_and_float32(changes):
    with pytest.raises(OptionError, match="nested goes with flat=true and scale_dtype=float32"):
        KbitOptions(nested=True, **changes)


@pytest.mark.parametrize("changes", [{"scale_bits": 8}, {"group_size": None}])
def test_flat_groups_have_a_size_and_float_scales(changes):
    with pytest.raises(OptionError, match="flat goes with a group_size"):
        KbitOptions(flat=True, **changes)
