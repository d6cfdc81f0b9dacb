"""``AutoRoundQuantizer``: rounds to nearest on AutoRound's grids; ``lowbit_autoround.grids`` has the formulas."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowbit import Calibration, QuantizedTensor, Quantizer, ScaleFormat, Scheme
from lowbit.errors import WeightError
from lowbit.grids import empty_parts
from lowbit.scheme import Grid, Zero
from lowbit.workers import map_ranges
from lowbit_autoround import grids
from lowbit_autoround.options import AutoRoundOptions

PIECE = 1 << 20
SEARCH_PIECE = 1 << 19
LEAST_IMPORTANCE = 1e-4  # of the mean: an input that calibration never saw may still occur


class AutoRoundQuantizer(Quantizer[AutoRoundOptions]):
    """Integers of 1 to 8 bits with a scale, and where not symmetric a zero or a minimum, for each group."""

    name: ClassVar[str] = "autoround"
    Options = AutoRoundOptions

    def scheme(self, options: AutoRoundOptions) -> Scheme:
        """Return an affine scheme; the options were checked when they were made."""
        zero = Zero.SYMMETRIC if options.symmetric else Zero(options.zero)
        return Scheme(Grid.AFFINE, options.bits, options.group_size, zero, ScaleFormat(options.scale_dtype))

    def quantize(
        self, weight: Tensor, options: AutoRoundOptions, calibration: Calibration | None = None
    ) -> QuantizedTensor:
        """Quantize ``weight`` (out, in). Importance, when calibrated, weights the error that a search makes least.

        Raises WeightError for NaN or infinity, and for a scale or minimum that ``scale_dtype`` cannot hold.
        """
        scheme, (rows, columns) = self.scheme(options), weight.shape
        grid = _grid(scheme)
        importance = _importance(calibration, weight)
        parts = empty_parts(scheme, (rows, columns), str(weight.device))
        spans = _spans(columns, min(scheme.group_size or columns, columns))

        def work(start: int, stop: int) -> None:
            for span in spans:
                groups = weight[start:stop, span.columns].float().contiguous().view(stop - start, -1, span.size)
                if options.scale == "search":
                    weights = None if importance is None else importance[span.columns].view(-1, span.size)
                    parameters = grid.searched(groups, weights)
                else:
                    parameters = grid.plain(groups)
                parts["codes"][start:stop, span.columns] = grid.codes(groups, parameters).view(stop - start, -1)
                for name, values in parameters.items():
                    parts[name][start:stop, span.groups] = values

        piece = SEARCH_PIECE if options.scale == "search" else PIECE
        map_ranges(work, rows, columns, piece=piece if weight.device.type == "cpu" else rows * columns)
        return QuantizedTensor(scheme, (rows, columns), parts)


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


def _grid(scheme: Scheme) -> grids.Grid:
    kinds: dict[Zero, type[grids.SymmetricGrid | grids.IntegerGrid | grids.MinimumGrid]] = {
        Zero.SYMMETRIC: grids.SymmetricGrid,
        Zero.INTEGER: grids.IntegerGrid,
        Zero.MINIMUM: grids.MinimumGrid,
    }
    return kinds[scheme.zero](scheme.bits, getattr(torch, scheme.scales.dtype))


def _importance(calibration: Calibration | None, weight: Tensor) -> Tensor | None:
    """Return the importance of each column relative to the mean, float32 (in,) on the weight's device, if it was measured."""
    if calibration is None or calibration.importance is None:
        return None
    measured = calibration.importance.to(weight.device, torch.float64)
    assert measured.shape == weight.shape[1:], (measured.shape, weight.shape)
    if not bool(torch.isfinite(measured).all()):
        raise WeightError("has calibration inputs that are NaN or infinite; calibrate again in bfloat16 or float32")
    return (measured / measured.mean().clamp_min(1e-30)).clamp_min(LEAST_IMPORTANCE).float()
