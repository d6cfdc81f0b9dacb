"""Generating text: a plain decoding loop with a key-value cache, greedy or sampled from a seed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import OptionError
from lowbit.runtime.graphs import GraphedSteps, can_graph


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen: the most likely one at temperature 0, else drawn from the top of the distribution.

    Attributes:
        temperature: Logits are divided by it before the softmax.
        top_p: Only the most likely tokens that together have this probability can be drawn.
        seed: Seed of the generator; the same seed, model and machine give the same text.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise OptionError(f"temperature must be 0 (greedy) or more, got {self.temperature:g}")
        if not 0 < self.top_p <= 1:
            raise OptionError(f"top-p must lie above 0 and at most be 1, got {self.top_p:g}")

    def choose(self, logits: Tensor, source: torch.Generator) -> int:
        """Return a token for logits (vocabulary,)."""
        if self.temperature == 0:
            return int(logits.argmax())
        likely, tokens = (logits.float() / self.temperature).softmax(-1).sort(descending=True)
        before = likely.cumsum(-1) - likely  # probability of everything more likely
        likely = likely.masked_fill(before >= self.top_p, 0).cpu()
        return int(tokens[int(torch.multinomial(likely, 1, generator=source))])


def stream(
    model: Any, prompt: Sequence[int], limit: int, sampling: Sampling | None = None, stop: Iterable[int] = ()
) -> Iterator[int]:
    """Yield up to ``limit`` tokens that continue ``prompt``, ending before a token of ``stop``.

    Raises OptionError for an empty prompt, or one that leaves no room in the model's context.
    """
    longest = max_context(model)
    if not prompt:
        raise OptionError("the prompt has no tokens; give some text")
    if longest is not None and len(prompt) >= longest:
        raise OptionError(f"the prompt has {len(prompt)} tokens, and the model's context ends at {longest}")
    sampling, ends = sampling or Sampling(), frozenset(stop)
    source = torch.Generator().manual_seed(sampling.seed)
    limit = limit if longest is None else min(limit, longest - len(prompt))
    ids = torch.tensor([list(prompt)], device=model.device)
    steps = GraphedSteps(model, len(prompt) + limit) if can_graph(model) else PlainSteps(model)
    logits = steps.prefill(ids)
    for number in range(limit):
        token = sampling.choose(logits, source)
        if token in ends:
            return
        yield token
        if number + 1 < limit:
            logits = steps.step(token)


class PlainSteps:
    """Runs a model token by token over transformers' growing cache."""

    def __init__(self, model: Any) -> None:
        self.model, self.cache = model, None

    def prefill(self, ids: Tensor) -> Tensor:
        """Run tokens (1, n) and return the logits (vocabulary,) after the last."""
        with torch.inference_mode():
            out = self.model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.cache = out.past_key_values
        logits: Tensor = out.logits[0, -1]
        return logits

    def step(self, token: int) -> Tensor:
        """Run one token and return the logits after it."""
        return self.prefill(torch.tensor([[token]], device=self.model.device))


def max_context(model: Any) -> int | None:
    """Return the longest context that a model's config allows, if it says."""
    config = model.config.get_text_config()
    return getattr(config, "max_position_embeddings", None)


def stop_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Return the tokens that end a text: those of the generation config, and the tokenizer's."""
    said = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = set(said) if isinstance(said, (list, tuple)) else {said}
    return {token for token in (*ends, tokenizer.eos_token_id) if token is not None}


class Detokenizer:
    """Turns tokens into text as they come: characters of several tokens, and spaces, come out whole."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._shown = 0

    def add(self, token: int) -> str:
        """Return the text that this token completes; empty while a character is incomplete."""
        self._tokens.append(token)
        text: str = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        new, self._shown = text[self._shown :], len(text)
        if text.endswith("\n"):  # a fresh start: decoding everything again for each token would be quadratic
            self._tokens, self._shown = [], 0
        return new
