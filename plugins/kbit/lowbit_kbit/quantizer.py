"""``KbitQuantizer``: groups, scales, codes. The exact arithmetic is specified in ``lowbit_kbit.arithmetic``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowbit import Calibration, QuantizedTensor, Quantizer, ScaleFormat, Scheme
from lowbit.errors import WeightError
from lowbit.scheme import Grid
from lowbit.workers import map_ranges
from lowbit_kbit.arithmetic import absmax, check_finite, reciprocals, signed_absmax, store
from lowbit_kbit.codebooks import fixed_codebook, is_antisymmetric
from lowbit_kbit.encoders import Encoder, make_encoder
from lowbit_kbit.learned import learn_codebook
from lowbit_kbit.options import KbitOptions
from lowbit_kbit.search import candidate_factors, search_scales

PIECE = 1 << 20
SEARCH_PIECE = 1 << 19  # smaller pieces lose to the cost of calls, larger ones to the cache
LEAST_IMPORTANCE = 1e-4  # of the mean: an input that calibration never saw may still occur


class KbitQuantizer(Quantizer[KbitOptions]):
    """Blockwise k-bit quantization: a codebook of 2**k entries and a scale for each group."""

    name: ClassVar[str] = "kbit"
    Options = KbitOptions

    def scheme(self, options: KbitOptions) -> Scheme:
        """Return a codebook scheme; the options were checked when they were made."""
        return Scheme(Grid.CODEBOOK, options.bits, options.group_size, scales=ScaleFormat(options.scale_dtype))

    def quantize(self, weight: Tensor, options: KbitOptions, calibration: Calibration | None = None) -> QuantizedTensor:
        """Quantize ``weight`` (out, in). Importance, when calibrated, weights a learned codebook and searched scales.

        Raises WeightError for NaN or infinity, and for a scale that ``scale_dtype`` cannot hold.
        """
        rows, columns = weight.shape
        size = min(options.group_size or columns, columns)
        importance = _importance(calibration, weight)
        if options.codebook == "learned":
            codebook = learn_codebook(weight, size, options, importance).to(weight.device)
        else:
            codebook = fixed_codebook(options.codebook, options.bits).to(weight.device)
        work = _Work(weight, options, size, make_encoder(codebook), importance)
        parts = {"codes": work.codes, "codebook": codebook[:, None], "scales": work.run()}
        return QuantizedTensor(self.scheme(options), (rows, columns), parts)


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
    """One weight being quantized, a piece of rows at a time."""

    def __init__(
        self, weight: Tensor, options: KbitOptions, size: int, encoder: Encoder, importance: Tensor | None
    ) -> None:
        rows, columns = weight.shape
        self.codes = torch.empty((rows, columns), dtype=torch.uint8, device=weight.device)
        self._weight, self._encoder, self._importance = weight, encoder, importance
        self._spans = _spans(columns, size)
        self._dtype: torch.dtype = getattr(torch, options.scale_dtype)
        self._search = options.scale == "search"
        self._factors = candidate_factors(encoder, options.candidates)
        one_sided = options.scale == "absmax" or (self._search and is_antisymmetric(encoder.codebook))
        self._extremes = absmax if one_sided else signed_absmax
        self._scales = torch.empty((rows, -(-columns // size)), dtype=self._dtype, device=weight.device)

    def run(self) -> Tensor:
        """Fill ``codes`` and return the scales (out, groups)."""
        rows, columns = self._weight.shape
        piece = SEARCH_PIECE if self._search else PIECE
        map_ranges(self._rows, rows, columns, piece=piece if self._weight.device.type == "cpu" else rows * columns)
        return self._scales

    def _rows(self, start: int, stop: int) -> None:
        for span in self._spans:
            groups = self._weight[start:stop, span.columns].float().contiguous().view(stop - start, -1, span.size)
            scales = self._scales_of(groups, span)
            x = groups * reciprocals(scales)[..., None]
            self.codes[start:stop, span.columns] = self._encoder.codes(x).view(stop - start, -1)
            self._scales[start:stop, span.groups] = scales

    def _scales_of(self, groups: Tensor, span: _Span) -> Tensor:
        """Return the stored scales (rows, groups)."""
        extremes = self._extremes(groups)
        check_finite(extremes)
        plain = store(extremes, self._dtype)
        if not self._search:
            return plain
        importance = None if self._importance is None else self._importance[span.columns].view(1, -1, span.size)
        return search_scales(groups, extremes, self._encoder, self._factors, self._dtype, importance)


def _importance(calibration: Calibration | None, weight: Tensor) -> Tensor | None:
    """Return the importance of each column relative to the mean, float32 (in,) on the weight's device, if it was measured."""
    if calibration is None or calibration.importance is None:
        return None
    measured = calibration.importance.to(weight.device, torch.float64)
    assert measured.shape == weight.shape[1:], (measured.shape, weight.shape)
    if not bool(torch.isfinite(measured).all()):
        raise WeightError("has calibration inputs that are NaN or infinite; calibrate again in bfloat16 or float32")
    return (measured / measured.mean().clamp_min(1e-30)).clamp_min(LEAST_IMPORTANCE).float()
