"""A complete third-party quantizer: ternary weights {-s, 0, +s}, after Li and Liu, "Ternary Weight Networks" (2016).

A weight whose magnitude is above ``threshold`` times its group's mean magnitude becomes +-s, the others 0; the best s for
that choice, in the mean squared sense, is the mean magnitude of the weights that are kept (the paper's equation 6).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lowbit import Calibration, Grid, QuantizedTensor, Quantizer, Scheme, hookimpl
from lowbit.errors import OptionError, WeightError


@dataclass(frozen=True, slots=True)
class TernaryOptions:
    """Options of the quantizer; each becomes ``--set name=value``."""

    group_size: int = field(default=64, metadata={"help": "Weights that share a scale."})
    threshold: float = field(default=0.7, metadata={"help": "Kept above this times the mean magnitude."})

    def __post_init__(self) -> None:
        if self.threshold < 0:
            raise OptionError(f"threshold must not be negative, got {self.threshold}")


class TernaryQuantizer(Quantizer[TernaryOptions]):
    """Keep the large weights of each group as one magnitude, drop the small ones."""

    name = "ternary"
    Options = TernaryOptions

    def scheme(self, options: TernaryOptions) -> Scheme:
        """Three of the four 2-bit codes are in use; code 1 means zero."""
        return Scheme(Grid.AFFINE, bits=2, levels=3, group_size=options.group_size)

    def quantize(
        self, weight: Tensor, options: TernaryOptions, calibration: Calibration | None = None
    ) -> QuantizedTensor:
        """Return codes 0, 1, 2 for -s, 0, +s."""
        if not torch.isfinite(weight).all():
            raise WeightError("the weight holds NaN or infinity; repair the checkpoint")
        rows, columns = weight.shape
        padded = torch.nn.functional.pad(weight.float(), (0, -columns % options.group_size))
        groups = padded.reshape(rows, -1, options.group_size)  # (rows, groups, group_size)
        magnitude = groups.abs()
        kept = magnitude > options.threshold * magnitude.mean(-1, keepdim=True)
        scales = ((magnitude * kept).sum(-1) / kept.sum(-1).clamp(min=1)).half()
        codes = (1 + groups.sign() * kept).reshape(rows, -1)[:, :columns].to(torch.uint8)
        return QuantizedTensor(self.scheme(options), (rows, columns), {"codes": codes, "scales": scales})


@hookimpl
def lowbit_register_quantizers(register: Callable[[Quantizer[Any]], None]) -> None:
    """Register the quantizer."""
    register(TernaryQuantizer())
