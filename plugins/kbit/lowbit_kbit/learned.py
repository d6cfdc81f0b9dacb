"""The codebook ``learned``: Lloyd-Max on the tensor itself, for the way in which its scales are chosen.

The squared error of a weight is s^2 (w/s - entry)^2, so an entry is the mean of the normalized weights nearest to it, weighted by
s^2 (and by importance): the weighted Lloyd iteration of BOF4 (arXiv 2505.06653), there for absmax and signed absmax. With ``search``
scales and entries depend on each other: they are fitted in turn.

Fitted to a sample of whole groups, drawn by ``seed``, in float64 on the CPU: the same bits on every device.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from lowbit.errors import OptionError
from lowbit.workers import map_ranges
from lowbit_kbit.arithmetic import absmax, check_finite, reciprocals, signed_absmax, store
from lowbit_kbit.encoders import make_encoder
from lowbit_kbit.options import KbitOptions
from lowbit_kbit.search import candidate_factors, search_scales

SAMPLE = 1 << 16
SAMPLE_PER_ENTRY = 2048
"""Weights to fit to: at least SAMPLE, and this many for each entry. Fitting to 16 times as many lowers the error by less than 0.4 %,
and by 0.9 % at 8 bits with searched scales (1024x4096 Gaussian and Student-t weights, 2026-11-21)."""
FEWEST_GROUPS = 64
PIECE = 1 << 15  # weights that one thread searches at a time
ROUNDS = 6
STEPS = 40
BINS_PER_ENTRY = 8


def learn_codebook(weight: Tensor, size: int, options: KbitOptions, importance: Tensor | None) -> Tensor:
    """Return a codebook for ``weight`` (out, in) in groups of ``size``: float32 ``(2**bits,)``, ascending, on the CPU.

    ``importance`` is float32 (in,) or None. Raises WeightError when the sample holds NaN or infinity.
    """
    groups, weights = _sample(weight, size, options, importance)
    extremes = absmax(groups) if options.scale == "absmax" else signed_absmax(groups)
    check_finite(extremes)
    plain = store(extremes, getattr(torch, options.scale_dtype))
    codebook = _fit(groups, plain, weights, options.bits)
    if options.scale != "search":
        return codebook
    for _ in range(ROUNDS):
        codebook = codebook / codebook.abs().max()  # only entry * scale counts, and candidates are relative to 1
        scales = _searched(groups, extremes, codebook, options, weights)
        codebook = _fit(groups, scales, weights, options.bits, codebook)
    return codebook / codebook.abs().max()


def with_shared_codebook(weights: Iterable[Tensor], options: KbitOptions) -> KbitOptions:
    """Return ``options`` with one codebook fitted to all ``weights`` (out, in), as ``codebook=user``: a model's instead of a tensor's.

    Every weight counts alike: its sample is divided by its root mean square. Raises OptionError without weights, or for whole rows
    as groups when these differ in length; WeightError for NaN or infinity.
    """
    pieces = []
    for weight in weights:
        size = min(options.group_size or weight.shape[1], weight.shape[1])
        groups, _ = _sample(weight, size, options, None)
        check_finite(groups)
        pieces.append(
            (groups / groups.square().mean().sqrt().clamp_min(torch.finfo(torch.float32).tiny)).view(-1, size)
        )
    if len({piece.shape[1] for piece in pieces}) != 1:
        raise OptionError(
            "a shared codebook needs weights whose groups have one size; give group_size, and one weight or more"
        )
    codebook = learn_codebook(torch.cat(pieces), pieces[0].shape[1], options, None)
    entries = codebook.clamp(-1, 1).tolist()  # a scale that was rounded down leaves an entry a little beyond
    return replace(options, codebook="user", entries="/".join(map(repr, entries)))


def _sample(weight: Tensor, size: int, options: KbitOptions, importance: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return float32 groups (count, 1, size), one from each of ``count`` equal stretches of the tensor, and their importance.

    A short last group is left out.
    """
    per_row = weight.shape[1] // size
    total = weight.shape[0] * per_row
    wanted = max(SAMPLE, SAMPLE_PER_ENTRY * 2**options.bits)
    count = min(total, max(FEWEST_GROUPS, wanted // size))
    jitter = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(options.seed))
    chosen = ((torch.arange(count) + jitter) * (total / max(1, count))).long().clamp_(max=total - 1)
    rows = (chosen // per_row)[:, None]
    columns = (chosen % per_row)[:, None] * size + torch.arange(size)  # (count, size)
    groups = weight[rows.to(weight.device), columns.to(weight.device)].float().cpu()
    return groups[:, None], None if importance is None else importance.cpu()[columns][:, None]


def _searched(
    groups: Tensor, extremes: Tensor, codebook: Tensor, options: KbitOptions, importance: Tensor | None
) -> Tensor:
    """Return the scales (count, 1) that a search finds with ``codebook``."""
    encoder = make_encoder(codebook)
    factors = candidate_factors(encoder, options.candidates)
    dtype = getattr(torch, options.scale_dtype)

    def work(start: int, stop: int) -> Tensor:
        weights = None if importance is None else importance[start:stop]
        return search_scales(groups[start:stop], extremes[start:stop], encoder, factors, dtype, weights)

    return torch.cat(map_ranges(work, len(groups), groups.shape[-1], piece=PIECE))


def _fit(
    groups: Tensor, scales: Tensor, importance: Tensor | None, bits: int, codebook: Tensor | None = None
) -> Tensor:
    """Return the codebook of least weighted error for groups (count, 1, size) with stored scales (count, 1), by Lloyd's steps.

    Starts from ``codebook``, or from the companded one. The weights are sorted once; then a step needs only the running sums at the
    midpoints.
    """
    x = (groups * reciprocals(scales)[..., None]).view(-1)
    mass = scales.double().square()[..., None].expand(groups.shape)
    if importance is not None:
        mass = mass * importance
    x, order = x.sort(stable=True)
    x, mass = x.double(), mass.reshape(-1)[order]
    entries = _companded(x, mass, bits) if codebook is None else codebook.double()
    return _lloyd(x, mass, entries).float()


def _companded(x: Tensor, mass: Tensor, bits: int) -> Tensor:
    """Return entries spaced by the cube root of the density of ``mass`` over ascending ``x``: nearly optimal for many entries.

    Source: Panter and Dite 1951, Bennett 1948. Lloyd's steps from equal spacing or from quantiles take thousands at 8 bits.
    """
    low, high = float(x[0]), float(x[-1])
    bins = 2**bits * BINS_PER_ENTRY
    width = (high - low) / bins or 1.0
    density = torch.zeros(bins, dtype=torch.float64)
    density.index_add_(0, ((x - low) / width).long().clamp_(max=bins - 1), mass)
    share = density.pow(1 / 3).cumsum(0)
    wanted = (torch.arange(2**bits, dtype=torch.float64) + 0.5) / 2**bits * share[-1]
    return low + width * (torch.searchsorted(share, wanted).double() + 0.5)


def _lloyd(x: Tensor, mass: Tensor, entries: Tensor) -> Tensor:
    """Move every entry to the mean of what is nearest to it, STEPS times. One that has nothing stays, so the order stays."""
    start = torch.zeros(1, dtype=torch.float64)
    mass_below = torch.cat((start, mass.cumsum(0)))
    moment_below = torch.cat((start, (mass * x).cumsum(0)))
    for _ in range(STEPS):
        inner = torch.searchsorted(x, (entries[1:] + entries[:-1]) / 2)
        edges = torch.cat((torch.zeros(1, dtype=torch.int64), inner, torch.tensor([len(x)])))
        share, moment = mass_below[edges].diff(), moment_below[edges].diff()
        entries = torch.where(share > 0, moment / share, entries)
    return entries
