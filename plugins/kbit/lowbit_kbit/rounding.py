"""Stochastic rounding: of the entries around x one is drawn, with the chances that make x the mean.

A random number belongs to an element, not to a moment: it is a function of the seed and of the element's place in the whole
weight (row * in_features + column), so threads, pieces and devices change nothing. In float32, round to nearest even:

    h = mix(low32(place) ^ mix(high32(place) ^ mix(seed)))        u = floor(h / 256) * 2^-24, in [0, 1)
    i = the number of entries but the first that are <= x         the last entry when i is that one (x is beyond, or on it)
    code = i + (entry[i] + u * (entry[i + 1] - entry[i]) < x)     so that an x on an entry stays there

``mix`` is the 32-bit finalizer lowbias32 (Chris Wellons, "Prospecting for Hash Functions", 2018; public domain).
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = (1 << 32) - 1


def mix(values: Tensor) -> Tensor:
    """Return lowbias32 of int64 ``values`` in [0, 2^32), in that range again."""
    values = (values ^ values >> 16) * 0x7FEB352D & _WORD
    values = (values ^ values >> 15) * 0x846CA68B & _WORD  # wraps in int64; the low 32 bits are right
    return values ^ values >> 16


def uniforms(places: Tensor, seed: int) -> Tensor:
    """Return a float32 in [0, 1) for each int64 place of an element."""
    start = mix(torch.tensor(seed & _WORD)).to(places.device)
    bits = mix(places & _WORD ^ mix(places >> 32 ^ start))
    return (bits >> 8).float() * 2.0**-24


def stochastic_codes(x: Tensor, places: Tensor, codebook: Tensor, seed: int) -> Tensor:
    """Return uint8 codes of float32 ``x`` for an ascending codebook ``(2**k,)``; ``places`` int64 has the shape of ``x``."""
    last = len(codebook) - 1
    inner = torch.bucketize(x, codebook[1:], right=True)
    low = inner.clamp(max=last - 1)
    bottom = codebook[low]
    limit = bottom + uniforms(places, seed) * (codebook[low + 1] - bottom)
    return torch.where(inner == last, inner, low + (limit < x)).to(torch.uint8)
