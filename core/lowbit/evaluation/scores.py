"""Perplexity, and how far a model's next-token distribution is from a base model's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import OptionError
from lowbit.evaluation.windows import Windows

_POSITIONS = 256  # positions at a time: float32 probabilities of a 128k vocabulary then take 128 MiB


@dataclass(slots=True)
class Score:
    """Sums over the scored tokens of one model.

    Attributes:
        tokens: How many tokens were scored.
        nll: Sum of the negative log likelihoods, in nats.
        divergences: KL(base || model) of each position in nats, float32; empty without a base.
        agreements: Positions where the most likely token is the base's.
    """

    tokens: int = 0
    nll: float = 0.0
    divergences: list[Tensor] = field(default_factory=list)
    agreements: int = 0

    @property
    def perplexity(self) -> float:
        """Return e to the mean negative log likelihood; infinity where that overflows."""
        mean = self.nll / max(1, self.tokens)
        return math.exp(mean) if mean < 700 else math.inf

    @property
    def mean_divergence(self) -> float | None:
        """Mean KL divergence from the base in nats; None without a base."""
        return torch.cat(self.divergences).double().mean().item() if self.divergences else None

    @property
    def divergence_99(self) -> float | None:
        """The 99th percentile of the KL divergence over positions (linear interpolation); None without a base."""
        if not self.divergences:
            return None
        ordered = torch.cat(self.divergences).double().sort().values
        place = 0.99 * (len(ordered) - 1)
        low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
        return (low + (high - low) * (place - math.floor(place))).item()

    @property
    def agreement(self) -> float | None:
        """Share of positions with the base's most likely token; None without a base."""
        return self.agreements / self.tokens if self.divergences else None


def evaluate(
    models: Sequence[Any],
    windows: Windows,
    base: Any | None = None,
    progress: Callable[[int], None] = lambda window: None,
) -> tuple[list[Score], Score | None]:
    """Score several models, and the base, on the same windows; all are in memory at once.

    Logits are turned into float32 before the softmax; sums are float64. ``progress`` is called after each window.

    Raises:
        OptionError: When a model's vocabulary is not the base's.
    """
    scores, base_score = [Score() for _ in models], Score() if base is not None else None
    for index in range(len(windows)):
        tokens, scored = windows.window(index)
        reference = _logits(base, tokens, scored) if base is not None else None
        targets = tokens[-scored:]
        if base_score is not None and reference is not None:
            _add(base_score, reference, targets, None)
        for model, score in zip(models, scores, strict=True):
            _add(score, _logits(model, tokens, scored), targets, reference)
        progress(index)
    return scores, base_score


def _logits(model: Any, tokens: Tensor, scored: int) -> Tensor:
    """Return the logits (scored, vocabulary) that predict the last ``scored`` tokens, on the model's device."""
    with torch.inference_mode():
        logits: Tensor = model(tokens[None].to(model.device), use_cache=False).logits[0]
    return logits[-scored - 1 : -1]


def _add(score: Score, logits: Tensor, targets: Tensor, reference: Tensor | None) -> None:
    if reference is not None and reference.shape != logits.shape:
        raise OptionError(
            f"the base model has a vocabulary of {reference.shape[-1]}, this one of {logits.shape[-1]}; compare models "
            "of the same family"
        )
    for start in range(0, len(targets), _POSITIONS):
        part = slice(start, start + _POSITIONS)
        logs = logits[part].float().log_softmax(-1)
        score.nll -= logs.gather(1, targets[part, None].to(logs.device)).double().sum().item()
        score.tokens += len(logs)
        if reference is not None:
            wanted = reference[part].to(logs.device).float().log_softmax(-1)
            score.divergences.append((wanted.exp() * (wanted - logs)).sum(-1).clamp(min=0).cpu())
            score.agreements += int((wanted.argmax(-1) == logs.argmax(-1)).sum())
