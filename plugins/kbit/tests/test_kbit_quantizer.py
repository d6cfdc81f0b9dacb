"""What ``kbit`` does beyond the contract: dtypes, devices of rows and threads, groups, refusals, importance, options."""

import dataclasses

import pytest
import torch

from lowbit import Calibration, dequantize
from lowbit.errors import OptionError, WeightError
from lowbit.plugins import registry
from lowbit.testing.contracts.checks import assert_same_quantized
from lowbit_kbit import quantizer as module
from lowbit_kbit.options import KbitOptions
from lowbit_kbit.quantizer import KbitQuantizer

QUANTIZER = KbitQuantizer()
EVERY_KIND = [
    KbitOptions(3, 32, "int", "absmax"),
    KbitOptions(4, 32, "nf", "absmax"),
    KbitOptions(4, 32, "fp", "signed"),
    KbitOptions(3, 32, "learned", "signed"),
    KbitOptions(3, 32, "learned", "search", candidates=4),
]
kinds = pytest.mark.parametrize("options", EVERY_KIND, ids=lambda options: f"{options.codebook}-{options.scale}")


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def squares(weight, result):
    return (dequantize(result) - weight.float()).double().square()


@kinds
def test_equal_values_of_any_dtype_give_the_same_bits(options):
    weight = gaussian(8, 96).bfloat16()
    weight = weight.half().bfloat16()  # representable in both
    results = [QUANTIZER.quantize(weight.to(dtype), options) for dtype in (torch.float32, torch.bfloat16, torch.half)]
    assert_same_quantized(results[1], results[0], "bfloat16")
    assert_same_quantized(results[2], results[0], "float16")


@kinds
def test_pieces_and_strides_change_nothing(options, monkeypatch):
    weight = gaussian(64, 80)  # a ragged last group
    whole = QUANTIZER.quantize(weight, options)
    padded = torch.zeros(128, 100)
    padded[::2, 10:90] = weight
    assert_same_quantized(QUANTIZER.quantize(padded[::2, 10:90], options), whole, "a view")
    monkeypatch.setattr(module, "PIECE", 3 * 80)
    monkeypatch.setattr(module, "SEARCH_PIECE", 5 * 80)
    assert_same_quantized(QUANTIZER.quantize(weight, options), whole, "small pieces")


@kinds
def test_the_short_last_group_stands_alone(options):
    weight, fixed = gaussian(4, 32 + 20), dataclasses.replace(options, codebook="nf")
    result = QUANTIZER.quantize(weight, fixed)
    head, tail = QUANTIZER.quantize(weight[:, :32], fixed), QUANTIZER.quantize(weight[:, 32:], fixed)
    for part in ("codes", "scales"):
        assert torch.equal(result.parts[part], torch.cat((head.parts[part], tail.parts[part]), 1))


@kinds
def test_zero_groups_decode_to_zero_with_the_entry_nearest_to_zero(options):
    weight = gaussian(4, 64)
    weight[1, 32:] = 0
    result = QUANTIZER.quantize(weight, options)
    assert result.parts["scales"][1, 1].item() == 0
    assert not dequantize(result)[1, 32:].any()
    nearest = result.parts["codebook"].abs().min()
    assert (result.parts["codebook"][result.parts["codes"][1, 32:].long()].abs() == nearest).all()


@pytest.mark.parametrize("codebook", ["nf", "fp", "learned"])
@pytest.mark.parametrize("scale", ["signed", "search"])
def test_constant_groups_are_exact_to_the_rounding_of_the_scale(codebook, scale):
    weight = torch.tensor([[0.1], [-7.3], [1000.0]]).repeat(1, 32)
    decoded = dequantize(QUANTIZER.quantize(weight, KbitOptions(4, 16, codebook, scale)))
    torch.testing.assert_close(decoded, weight, rtol=2**-11, atol=0)


def test_a_searched_scale_is_never_worse_than_the_absmax():
    weight = gaussian(64, 256).square() * gaussian(64, 256, seed=1)
    for codebook in ("int", "nf", "fp"):
        for bits in (2, 3, 4, 6, 8):
            options = KbitOptions(bits, 64, codebook, "absmax", "float32")
            plain = squares(weight, QUANTIZER.quantize(weight, options)).view(64, 4, 64).sum(-1)
            found = QUANTIZER.quantize(weight, dataclasses.replace(options, scale="search"))
            found = squares(weight, found).view(64, 4, 64).sum(-1)
            energy = weight.view(64, 4, 64).double().square().sum(-1)
            # The scores are float32 sums of 64 terms, 7 roundings each: they may confuse errors that differ by less.
            assert (found <= plain + 16 * 2**-24 * energy).all()
            assert found.sum() < plain.sum()


@pytest.mark.parametrize(("codebook", "scale"), [("int", "search"), ("learned", "signed"), ("learned", "search")])
def test_importance_lowers_the_weighted_error(codebook, scale):
    importance = torch.where(torch.arange(128) % 8 == 0, 100.0, 1.0)
    weight = gaussian(256, 128) * torch.where(importance > 1, 0.3, 1.0)
    options = KbitOptions(3, 64, codebook, scale)
    plain = squares(weight, QUANTIZER.quantize(weight, options))
    weighted = squares(weight, QUANTIZER.quantize(weight, options, Calibration(importance=importance)))
    assert (weighted * importance).sum() < 0.95 * (plain * importance).sum()


def test_constant_importance_changes_nothing():
    weight = gaussian(16, 128)
    for options in EVERY_KIND[3:]:
        constant = Calibration(importance=torch.full((128,), 3.5))
        assert_same_quantized(
            QUANTIZER.quantize(weight, options, constant), QUANTIZER.quantize(weight, options), "constant importance"
        )


def test_broken_importance_is_refused():
    broken = Calibration(importance=torch.full((64,), torch.nan))
    with pytest.raises(WeightError, match="calibration"):
        QUANTIZER.quantize(gaussian(4, 64), KbitOptions(scale="search"), broken)


@kinds
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_weights_are_refused_with_words_for_a_name(options, value):
    weight = gaussian(4, 80)
    weight[3, 79] = value
    with pytest.raises(WeightError, match=r"^holds NaN or infinity; .*PATTERN=none"):
        QUANTIZER.quantize(weight, options)


@kinds
def test_scales_beyond_the_dtype_are_refused_with_the_way_out(options):
    weight = gaussian(4, 64)
    weight[2, 5] = -70000.0
    with pytest.raises(WeightError, match="70000, beyond 65504, the largest float16; set scale_dtype to bfloat16 or"):
        QUANTIZER.quantize(weight, options)
    for dtype in ("bfloat16", "float32"):
        result = QUANTIZER.quantize(weight, dataclasses.replace(options, scale_dtype=dtype))
        result.validate()
    with pytest.raises(WeightError, match=r"set scale_dtype to float32$"):
        QUANTIZER.quantize(weight * 4.86e33, dataclasses.replace(options, scale_dtype="bfloat16"))


def test_a_search_stays_within_the_dtype():
    weight = torch.full((1, 32), 65504.0)
    weight[0, ::2] *= -0.9
    result = QUANTIZER.quantize(weight, KbitOptions(2, 32, "int", "search"))
    result.validate()
    assert (dequantize(result) - weight).abs().max() < 20000


def test_the_seed_chooses_the_sample_of_a_learned_codebook(monkeypatch):
    monkeypatch.setattr("lowbit_kbit.learned.SAMPLE", 1 << 12)
    monkeypatch.setattr("lowbit_kbit.learned.SAMPLE_PER_ENTRY", 64)
    weight = gaussian(256, 256)
    books = [QUANTIZER.quantize(weight, KbitOptions(seed=seed)).parts["codebook"] for seed in (0, 0, 1)]
    assert torch.equal(books[0], books[1])
    assert not torch.equal(books[0], books[2])


def test_a_learned_codebook_is_a_fixed_point():
    """Every entry is the mean, weighted by the squared scales, of the normalized weights that it stands for."""
    weight = gaussian(64, 512)
    result = QUANTIZER.quantize(weight, KbitOptions(3, 64, "learned", "signed", "float32"))
    scales = result.parts["scales"].double().repeat_interleave(64, 1)
    x, mass = weight.double() / scales, scales.square()
    for code, entry in enumerate(result.parts["codebook"].flatten().tolist()):
        members = result.parts["codes"] == code
        mean = float((x * mass)[members].sum() / mass[members].sum())
        assert mean == pytest.approx(entry, abs=2e-3)


def test_few_distinct_weights_are_learned_exactly():
    levels = torch.tensor([-1.0, -0.25, 0.5, 1.0])
    weight = levels[torch.randint(4, (32, 256), generator=torch.Generator().manual_seed(0))]
    result = QUANTIZER.quantize(weight, KbitOptions(2, 64, "learned", "absmax"))
    assert squares(weight, result).max() < 1e-10


def test_scheme_and_registration():
    found = registry(__import__("lowbit_kbit")).quantizers["kbit"]
    assert isinstance(found, KbitQuantizer)
    assert found.scheme(KbitOptions(3, None)).summary() == "codebook 3-bit per-channel"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"bits": 1}, "bits must be 2 to 8, got 1"),
        ({"bits": 9}, "bits must be 2 to 8, got 9"),
        ({"group_size": 15}, "group_size must be 16 to 4096, or none for the whole row, got 15"),
        ({"group_size": 4097}, "got 4097"),
        ({"codebook": "af4"}, "codebook must be one of int, nf, fp, learned, user, got 'af4'"),
        ({"scale": "max"}, "scale must be one of absmax, signed, search, got 'max'"),
        ({"scale_dtype": "float8_e4m3fn"}, "scale_dtype must be one of"),
        ({"candidates": 1}, "candidates must be 2 to 256, got 1"),
        ({"rounding": "up"}, "rounding must be one of nearest, stochastic, got 'up'"),
        ({"scale_bits": 3}, "scale_bits must be 4 to 8, or none for a float each, got 3"),
        ({"codebook": "user"}, "entries goes with codebook=user, got codebook=user and entries=None"),
        ({"entries": "-1/1"}, "entries goes with codebook=user, got codebook=learned and entries=-1/1"),
        (
            {"bits": 2, "codebook": "user", "entries": "-1/0/1"},
            "must be 4 numbers for 2 bits, from -1 to 1 and not all 0",
        ),
        ({"bits": 2, "codebook": "user", "entries": "-1/0/1/2"}, "got '-1/0/1/2'"),
        ({"bits": 2, "codebook": "user", "entries": "-1/0/1/nan"}, "got '-1/0/1/nan'"),
        ({"bits": 2, "codebook": "user", "entries": "-1/0/1/x"}, "got '-1/0/1/x'"),
    ],
)
def test_options_that_make_no_sense_are_refused(settings, words):
    with pytest.raises(OptionError, match=words):
        KbitOptions(**settings)
