"""Groups that cross rows, and codes that count a table's entries in the table's order: what bitsandbytes' layouts need."""

from dataclasses import replace

import pytest
import torch

from lowbit import Grid, ScaleFormat, Scheme, dequantize
from lowbit.errors import OptionError
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


@pytest.mark.parametrize("changes", [{"scale_bits": 8}, {"group_size": None}])
def test_flat_groups_have_a_size_and_float_scales(changes):
    with pytest.raises(OptionError, match="flat goes with a group_size"):
        KbitOptions(flat=True, **changes)
