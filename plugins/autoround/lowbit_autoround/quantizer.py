"""``AutoRoundQuantizer``: rounds to nearest, or tunes the rounding of a whole decoder block, on AutoRound's grids."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowbit import Calibration, QuantizedTensor, Quantizer, ScaleFormat, Scheme
from lowbit.calibration.block import Block
from lowbit.grids import empty_parts
from lowbit.importance import relative_importance
from lowbit.scheme import Grid, Zero
from lowbit.workers import map_ranges
from lowbit_autoround import grids
from lowbit_autoround.blocks import tune_block
from lowbit_autoround.kquants import K_SCHEMES
from lowbit_autoround.options import AutoRoundOptions
from lowbit_autoround.starts import tuned_weight

PIECE = 1 << 20
SEARCH_PIECE = 1 << 19


class AutoRoundQuantizer(Quantizer[AutoRoundOptions]):
    """Integers of 1 to 8 bits with a scale, and where not symmetric a zero or a minimum, for each group."""

    name: ClassVar[str] = "autoround"
    Options = AutoRoundOptions
    needs: ClassVar[frozenset[str]] = frozenset({"block_inputs", "importance"})

    def scheme(self, options: AutoRoundOptions) -> Scheme:
        """Return an affine scheme; the options were checked when they were made."""
        if options.two_level:
            return K_SCHEMES[options.bits]
        zero = Zero.SYMMETRIC if options.symmetric else Zero(options.zero)
        return Scheme(Grid.AFFINE, options.bits, options.group_size, zero, ScaleFormat(options.scale_dtype))

    def fit(self, options: AutoRoundOptions, scheme: Scheme) -> AutoRoundOptions | None:
        """Return options for an affine scheme, GGUF's K-quants among them."""
        if scheme.scales.two_level:
            return options.for_scheme(scheme)
        return super().fit(options, scheme)

    def needs_for(self, options: AutoRoundOptions) -> frozenset[str]:
        """Tuning needs the block's inputs, the recipe opt_rtn an importance matrix, rounding to nearest nothing."""
        if options.tuning.iters:
            return frozenset({"block_inputs"})
        return frozenset({"importance"} if options.recipe == "opt_rtn" else ())

    def sampling(self, options: AutoRoundOptions) -> Mapping[str, int]:
        """Return the recipe's number of calibration sequences and their length."""
        return {"nsamples": options.tuning.nsamples, "seqlen": options.tuning.seqlen}

    def quantize(
        self, weight: Tensor, options: AutoRoundOptions, calibration: Calibration | None = None
    ) -> QuantizedTensor:
        """Round ``weight`` (out, in) to nearest, whatever ``iters`` says: tuning is for whole blocks.

        Importance, when calibrated, weights the error that a search makes least. Raises WeightError for NaN or infinity, and
        for a scale or minimum that ``scale_dtype`` cannot hold.
        """
        scheme, (rows, columns) = self.scheme(options), weight.shape
        importance = relative_importance(calibration, weight)
        if options.two_level:
            start = tuned_weight(weight, scheme, importance, search=True, lr=0.0)
            return start.quantized(start.parts())
        grid, search = _grid(scheme), options.tuning.search
        parts = empty_parts(scheme, (rows, columns), str(weight.device))
        spans = _spans(columns, min(scheme.group_size or columns, columns))

        def work(start: int, stop: int) -> None:
            for span in spans:
                groups = weight[start:stop, span.columns].float().contiguous().view(stop - start, -1, span.size)
                if search:
                    weights = None if importance is None else importance[span.columns].view(-1, span.size)
                    parameters = grid.searched(groups, weights)
                else:
                    parameters = grid.plain(groups)
                parts["codes"][start:stop, span.columns] = grid.codes(groups, parameters).view(stop - start, -1)
                for name, values in parameters.items():
                    parts[name][start:stop, span.groups] = values

        piece = SEARCH_PIECE if search else PIECE
        map_ranges(work, rows, columns, piece=piece if weight.device.type == "cpu" else rows * columns)
        return QuantizedTensor(scheme, (rows, columns), parts)

    def quantize_block(
        self,
        weights: Mapping[str, Tensor],
        options: Mapping[str, AutoRoundOptions],
        calibration: Mapping[str, Calibration],
        block: Block | None = None,
    ) -> dict[str, QuantizedTensor]:
        """Tune the weights whose options say so together, the others rounded beside them; without ``block`` round all.

        Raises OptionError for tuning options that differ within the block, and WeightError when the loss is not finite and
        ``fallback`` is not rtn.
        """
        tuned = [name for name in weights if options[name].tuning.iters] if block is not None else []
        results = {
            name: self.quantize(weight, options[name], calibration.get(name))
            for name, weight in weights.items()
            if name not in tuned
        }
        if tuned and block is not None:
            schemes = {name: self.scheme(options[name]) for name in tuned}
            found = tune_block(block, {name: weights[name] for name in tuned}, options, schemes, calibration, results)
            if found is None:
                found = {name: self.quantize(weights[name], options[name], calibration.get(name)) for name in tuned}
            results |= found
        return {name: results[name] for name in weights}


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
