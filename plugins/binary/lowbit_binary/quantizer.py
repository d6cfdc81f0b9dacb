"""``BinaryQuantizer``: sums of sign planes with scales for groups and columns, or a product of two sign matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from lowbit import Binary, BinaryForm, Calibration, QuantizedTensor, Quantizer, ScaleFormat, Scheme
from lowbit.grids import empty_parts
from lowbit.importance import relative_importance
from lowbit.scheme import Grid
from lowbit.workers import map_ranges
from lowbit_binary.options import BinaryOptions
from lowbit_binary.product import factorize
from lowbit_binary.storage import check_finite, store
from lowbit_binary.sums import fit_scales, nearest_signs

T = TypeVar("T")
PIECE = 1 << 18
"""Weights in a piece: eight float32 temporaries of it stay in a cache of 8 MB."""
COLUMN_ROUNDS = 3


class BinaryQuantizer(Quantizer[BinaryOptions]):
    """One-bit matrices and floats between them: what XNOR and popcount can multiply by."""

    name: ClassVar[str] = "binary"
    Options = BinaryOptions

    def scheme(self, options: BinaryOptions) -> Scheme:
        """Return a binary scheme; the options were checked when they were made."""
        scales = ScaleFormat(options.scale_dtype)
        if options.form == "product":
            return Scheme(Grid.BINARY, 1, scales=scales, binary=Binary(form=BinaryForm.PRODUCT, rate=options.bits))
        planes = int(options.bits)
        binary = Binary(planes, column_scales=options.column_scales)
        return Scheme(Grid.BINARY, planes, options.group_size, scales=scales, binary=binary)

    def fit(self, options: BinaryOptions, scheme: Scheme) -> BinaryOptions | None:
        """Return options that give ``scheme``: planes of a sum, or the rate of a product."""
        fitted = super().fit(options, scheme)
        if fitted is None or scheme.binary is None:
            return None
        return BinaryOptions(
            bits=scheme.binary.rate or float(scheme.bits),
            group_size=scheme.group_size if scheme.binary.form is BinaryForm.SUM else options.group_size,
            form=scheme.binary.form.value,
            column_scales=scheme.binary.column_scales,
            scale_dtype=fitted.scale_dtype,
            steps=options.steps,
            seed=options.seed,
        )

    def quantize(
        self, weight: Tensor, options: BinaryOptions, calibration: Calibration | None = None
    ) -> QuantizedTensor:
        """Quantize ``weight`` (out, in). Importance, or the diagonal of a Hessian, weights the error that is made least.

        Raises WeightError for NaN or infinity, and for a scale that ``scale_dtype`` cannot hold.
        """
        scheme, shape = self.scheme(options), (weight.shape[0], weight.shape[1])
        importance = relative_importance(calibration, weight, hessian=True)
        if options.form == "product":
            return QuantizedTensor(scheme, shape, factorize(weight, scheme, options, importance))
        work = _Sums(weight, scheme, importance)
        work.run()
        return QuantizedTensor(scheme, shape, work.parts)


@dataclass(frozen=True, slots=True)
class _Span:
    """Columns whose groups have one size: all full groups of a row, or the short one at its end."""

    columns: slice
    groups: slice
    size: int


def _spans(columns: int, size: int) -> Iterator[_Span]:
    full = columns // size
    if full:
        yield _Span(slice(0, full * size), slice(0, full), size)
    if columns % size:
        yield _Span(slice(full * size, columns), slice(full, full + 1), columns % size)


class _Sums:
    """One weight being written as a sum, a piece of rows at a time."""

    def __init__(self, weight: Tensor, scheme: Scheme, importance: Tensor | None) -> None:
        rows, columns = weight.shape
        assert scheme.binary is not None
        self._weight, self._importance, self._binary = weight, importance, scheme.binary
        self._dtype: torch.dtype = getattr(torch, scheme.scales.dtype)
        self._spans = list(_spans(columns, min(scheme.group_size or columns, columns)))
        self._columns = torch.ones(columns, device=weight.device)  # float32, already rounded to the stored dtype
        self.parts = empty_parts(scheme, (rows, columns), str(weight.device))

    def run(self) -> None:
        """Fill ``parts``."""
        if self._binary.column_scales:
            self._columns = self._stored_columns(self._squares().sqrt())
            for _ in range(COLUMN_ROUNDS):
                along, energy = torch.stack(self._over_rows(self._fit_columns)).sum(0)
                self._columns = self._stored_columns(torch.where(energy > 0, along / energy, 1.0))
            self.parts["column_scales"][:] = self._columns.to(self._dtype)
        self._over_rows(self._fit_rows)

    def _over_rows(self, function: Callable[[int, int], T]) -> list[T]:
        rows, columns = self._weight.shape
        return map_ranges(function, rows, columns, piece=PIECE if self._weight.device.type == "cpu" else rows * columns)

    def _squares(self) -> Tensor:
        return torch.stack(self._over_rows(lambda start, stop: self._weight[start:stop].double().square().sum(0))).sum(
            0
        )

    def _stored_columns(self, scales: Tensor) -> Tensor:
        """Return column scales (in,) near a mean of 1, as stored; columns of zeros keep 1."""
        check_finite(scales)
        positive = scales > 0
        mean = scales[positive].mean() if bool(positive.any()) else 1.0
        return torch.where(positive, scales / mean, 1.0).clamp(2.0**-10, 2.0**10).to(self._dtype).float()

    def _fit_rows(self, start: int, stop: int) -> None:
        for span in self._spans:
            signs, scales = self._fit(start, stop, span)
            self.parts["planes"][:, start:stop, span.columns] = signs.view(len(signs), stop - start, -1)
            self.parts["scales"][:, start:stop, span.groups] = scales

    def _fit_columns(self, start: int, stop: int) -> Tensor:
        """Return what the least-squares scale of each column is a quotient of, float64 (2, in): <sum, w> and <sum, sum>."""
        along = torch.zeros(self._weight.shape[1], dtype=torch.float64, device=self._weight.device)
        energy = torch.zeros_like(along)
        for span in self._spans:
            signs, scales = self._fit(start, stop, span)
            values = torch.zeros_like(signs[0], dtype=torch.float32)
            for sign, scale in zip(signs, scales.float()[..., None], strict=True):
                values += torch.where(sign, scale, -scale)
            values = values.view(stop - start, -1).double()
            along[span.columns] = (values * self._weight[start:stop, span.columns]).sum(0)
            energy[span.columns] = values.square().sum(0)
        return torch.stack((along, energy))

    def _fit(self, start: int, stop: int, span: _Span) -> tuple[Tensor, Tensor]:
        """Return signs bool (planes, rows, groups, size) and stored scales (planes, rows, groups)."""
        columns = self._columns[span.columns]
        weight = self._weight[start:stop, span.columns].float()
        check_finite(weight)
        groups = (weight / columns).contiguous().view(stop - start, -1, span.size)
        importance = None if self._importance is None else self._importance[span.columns]
        if self._binary.column_scales:
            importance = columns.square() if importance is None else importance * columns.square()
        weights = None if importance is None else importance.view(-1, span.size)
        scales = store(fit_scales(groups, self._binary.planes, weights), self._dtype)
        return nearest_signs(groups, scales.float()), scales
