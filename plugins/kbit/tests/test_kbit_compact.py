"""Scattered tables become consecutive codes, exactly; weights are quantized over several devices with the bits of one."""

import pytest
import torch

from lowbit import Calibration
from lowbit.errors import OptionError, WeightError
from lowbit.testing.contracts.checks import assert_same_quantized
from lowbit_kbit.codebooks import compact
from lowbit_kbit.options import KbitOptions
from lowbit_kbit.quantizer import KbitQuantizer
from lowbit_kbit.spread import quantize_over


def linear_map(bits, zero=0.0):
    """A table as bitsandbytes' create_linear_map lays it out: 2**bits - 1 values at both ends, zeros between."""
    values = torch.linspace(-1, 1, 2**bits - 1)
    half = len(values) // 2
    values[half] = zero
    return torch.cat((values[:half], torch.zeros(256 - len(values)), values[half:]))


@pytest.mark.parametrize("bits", range(2, 9))
def test_linear_maps_keep_every_value_and_their_zero(bits):
    table = linear_map(bits)
    entries, codes = compact(table, bits)
    assert entries.shape == (2**bits,)
    assert torch.equal(entries[codes.long()], table)
    assert torch.equal(entries[: 2**bits - 1], table.unique())
    assert float(entries[-1]) == 1.0


@pytest.mark.parametrize("bits", range(2, 8))
def test_a_middle_that_is_almost_zero_is_an_entry_beside_zero(bits):
    """torch.linspace(-1, 1, 7) has 6e-8 in its middle where vector code computes it: bitsandbytes' tables may, too."""
    table = linear_map(bits, zero=6e-8)
    entries, codes = compact(table, bits)
    assert torch.equal(entries[codes.long()], table)
    assert len(entries.unique()) == 2**bits


def test_the_places_of_the_hand_over_note():
    """Three bits lie at 0 to 2 and 252 to 255; leaving out zeros, as the note did, would lose the entry zero."""
    entries, codes = compact(linear_map(3))
    assert codes[[0, 1, 2, 252, 253, 254, 255]].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert 0.0 in entries.tolist()


def test_tables_in_any_order_and_front_loaded():
    table = torch.zeros(256)
    table[:16] = torch.tensor(
        [0, 1 / 192, 2 / 3, 1, 1 / 3, 0.5, 1 / 6, 0.25, -0.0, -1 / 192, -2 / 3, -1, -1 / 3, -0.5, -1 / 6, -0.25]
    )
    entries, codes = compact(table)
    assert entries.shape == (16,)  # 15 values, as both zeros are one
    assert torch.equal(entries[codes.long()], table)
    assert torch.equal(entries, entries.sort().values)


def test_full_tables_stay_what_they_are():
    table = torch.linspace(-1, 1, 256)
    entries, codes = compact(table)
    assert torch.equal(entries, table)
    assert torch.equal(codes, torch.arange(256).to(torch.uint8))


def test_what_cannot_be_compacted():
    with pytest.raises(OptionError, match="has 15 entries, which 3 bits cannot count; use 4 bits"):
        compact(linear_map(4), 3)
    with pytest.raises(OptionError, match="NaN or infinity"):
        compact(torch.tensor([0.0, torch.nan]))


@pytest.mark.parametrize("devices", [["cpu"], ["cpu", "cpu"], ["cpu"] * 5])
@pytest.mark.parametrize(
    "options",
    [
        KbitOptions(3, 32),
        KbitOptions(4, 32, "nf", "absmax", rounding="stochastic", seed=3),
        KbitOptions(4, 32, "learned", "search", "float32", scale_bits=8, candidates=3),
        KbitOptions(4, 32, "nf", "absmax", flat=True),
        KbitOptions(2, 32, "user", "signed", entries="1/-1/-0.25/0.25"),
    ],
    ids=lambda options: f"{options.codebook}-{options.scale}-{options.rounding}-{options.flat}",
)
@pytest.mark.parametrize("columns", [64, 80])
def test_shares_of_rows_have_the_bits_of_the_whole(devices, options, columns):
    weight = torch.randn(4, columns, generator=torch.Generator().manual_seed(1))
    calibration = Calibration(importance=torch.rand(columns, generator=torch.Generator().manual_seed(2)))
    expected = KbitQuantizer().quantize(weight, options, calibration)
    assert_same_quantized(quantize_over(weight, options, devices, calibration), expected, str(devices))


def test_shares_refuse_what_the_whole_refuses():
    with pytest.raises(WeightError, match="NaN or infinity"):
        quantize_over(torch.full((4, 64), torch.nan), KbitOptions(codebook="nf"), ["cpu", "cpu"])
    with pytest.raises(OptionError, match="at least one device"):
        quantize_over(torch.zeros(4, 64), KbitOptions(), [])
