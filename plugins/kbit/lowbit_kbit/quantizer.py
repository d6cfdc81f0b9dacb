"""``KbitQuantizer``: groups, scales, codes. The exact arithmetic is specified in ``lowbit_kbit.arithmetic``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lowbit import Calibration, QuantizedTensor, Quantizer, ScaleFormat, Scheme
from lowbit.importance import relative_importance
from lowbit.parts import part_specs
from lowbit.scheme import Grid
from lowbit.workers import map_ranges
from lowbit_cuda.available import why_not_cuda
from lowbit_kbit.arithmetic import absmax, check_finite, reciprocals, second_level, signed_absmax, store
from lowbit_kbit.codebooks import fixed_codebook, is_antisymmetric
from lowbit_kbit.encoders import Encoder, make_encoder
from lowbit_kbit.learned import learn_codebook
from lowbit_kbit.nested import NESTED, nest
from lowbit_kbit.options import KbitOptions, user_entries
from lowbit_kbit.rounding import stochastic_codes
from lowbit_kbit.search import candidate_factors, search_scales
from lowbit_kbit.streams import MOST_CODES

PIECE = 1 << 20
SEARCH_PIECE = 1 << 19  # smaller pieces lose to the cost of calls, larger ones to the cache


class KbitQuantizer(Quantizer[KbitOptions]):
    """Blockwise k-bit quantization: a codebook of 2**k entries and a scale for each group."""

    name: ClassVar[str] = "kbit"
    Options = KbitOptions

    def scheme(self, options: KbitOptions) -> Scheme:
        """Return a codebook scheme; the options were checked when they were made."""
        scales = NESTED if options.nested else scale_format(options)
        return Scheme(Grid.CODEBOOK, options.bits, options.group_size, scales=scales, flat=options.flat)

    def fit(self, options: KbitOptions, scheme: Scheme) -> KbitOptions | None:
        """Return options for ``scheme``, with scales in one level, or nested in flat groups; None for other levels."""
        nested = scheme.flat and scheme.scales == NESTED
        if scheme.scales.two_level and not nested:
            return None
        fitted = super().fit(replace(options, nested=False, flat=False, scale_bits=None), scheme)
        return replace(fitted, flat=scheme.flat, nested=nested) if fitted else None

    def codebook(self, options: KbitOptions) -> Tensor | None:
        """Return the entries where they are not fitted to the data: float32 (2**bits, 1)."""
        if options.codebook == "learned":
            return None
        if options.entries is not None:
            return torch.tensor(user_entries(options.entries, options.bits), dtype=torch.float32)[:, None]
        return fixed_codebook(options.codebook, options.bits)[:, None]

    def with_codebook(self, options: KbitOptions, codebook: Tensor) -> KbitOptions | None:
        """Return options with the entries of ``codebook`` (2**bits, 1); None for vectors, and entries beyond -1 to 1.

        Signed scales become absmax: a table that others chose suits both signs, and NF4's error is 3 % higher with signed ones
        (Gaussian weights, 2026-11-21).
        """
        own = self.codebook(options)
        if own is not None and torch.equal(own, codebook):
            return options
        if codebook.shape != (2**options.bits, 1) or float(codebook.abs().max()) > 1:
            return None
        scale = "absmax" if options.scale == "signed" else options.scale
        entries = "/".join(map(repr, codebook.flatten().tolist()))
        return replace(options, codebook="user", entries=entries, scale=scale)

    def quantize(self, weight: Tensor, options: KbitOptions, calibration: Calibration | None = None) -> QuantizedTensor:
        """Quantize ``weight`` (out, in). Importance, when calibrated, weights a learned codebook and searched scales.

        Raises WeightError for NaN or infinity, and for a scale that ``scale_dtype`` cannot hold.
        """
        rows, columns = weight.shape
        size = min(options.group_size or columns, columns)
        importance = relative_importance(calibration, weight)
        codebook = choose_codebook(weight, size, options, importance).to(weight.device)
        encoder = make_encoder(codebook)
        if options.flat and columns % (options.group_size or columns):
            parts = _across_rows(weight, options, encoder)
        else:
            parts = _Work(weight, options, size, encoder, importance).run()
        return self.finish(parts, options, (rows, columns))

    def finish(self, parts: dict[str, Tensor], options: KbitOptions, shape: tuple[int, int]) -> QuantizedTensor:
        """Return the tensor of parts that were made row by row: flat groups in one row, entries in the order they were given."""
        if options.nested:
            parts |= nest(parts["scales"])
        elif options.flat:
            parts["scales"] = parts["scales"].view(1, -1)
        return QuantizedTensor(self.scheme(options), shape, _in_given_order(parts, options))


def choose_codebook(weight: Tensor, size: int, options: KbitOptions, importance: Tensor | None) -> Tensor:
    """Return the codebook for ``weight`` in groups of ``size``: float32 ``(2**bits,)``, ascending, on the CPU."""
    if options.codebook == "learned":
        return learn_codebook(weight, size, options, importance)
    if options.entries is not None:
        return torch.tensor(sorted(user_entries(options.entries, options.bits)), dtype=torch.float32)
    return fixed_codebook(options.codebook, options.bits)


def quantize_rows(
    weight: Tensor,
    options: KbitOptions,
    codebook: Tensor,
    importance: Tensor | None = None,
    first_row: int = 0,
) -> dict[str, Tensor]:
    """Return the parts of some rows of a weight, from ``first_row`` on, with a codebook that was chosen for all of it."""
    columns = weight.shape[1]
    size = min(options.group_size or columns, columns)
    return _Work(weight, options, size, make_encoder(codebook.to(weight.device)), importance, first_row).run()


def _across_rows(weight: Tensor, options: KbitOptions, encoder: Encoder) -> dict[str, Tensor]:
    """Quantize groups of the flattened weight that may cross rows: a row for each full group, then the short one at the end.

    Importance belongs to columns, and here a group has no columns of its own: scales are searched without.
    """
    size = options.group_size
    assert size is not None
    values = weight.reshape(-1)
    full = len(values) // size * size
    pieces = ((0, values[:full].view(full // size, size)), (full // size, values[None, full:]))
    found = [
        _Work(piece, options, piece.shape[1], encoder, None, first_row=start).run()
        for start, piece in pieces
        if piece.numel()
    ]
    return {
        "codes": torch.cat([each["codes"].flatten() for each in found]).view(weight.shape),
        "scales": torch.cat([each["scales"].flatten() for each in found]),
        "codebook": encoder.codebook[:, None],
    }


def _in_given_order(parts: dict[str, Tensor], options: KbitOptions) -> dict[str, Tensor]:
    """Let codes count the entries as the user gave them; they were found for ascending ones."""
    if options.entries is None:
        return parts
    given = torch.tensor(user_entries(options.entries, options.bits), dtype=torch.float32)
    order = given.argsort(stable=True)
    if torch.equal(order, torch.arange(len(order))):
        return parts
    codes = order.to(parts["codes"].device, torch.uint8)[parts["codes"].int()]
    return {**parts, "codes": codes, "codebook": given.to(parts["codebook"].device)[:, None]}


@dataclass(frozen=True, slots=True)
class _Span:
    """Columns whose groups have one size: all full groups of a row, or the short one at its end."""

    columns: slice
    groups: slice
    size: int


def _spans(columns: int, size: int) -> list[_Span]:
    full = columns // size
    spans = [_Span(slice(0, full * size), slice(0, full), size)] if full else []
    if columns % size:
        spans.append(_Span(slice(full * size, columns), slice(full, full + 1), columns % size))
    return spans


class _Work:
    """One weight being quantized, a piece of rows at a time; ``first_row`` says where it starts in the whole weight."""

    def __init__(
        self,
        weight: Tensor,
        options: KbitOptions,
        size: int,
        encoder: Encoder,
        importance: Tensor | None,
        first_row: int = 0,
    ) -> None:
        rows, columns = weight.shape
        self._weight, self._options, self._size = weight, options, size
        self._encoder, self._importance, self._first_row = encoder, importance, first_row
        self._spans = _spans(columns, size)
        self._dtype: torch.dtype = getattr(torch, options.scale_dtype)
        self._search = options.scale == "search"
        self._factors = candidate_factors(encoder, options.candidates)
        self._one_sided = options.scale == "absmax" or (self._search and is_antisymmetric(encoder.codebook))
        scheme = Scheme(Grid.CODEBOOK, options.bits, size, scales=scale_format(options))
        self.parts = {
            name: torch.empty(spec.shape, dtype=spec.dtype, device=weight.device)
            for name, spec in part_specs(scheme, (rows, columns)).items()
        }
        self.parts["codebook"] = encoder.codebook[:, None]

    def run(self) -> dict[str, Tensor]:
        """Return all parts, filled."""
        rows, columns = self._weight.shape
        if self._weight.is_cuda and 0 < rows * columns < MOST_CODES and why_not_cuda(self._weight.device.index) is None:
            self._on_gpu()
        else:
            piece = SEARCH_PIECE if self._search else PIECE
            map_ranges(self._rows, rows, columns, piece=piece if self._weight.device.type == "cpu" else rows * columns)
        return self.parts

    def _rows(self, start: int, stop: int) -> None:
        groups = [self._groups(span, start, stop) for span in self._spans]
        factors = reciprocals(self._fill_scales(groups, start, stop))
        for span, members in zip(self._spans, groups, strict=True):
            x = members * factors[:, span.groups, None]
            self.parts["codes"][start:stop, span.columns] = self._codes(x, span, start).view(stop - start, -1)

    def _on_gpu(self) -> None:
        """The same bits from CUDA kernels (``lowbit_kbit.launches``); searched and two-level scales come from torch."""
        from lowbit_kbit.launches import quantize, why_not_quantize

        weight = self._weight
        if why_not_quantize(weight, self._size):
            weight = weight.clone(memory_format=torch.contiguous_format)
        rule = "given" if self._search or self._options.scale_bits else "absmax" if self._one_sided else "signed"
        scales = self.parts["scales"]
        if rule == "given":
            scales = self._fill_scales([self._groups(span, 0, len(weight)) for span in self._spans], 0, len(weight))
        seed = self._options.seed if self._options.rounding == "stochastic" else None
        codebook, codes = self._encoder.codebook, self.parts["codes"]
        quantize(weight, self._size, rule, codebook, codes, scales.contiguous(), seed, self._first_row)

    def _groups(self, span: _Span, start: int, stop: int) -> Tensor:
        """Return the groups of a span in some rows: float32 (rows, groups, size)."""
        return self._weight[start:stop, span.columns].float().contiguous().view(stop - start, -1, span.size)

    def _codes(self, x: Tensor, span: _Span, start: int) -> Tensor:
        if self._options.rounding == "nearest":
            return self._encoder.codes(x)
        rows = torch.arange(start + self._first_row, start + self._first_row + len(x), device=x.device)
        columns = torch.arange(span.columns.start, span.columns.stop, device=x.device).view(1, -1, span.size)
        places = rows.view(-1, 1, 1) * self._weight.shape[1] + columns
        return stochastic_codes(x, places, self._encoder.codebook, self._options.seed)

    def _fill_scales(self, groups: list[Tensor], start: int, stop: int) -> Tensor:
        """Store the scales of some rows; return what they decode to, float32 (rows, groups)."""
        two_level = self._options.scale_bits is not None
        scales = torch.cat([self._scales_of(each, span) for each, span in zip(groups, self._spans, strict=True)], 1)
        if not two_level:
            self.parts["scales"][start:stop] = scales
            return scales.float()
        assert self._options.scale_bits is not None
        units, steps = second_level(scales, self._options.scale_bits, self._options.signed_scales, self._dtype)
        self.parts["scales"][start:stop], self.parts["super_scales"][start:stop] = units, steps
        return units.float() * steps.float()

    def _scales_of(self, groups: Tensor, span: _Span) -> Tensor:
        """Return the scales (rows, groups): as they are stored, or in float32 when a second level follows."""
        extremes = absmax(groups) if self._one_sided else signed_absmax(groups)
        check_finite(extremes)
        dtype = torch.float32 if self._options.scale_bits else self._dtype
        plain = store(extremes, dtype)
        if not self._search:
            return plain
        importance = None if self._importance is None else self._importance[span.columns].view(1, -1, span.size)
        return search_scales(groups, extremes, self._encoder, self._factors, dtype, importance)


def scale_format(options: KbitOptions) -> ScaleFormat:
    """Return how the scales of these options are stored before they are nested."""
    signed = options.scale_bits is not None and options.signed_scales
    return ScaleFormat(options.scale_dtype, options.scale_bits, signed=signed)
