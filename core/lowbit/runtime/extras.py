"""Optional packages: a sentence where one is missing, and silence where one says too much."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from lowbit.errors import OptionError


def need_transformers(who: str) -> None:
    """Raise OptionError when transformers is not installed."""
    if find_spec("transformers") is None:
        raise OptionError(f"{who} needs transformers; pip install 'lowbit[hf]'")


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' progress bar and load report off the terminal; what matters of it becomes an error."""
    from transformers import utils

    logging: Any = utils.logging
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
