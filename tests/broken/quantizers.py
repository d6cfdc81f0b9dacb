"""A correct small quantizer, and ten that each break one promise; ``must_fail`` names the tests that have to notice."""

import dataclasses
from dataclasses import dataclass

import pytest
import torch

from lowbit import Grid, QuantizedTensor, Quantizer, ScaleFormat, Scheme
from lowbit.errors import OptionError, WeightError
from lowbit.testing import QuantizerContract


@dataclass(frozen=True, slots=True)
class RoundOptions:
    bits: int = 4
    group_size: int = 64

    def __post_init__(self):
        if not 2 <= self.bits <= 8:
            raise OptionError(f"bits must be 2 to 8, got {self.bits}")


class RoundQuantizer(Quantizer[RoundOptions]):
    """Round to nearest on a symmetric grid; absmax scales in float16."""

    name = "round"
    Options = RoundOptions

    def scheme(self, options):
        return Scheme(Grid.AFFINE, options.bits, options.group_size)

    def quantize(self, weight, options, calibration=None):
        self.check(weight)
        rows, columns = weight.shape
        padded = torch.nn.functional.pad(self.prepared(weight).float(), (0, -columns % options.group_size))
        groups = padded.reshape(rows, -1, options.group_size)
        scheme = self.scheme(options)
        scales = self.scales(groups, scheme.midpoint - 1)
        codes = self.codes(groups, scales.float().unsqueeze(-1), scheme)
        codes = codes.reshape(rows, -1)[:, :columns].to(torch.uint8)
        return QuantizedTensor(self.made(options), (rows, columns), {"codes": codes, "scales": scales})

    def check(self, weight):
        if not torch.isfinite(weight).all():
            raise WeightError("the weight holds NaN or infinity")
        if weight.abs().max() > 65504:
            raise WeightError("the weight does not fit float16 scales")

    def prepared(self, weight):
        return weight

    def scales(self, groups, steps):
        return (groups.abs().amax(-1) / steps).half()

    def codes(self, groups, scales, scheme):
        divisors = torch.where(scales == 0, 1, scales)
        low, high = -scheme.midpoint, scheme.code_count - 1 - scheme.midpoint
        return (groups / divisors).round().clamp(low, high) + scheme.midpoint

    def made(self, options):
        return self.scheme(options)


class _Contract(QuantizerContract):
    kind = RoundQuantizer
    bits = 4
    must_fail: frozenset[str] = frozenset()

    @pytest.fixture
    def quantizer(self):
        return self.kind()

    @pytest.fixture
    def options(self):
        return self.kind.Options(bits=self.bits)


class CorrectRound(_Contract):
    pass


class CorrectRoundOfTwoBits(_Contract):
    bits = 2


class Scribbles(RoundQuantizer):
    def prepared(self, weight):
        return weight.div_(1.5).mul_(1.25)


class BrokenScribbles(_Contract):
    kind = Scribbles
    must_fail = frozenset({"test_input_is_left_alone"})


class DividesByZero(RoundQuantizer):
    """A mean of magnitudes, weighted by themselves: 0 / 0 in a group of zeros."""

    def scales(self, groups, steps):
        magnitude = groups.abs()
        return (2 * magnitude.square().sum(-1) / magnitude.sum(-1) / steps).half()


class BrokenDividesByZero(_Contract):
    kind = DividesByZero
    must_fail = frozenset({"test_awkward_weights_stay_finite"})


class Dithers(RoundQuantizer):
    def prepared(self, weight):
        return weight + 0.01 * torch.randn_like(weight)


class BrokenDithers(_Contract):
    kind = Dithers
    must_fail = frozenset({"test_same_input_same_bits"})


class Lies(RoundQuantizer):
    def made(self, options):
        return dataclasses.replace(self.scheme(options), levels=2**options.bits - 1)


class BrokenLies(_Contract):
    kind = Lies
    must_fail = frozenset({"test_scheme_is_known_beforehand", "test_blocks_keep_names_and_schemes"})


class CountsThreads(RoundQuantizer):
    def scales(self, groups, steps):
        return super().scales(groups, steps) * (1 + torch.get_num_threads() / 100)


class BrokenCountsThreads(_Contract):
    kind = CountsThreads
    must_fail = frozenset({"test_threads_change_nothing"})


class ChangesThreads(RoundQuantizer):
    def prepared(self, weight):
        torch.set_num_threads(2)
        return weight


class BrokenChangesThreads(_Contract):
    kind = ChangesThreads
    must_fail = frozenset({"test_threads_change_nothing"})


class AcceptsNan(RoundQuantizer):
    def check(self, weight):
        pass

    def prepared(self, weight):
        return weight.float().nan_to_num(0, 1, -1).clamp(-65504, 65504)


class BrokenAcceptsNan(_Contract):
    kind = AcceptsNan
    must_fail = frozenset({"test_non_finite_weights_are_refused"})


class Overflows(RoundQuantizer):
    def check(self, weight):
        if not torch.isfinite(weight).all():
            raise WeightError("the weight holds NaN or infinity")


class BrokenOverflows(_Contract):
    kind = Overflows
    must_fail = frozenset({"test_weights_beyond_the_scales_are_finite_or_refused"})


class IgnoresStrides(RoundQuantizer):
    def prepared(self, weight):
        return torch.as_strided(weight, weight.shape, (weight.shape[1], 1))


class BrokenIgnoresStrides(_Contract):
    kind = IgnoresStrides
    must_fail = frozenset({"test_strides_change_nothing"})


class WrongSteps(RoundQuantizer):
    """Half of the grid is never used: the error of one bit fewer."""

    def scales(self, groups, steps):
        return super().scales(groups, steps) * 2


class BrokenWrongSteps(_Contract):
    kind = WrongSteps
    must_fail = frozenset({"test_gaussian_error_is_within_budget"})


class IgnoresBits(RoundQuantizer):
    def codes(self, groups, scales, scheme):
        coarse = super().codes(groups, scales, scheme)
        return coarse if scheme.bits <= 4 else (coarse / 2 ** (scheme.bits - 4)).round() * 2 ** (scheme.bits - 4)


class BrokenIgnoresBits(_Contract):
    kind = IgnoresBits
    must_fail = frozenset({"test_every_bit_lowers_the_error"})


class OutOfRange(RoundQuantizer):
    def codes(self, groups, scales, scheme):
        return super().codes(groups, scales, scheme) + 1


class BrokenOutOfRange(_Contract):
    kind = OutOfRange
    must_fail = frozenset({"test_scheme_is_known_beforehand"})

    @pytest.fixture
    def shape(self):
        return 64, 1024


class ViewsItsInput(RoundQuantizer):
    """Scales that are a view of the weight, so that a later write to the weight changes the result."""

    def scheme(self, options):
        return Scheme(Grid.AFFINE, options.bits, options.group_size, scales=ScaleFormat("float32"))

    def scales(self, groups, steps):
        return super().scales(groups, steps).float()

    def quantize(self, weight, options, calibration=None):
        quantized = super().quantize(weight, options, calibration)
        columns = quantized.parts["scales"].shape[1]
        return dataclasses.replace(quantized, parts={**quantized.parts, "scales": weight[:, :columns]})


class BrokenViewsItsInput(_Contract):
    kind = ViewsItsInput
    must_fail = frozenset({"test_input_is_left_alone"})


@dataclass
class LooseOptions:
    bits: int = 4
    group_size: int = 64


class Loose(RoundQuantizer):
    Options = LooseOptions


class BrokenLoose(_Contract):
    kind = Loose
    must_fail = frozenset({"test_options_are_a_frozen_dataclass"})


class FitsNothing(RoundQuantizer):
    def fit(self, options, scheme):
        return dataclasses.replace(options, bits=8)


class BrokenFitsNothing(_Contract):
    kind = FitsNothing
    must_fail = frozenset({"test_options_fit_their_own_scheme"})


class AnnouncesAnother(RoundQuantizer):
    """Says that codes index a table, and gives none of it."""

    def codebook(self, options):
        return torch.linspace(-1, 1, 2**options.bits)[:, None]


class BrokenAnnouncesAnother(_Contract):
    kind = AnnouncesAnother
    must_fail = frozenset({"test_a_codebook_announced_is_the_codebook_given"})


class BrokenForgetsAFixture(QuantizerContract):
    must_fail = frozenset({"test_scheme_is_known_beforehand"})
