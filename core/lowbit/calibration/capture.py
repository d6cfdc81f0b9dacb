"""What a model hands to its decoder blocks: hidden states to the first, and to each its mask and position embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.calibration.chains import Chain
from lowbit.calibration.skeleton import Skeleton
from lowbit.errors import OptionError


@dataclass(frozen=True, slots=True)
class Call:
    """How the model calls a block beside the hidden states; the same for every sample, as none is padded."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def run(self, module: nn.Module, hidden: Tensor) -> Tensor:
        """Return what the block makes of hidden states ``(n, seqlen, hidden)``."""
        result = module(hidden, *self.args, **self.kwargs)
        states: Tensor = result[0] if isinstance(result, tuple) else result
        return states


def capture(skeleton: Skeleton, tokens: Tensor) -> dict[str, Call]:
    """Return how each block is called for ``tokens`` (samples, seqlen).

    Every block is replaced by one that notes its call and passes the hidden states on, so nothing but the embedding is
    loaded and computed. Raises OptionError for a model whose blocks cannot be called like this, naming the class of the block.
    """
    with _embedding(skeleton):
        calls = _calls(skeleton, tokens[:1])
        if not _same(calls, _calls(skeleton, tokens[:1].flip(1))):
            raise _error(skeleton, "gets arguments that depend on the text")
    return calls


def embed(skeleton: Skeleton, tokens: Tensor, batch_size: int, file: Path | None = None) -> Chain:
    """Return the inputs of the first block for ``tokens`` (samples, seqlen), kept in ``file`` when one is given."""
    with _embedding(skeleton):
        first = _first_states(skeleton, tokens[:1])
        chain = Chain.make((len(tokens), tokens.shape[1], first.shape[-1]), first.dtype, file, skeleton.device)
        for start in range(0, len(tokens), batch_size):
            chain.states[start : start + batch_size] = _first_states(skeleton, tokens[start : start + batch_size])
    return chain


@contextmanager
def _embedding(skeleton: Skeleton) -> Iterator[None]:
    """Fill everything of the decoder but its blocks."""
    with skeleton.filled(skeleton.decoder_path, but=skeleton.layers_path), torch.no_grad():
        yield


class _Enough(Exception):  # no error: the forward pass has shown what was wanted
    """Ends a forward pass."""


class _Recorder(nn.Module):
    """Stands for a block: notes its call, and passes the hidden states on, or ends the pass."""

    def __init__(self, block: nn.Module, last: bool, as_tuple: bool) -> None:
        super().__init__()
        self.block, self.last, self.as_tuple = (block,), last, as_tuple
        self.hidden: Tensor | None = None
        self.call: Call | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # models ask blocks for their kind of attention
            return getattr(self.__dict__["block"][0], name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Note the call."""
        self.hidden, self.call = hidden, Call(args, kwargs)
        if self.last:
            raise _Enough
        return (hidden,) if self.as_tuple else hidden


def _calls(skeleton: Skeleton, tokens: Tensor) -> dict[str, Call]:
    """Return the call of every block; blocks return hidden states in newer models, a tuple of them in older ones."""
    failure: Exception | None = None
    for as_tuple in (False, True):
        last = len(skeleton.blocks) - 1
        made = {
            path: _Recorder(block, number == last, as_tuple)
            for number, (path, block) in enumerate(skeleton.blocks.items())
        }
        try:
            _forward(skeleton, tokens, made)
        except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
            failure = error
            continue
        shapes = {recorder.hidden.shape for recorder in made.values() if recorder.hidden is not None}
        if len(shapes) == 1 and len(shapes.pop()) == 3 and all(recorder.call for recorder in made.values()):
            return {path: recorder.call for path, recorder in made.items() if recorder.call}
    raise _error(skeleton, f"is called in a way that lowbit cannot follow ({failure})" if failure else "is not called")


def _first_states(skeleton: Skeleton, tokens: Tensor) -> Tensor:
    made = {path: _Recorder(block, True, False) for path, block in skeleton.blocks.items()}
    _forward(skeleton, tokens, made)
    hidden = next(iter(made.values())).hidden
    assert hidden is not None
    return hidden


def _forward(skeleton: Skeleton, tokens: Tensor, recorders: Mapping[str, _Recorder]) -> None:
    with skeleton.replaced_blocks(recorders) as decoder:
        try:
            decoder(input_ids=tokens.to(skeleton.device), use_cache=False)
        except _Enough:
            return


def _error(skeleton: Skeleton, what: str) -> OptionError:
    block = next(iter(skeleton.blocks.values()))
    return OptionError(
        f"{type(block).__name__} {what}, so {type(skeleton.model).__name__} cannot be calibrated block by block; use a "
        "quantizer that needs no calibration, or give --imatrix"
    )


def _same(left: Any, right: Any) -> bool:
    """Whether two calls, or parts of them, are equal; objects of other kinds count as equal when they are of one class."""
    if isinstance(left, Tensor):
        return isinstance(right, Tensor) and left.shape == right.shape and bool(torch.equal(left, right))
    if isinstance(left, Call):
        return _same((left.args, dict(left.kwargs)), (right.args, dict(right.kwargs)))
    if isinstance(left, (tuple, list)):
        return len(left) == len(right) and all(map(_same, left, right))
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(_same(value, right[key]) for key, value in left.items())
    return type(left) is type(right)
