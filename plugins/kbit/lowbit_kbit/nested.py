"""Scales quantized once more, as bitsandbytes does it (``compress_statistics``): a byte of a fixed table for each scale.

For the scales ``a`` of a whole weight, float32 in the order of its groups, 256 of them a block (the last perhaps short)::

    offset = float32(mean of a)                    summed in float64, so that no order of summation shows
    top    = largest |a - offset| of a block       1e-38 where it is smaller, as a divisor
    code   = the entry nearest to (a - offset) * (1 / top), the lower one of two
    a'     = table[code] * top + offset

The table is the dynamic 8-bit float of Dettmers (arXiv 1511.04561): seven decades up to 1, each cut into twice as many steps as
the one below, of which the midpoints are the entries; their negatives, 0 and 1. The codes of the weights are those for ``a``, not
for ``a'``, as in bitsandbytes 0.50 (functional.quantize_4bit, create_dynamic_map).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from lowbit import ScaleFormat
from lowbit.scheme import ScaleCoding

BLOCK = 256
"""Scales that share a float of the second level."""
NESTED = ScaleFormat("float32", bits=8, super_group=BLOCK, coding=ScaleCoding.CODEBOOK)
"""How such scales are stored."""
_DECADES = 7
_LEAST = 1e-38


@cache
def dynamic_table() -> Tensor:
    """Return the 256 entries, float32, ascending."""
    positive = []
    for decade in range(_DECADES):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        positive.append((edges[:-1] + edges[1:]) / 2 * 10 ** (decade - _DECADES + 1))
    steps = torch.cat(positive)
    return torch.cat((steps, -steps, torch.tensor([0.0, 1.0]))).sort().values


def nest(scales: Tensor) -> dict[str, Tensor]:
    """Return the parts of nested scales, (1, groups) and so on, for finite float32 scales of any shape, in their order."""
    flat, table = scales.flatten(), dynamic_table().to(scales.device)
    offset = flat.double().mean().float()
    centred = flat - offset
    padded = torch.nn.functional.pad(centred, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    tops = padded.abs().amax(1)
    x = (padded * tops.clamp_min(_LEAST).reciprocal()[:, None]).clamp_(-1, 1)
    codes = torch.bucketize(x, (table[:-1] + table[1:]) / 2).flatten()[: len(flat)]
    return {
        "scales": codes.to(torch.uint8)[None],
        "super_scales": tops[None],
        "scales_codebook": table,
        "scales_offset": offset[None],
    }
