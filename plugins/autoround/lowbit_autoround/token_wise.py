"""Steps whose loss counts some tokens only: what treats tokens one by one runs on these alone, forward and backward.

Tokens of a decoder block meet in the keys and values of its attention, and nowhere else: the projections of queries and outputs
and the whole MLP work on each token for itself. What they give for a token that the loss leaves out matters to nothing, so it
is not computed and reads as zero. Which modules these are is found by a trial on one sequence, not by their names: no gradient
reaches their outputs or inputs at tokens that do not count, and without those the block's outputs at the others are the same.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

ALIKE = 0.02
"""Largest difference of a trial's outputs, relative to the largest output: products of other shapes round differently (bfloat16)."""


class TokenWise:
    """Lets modules of a block skip tokens.

    Args:
        module: The block.
        linears: Its linear layers that are worth it.
    """

    def __init__(self, module: nn.Module, linears: Sequence[nn.Module]) -> None:
        self._module, self._linears = module, {id(linear) for linear in linears}
        self._current = threading.local()

    @contextmanager
    def only(self, tokens: Tensor | None) -> Iterator[None]:
        """Compute these tokens only in this thread: int64 places in the flattened batch; None is all of them."""
        self._current.tokens = tokens
        try:
            yield
        finally:
            self._current.tokens = None

    @contextmanager
    def skipping(self, run: Callable[[Tensor], Tensor], hidden: Tensor) -> Iterator[None]:
        """Try which modules can skip, and let them.

        Args:
            run: Runs the block.
            hidden: One sequence, (1, tokens, hidden).
        """
        counted = torch.rand(hidden.shape[1], generator=torch.Generator().manual_seed(0)) < 0.5
        chosen = self._find(run, hidden, counted.to(hidden.device))
        try:
            for module in chosen:
                vars(module)["forward"] = self._forward(module.forward)
            if chosen and not self._agrees(run, hidden, counted.nonzero()[:, 0].to(hidden.device)):
                self._restore(chosen)
            yield
        finally:
            self._restore(chosen)

    @staticmethod
    def _restore(modules: Sequence[nn.Module]) -> None:
        for module in modules:
            vars(module).pop("forward", None)

    def _agrees(self, run: Callable[[Tensor], Tensor], hidden: Tensor, tokens: Tensor) -> bool:
        with torch.no_grad():
            whole = run(hidden)[0, tokens].float()
            with self.only(tokens):
                part = run(hidden)[0, tokens].float()
        return bool((whole - part).abs().max() <= ALIKE * whole.abs().max()) if len(tokens) else False

    def _find(self, run: Callable[[Tensor], Tensor], hidden: Tensor, counted: Tensor) -> list[nn.Module]:
        """Return the outermost modules that hold linears and mix no tokens."""
        parts = [part for path, part in self._module.named_modules() if path and self._worth_it(part)]
        trials = {id(part): _Trial(part, counted) for part in parts}
        try:
            with torch.enable_grad():
                inputs = hidden.detach().clone().requires_grad_(True)
                torch.autograd.grad(run(inputs)[0, counted].float().square().sum(), inputs)
        except RuntimeError:  # a hook that meets a change in place
            return []
        finally:
            for trial in trials.values():
                trial.end()
        found = [part for part in parts if trials[id(part)].passed]
        inside = {id(child) for part in found for child in part.modules() if child is not part}
        return [part for part in found if id(part) not in inside]

    def _worth_it(self, part: nn.Module) -> bool:
        return "forward" not in vars(part) and any(id(child) in self._linears for child in part.modules())

    def _forward(self, whole: Callable[..., Any]) -> Callable[..., Any]:
        def forward(states: Tensor, *args: Any, **kwargs: Any) -> Any:
            tokens = getattr(self._current, "tokens", None)
            if tokens is None or args or kwargs:
                return whole(states, *args, **kwargs)
            found = whole(_Take.apply(states, tokens))  # type: ignore[no-untyped-call]
            return _Put.apply(found, tokens, states.shape[:2])  # type: ignore[no-untyped-call]

        return forward


class _Trial:
    """Watches one module through a forward and a backward pass of one sequence."""

    def __init__(self, part: nn.Module, counted: Tensor) -> None:
        self._counted, self._calls, self._reads, self._writes, self._mixes = counted, 0, 0, 0, False
        self._handles = [
            part.register_forward_pre_hook(self._called, with_kwargs=True),
            part.register_forward_hook(self._returned),
        ]

    @property
    def passed(self) -> bool:
        """Whether the module was called, and every call treated tokens one by one."""
        return 0 < self._calls == self._reads == self._writes and not self._mixes

    def end(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()

    def _called(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._calls += 1
        if kwargs or len(args) != 1 or not self._is_sequence(args[0]):
            self._mixes = True
            return None
        states = args[0].view_as(args[0])  # what this module does to its input, and nobody else
        states.register_hook(self._read)
        return (states,), kwargs

    def _returned(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._is_sequence(output):
            output.register_hook(self._written)

    def _read(self, gradient: Tensor) -> None:
        self._reads += self._spares(gradient)

    def _written(self, gradient: Tensor) -> None:
        self._writes += self._spares(gradient)

    def _spares(self, gradient: Tensor) -> bool:
        return not bool(((gradient[0] != 0).any(-1) & ~self._counted).any())

    def _is_sequence(self, states: Any) -> bool:
        is_whole = isinstance(states, Tensor) and states.dim() == 3 and states.shape[:2] == (1, len(self._counted))
        return is_whole and bool(states.requires_grad)


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, tokens: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.shape = states.shape
        return states.flatten(0, 1).index_select(0, tokens)[None]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        (tokens,) = ctx.saved_tensors
        whole = gradients[0].new_zeros(ctx.shape)
        whole.view(-1, ctx.shape[-1]).index_copy_(0, tokens, gradients[0][0])
        return whole, None


class _Put(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, tokens: Tensor, shape: torch.Size) -> Tensor:
        ctx.save_for_backward(tokens)
        whole = part.new_zeros(*shape, part.shape[-1])
        whole.view(-1, part.shape[-1]).index_copy_(0, tokens, part[0])
        return whole

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None]:
        (tokens,) = ctx.saved_tensors
        return gradients[0].flatten(0, 1).index_select(0, tokens)[None], None, None
