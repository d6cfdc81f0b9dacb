"""One learned codebook for several weights."""

import dataclasses

import pytest
import torch

from lowbit import dequantize
from lowbit.errors import OptionError, WeightError
from lowbit_kbit.learned import with_shared_codebook
from lowbit_kbit.options import KbitOptions, user_entries
from lowbit_kbit.quantizer import KbitQuantizer


def weights(count=3):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(96, 256, generator=generator) * 10.0 ** (index - 1) for index in range(count)]


def error(weight, options):
    found = dequantize(KbitQuantizer().quantize(weight, options))
    return float((found - weight).square().mean() / weight.square().mean())


@pytest.mark.parametrize("scale", ["absmax", "signed", "search"])
def test_a_shared_codebook_serves_every_weight_nearly_as_well_as_its_own(scale):
    options = KbitOptions(3, 64, "learned", scale, "float32", candidates=5)
    shared = with_shared_codebook(weights(), options)
    assert shared == with_shared_codebook(weights(), options)
    assert shared == dataclasses.replace(options, codebook="user", entries=shared.entries)
    for weight in weights():  # a hundred times larger or smaller: each counts alike
        assert error(weight, shared) < 1.03 * error(weight, options)
        assert error(weight, shared) < error(weight, dataclasses.replace(options, codebook="nf"))


def test_one_weight_gets_nearly_its_own_codebook():
    (weight,), options = weights(1), KbitOptions(4, 64, "learned", "absmax", "float32")
    own = KbitQuantizer().quantize(weight, options).parts["codebook"].flatten()
    entries = torch.tensor(user_entries(with_shared_codebook([weight], options).entries, 4))
    torch.testing.assert_close(entries, own, rtol=0, atol=1e-3)


def test_what_has_no_shared_codebook_is_refused():
    with pytest.raises(OptionError, match="one weight or more"):
        with_shared_codebook([], KbitOptions())
    with pytest.raises(OptionError, match="groups have one size"):
        with_shared_codebook([torch.ones(4, 64), torch.ones(4, 128)], KbitOptions(group_size=None))
    with pytest.raises(WeightError, match="NaN or infinity"):
        with_shared_codebook([torch.full((64, 64), float("nan"))], KbitOptions())
