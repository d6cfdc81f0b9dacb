"""What the commands that run models share: device and dtype options, loading, sizes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from torch import nn

DTYPES = ("float32", "float16", "bfloat16")
F = TypeVar("F", bound=Callable[..., Any])


def place_options(command: F) -> F:
    """Add ``--device`` and ``--dtype``."""
    command = click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")(command)
    return click.option(
        "--dtype",
        type=click.Choice(DTYPES),
        help="Float type of activations; default: as the model says, bfloat16 for packed ones on a CPU.",
    )(command)


def load_model(path: Path, device: str, dtype: str | None) -> Any:
    """Load a model to be run, not saved; torch is imported here, so that help stays instant."""
    import torch

    from lowbit.runtime.load import load

    return load(path, device, getattr(torch, dtype) if dtype else None, prepare=True)


def load_tokenizer(path: Path) -> Any:
    """Load the tokenizer of a checkpoint."""
    from lowbit.runtime.tokenizer import load_tokenizer as load

    return load(path)


def model_bytes(model: nn.Module) -> int:
    """Return the bytes of all parameters and buffers, tied ones once."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def check_at_least(name: str, value: int, least: int) -> None:
    """Raise OptionError for a count below ``least``."""
    from lowbit.errors import OptionError

    if value < least:
        raise OptionError(f"--{name} must be at least {least}, got {value}")
