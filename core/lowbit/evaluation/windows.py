"""Cutting a text into windows of tokens, and saying which tokens of each are scored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import OptionError

DEFAULT_CONTEXT = 2048
"""Tokens of a window where the model allows them, as GPTQ and AWQ evaluate."""


@dataclass(frozen=True, slots=True)
class Windows:
    """Windows of ``context`` tokens that start ``stride`` apart; each token is scored once, the very first never.

    Attributes:
        tokens: The whole text, int64 (n,).
        context: Tokens of a window, one at the beginning of the text among them when ``bos`` is given.
        stride: Tokens from one window to the next; equal to the context when windows do not overlap.
        bos: A token to put before each window, which is not scored.
        limit: Use only so many windows.
    """

    tokens: Tensor
    context: int
    stride: int
    bos: int | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.context < 2:
            raise OptionError(f"context must be at least 2 tokens, got {self.context}")
        if not 1 <= self.stride <= self._length:
            raise OptionError(f"stride must be 1 to the context ({self._length} tokens of text), got {self.stride}")
        if self.limit is not None and self.limit < 1:
            raise OptionError(f"the number of windows must be at least 1, got {self.limit}")
        if len(self.tokens) < self._length:
            raise OptionError(
                f"the text has {len(self.tokens)} tokens, less than one window of {self._length}; "
                "give a longer text or a smaller --context"
            )

    @property
    def _length(self) -> int:
        """Tokens of text in a window."""
        return self.context - (self.bos is not None)

    def __len__(self) -> int:
        whole = (len(self.tokens) - self._length) // self.stride + 1
        return whole if self.limit is None else min(whole, self.limit)

    def window(self, index: int) -> tuple[Tensor, int]:
        """Return the tokens of a window (context,), and how many of them, at its end, are scored."""
        start = index * self.stride
        text = self.tokens[start : start + self._length]
        scored = self._length if index == 0 else self.stride
        if self.bos is None:
            return text, min(scored, self._length - 1)
        return torch.cat((torch.tensor([self.bos]), text)), scored


def cut(
    tokenizer: Any,
    text: str,
    longest: int | None,
    context: int | None = None,
    stride: int | None = None,
    limit: int | None = None,
) -> Windows:
    """Tokenize ``text`` as a whole and cut it; a tokenizer that starts texts with a token of its own starts every window so.

    Args:
        tokenizer: Of transformers.
        text: What to score.
        longest: The longest context that the model takes, if it says.
        context: Tokens of a window; by default 2048, or the longest that the model takes.
        stride: Tokens between windows; by default they do not overlap.
        limit: Use only so many windows.

    Raises:
        OptionError: For a context longer than the model's, or a text shorter than one window.
    """
    if context is not None and longest is not None and context > longest:
        raise OptionError(f"the model takes contexts of at most {longest} tokens, got --context {context}")
    context = context or min(DEFAULT_CONTEXT, longest or DEFAULT_CONTEXT)
    start = tokenizer("")["input_ids"]
    bos = start[0] if start and start[0] == tokenizer.bos_token_id else None
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)
    return Windows(tokens, context, stride or context - (bos is not None), bos, limit)
