"""Optional packages: a sentence where one is missing."""

from __future__ import annotations

from importlib.util import find_spec

from lowbit.errors import OptionError


def need_transformers(who: str) -> None:
    """Raise OptionError when transformers is not installed."""
    if find_spec("transformers") is None:
        raise OptionError(f"{who} needs transformers; pip install 'lowbit[hf]'")
