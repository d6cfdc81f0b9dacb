"""``GgmlQuantizer``: weights to the types of llama.cpp, with its weightings and searches, as whole pieces of torch tensors."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, cast

import torch
from torch import Tensor

from lowbit.errors import SchemeError
from lowbit.interfaces import Calibration, Quantizer
from lowbit.parts import part_specs
from lowbit.scheme import Scheme
from lowbit.tensors import QuantizedTensor
from lowbit.workers import map_ranges
from lowbit_formats.ggml.encoders import CHECKING, ENCODERS, ROUNDED
from lowbit_formats.ggml.limits import check_weights
from lowbit_formats.ggml.options import TYPES, GgmlOptions, TypeName
from lowbit_formats.ggml.weighting import relative_importance
from lowbit_formats.gguf.layouts import PACKERS

PIECE = 1 << 19
"""Weights in a piece: larger ones do not stay in the cache, smaller ones lose to the cost of calls."""
ROUNDED_PIECE = 1 << 20
"""For types that are rounded with few arrays: a call costs 7 us, twice that while another thread wants to make one."""

PACKER_OF = {packer.type.name.lower(): packer for packer in PACKERS}


class GgmlQuantizer(Quantizer[GgmlOptions]):
    """Quantizes to a ggml type; an importance matrix (``calibration.importance``) is used where it is given."""

    name: ClassVar[str] = "ggml"
    Options = GgmlOptions

    def scheme(self, options: GgmlOptions) -> Scheme:
        """Return the only scheme that the type holds."""
        return PACKER_OF[options.type].scheme

    def fit(self, options: GgmlOptions, scheme: Scheme) -> GgmlOptions | None:
        """Return the type that holds ``scheme``: the one asked for if it does, else the first."""
        types = [name for name in TYPES if PACKER_OF[name].scheme == scheme]
        if not types:
            return None
        return options if options.type in types else replace(options, type=cast(TypeName, types[0]))

    def codebook(self, options: GgmlOptions) -> Tensor | None:
        """Return the table of the type, if it has one."""
        return PACKER_OF[options.type].codebook

    def quantize(self, weight: Tensor, options: GgmlOptions, calibration: Calibration | None = None) -> QuantizedTensor:
        """Quantize ``weight`` (out, in), pieces of rows in parallel.

        Raises WeightError for NaN, infinity or a weight beyond float16, and SchemeError for rows that are not whole blocks or
        an importance of another length.
        """
        packer, shape = PACKER_OF[options.type], (weight.shape[0], weight.shape[1])
        if reason := packer.why_not(packer.scheme, shape):
            raise SchemeError(reason)
        encode, importance = ENCODERS[options.type], _importance(calibration, weight)
        parts = {
            name: torch.empty(spec.shape, dtype=spec.dtype, device=weight.device)
            for name, spec in part_specs(packer.scheme, shape).items()
        }

        def work(start: int, stop: int) -> None:
            x = weight[start:stop].to(torch.float32).contiguous()
            if options.type not in CHECKING:
                check_weights(x)
            for name, values in encode(x, importance).items():
                view = parts[name][0, start:stop] if packer.scheme.binary else parts[name][start:stop]
                view.copy_(values.view(view.shape))

        piece = ROUNDED_PIECE if options.type in ROUNDED and importance is None else PIECE
        map_ranges(work, *shape, piece=piece if weight.device.type == "cpu" else max(1, weight.numel()), join=True)
        if packer.codebook is not None:
            parts["codebook"] = packer.codebook.to(weight.device)
        return QuantizedTensor(packer.scheme, shape, parts)


def _importance(calibration: Calibration | None, weight: Tensor) -> Tensor | None:
    if calibration is None or calibration.importance is None:
        return None
    measured = calibration.importance
    if measured.shape != weight.shape[1:]:
        raise SchemeError(
            f"the importance matrix has {measured.numel()} columns and the weight {weight.shape[1]}; it belongs to another model"
        )
    if not bool(((measured >= 0) & torch.isfinite(measured)).all()):
        raise SchemeError("the importance matrix holds a value that is negative, NaN or infinite; make it again")
    return relative_importance(measured).to(weight.device)
