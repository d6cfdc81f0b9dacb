"""Linear layers whose backward pass skips tokens without a gradient: padding, and tokens that a step's loss leaves out.

A token that the loss does not count has a gradient of zero in every layer after the attention, and so has its query. A dense
product multiplies by these zeros all the same; here the tokens that count are gathered first. The result is the same sum with
fewer terms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

WORTH_GATHERING = 0.8
"""Above this share of tokens the dense product is faster."""


class _SparseRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        return torch.nn.functional.linear(inputs, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, Tensor | None]:
        inputs, weight = ctx.saved_tensors
        rows, gradient = inputs.flatten(0, -2), gradients[0].flatten(0, -2)
        counting = gradient.any(1).nonzero()[:, 0]
        sparse = len(counting) <= WORTH_GATHERING * len(rows)
        if sparse:
            rows, gradient = rows[counting], gradient[counting]
        by_weight = gradient.T @ rows if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, by_weight
        by_input = gradient @ weight
        if sparse:
            by_input = by_input.new_zeros(inputs.flatten(0, -2).shape).index_copy_(0, counting, by_input)
        return by_input.view(inputs.shape), by_weight


@contextmanager
def sparse_rows(linears: Sequence[nn.Module]) -> Iterator[None]:
    """Let the plain linear layers among ``linears`` skip tokens without a gradient."""
    changed = [linear for linear in linears if type(linear) is nn.Linear and "forward" not in vars(linear)]
    try:
        for linear in changed:
            vars(linear)["forward"] = _forward(linear)
        yield
    finally:
        for linear in changed:
            vars(linear).pop("forward", None)


def _forward(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
    def forward(inputs: Tensor) -> Tensor:
        weight, kind = linear.weight, inputs.device.type
        if torch.is_autocast_enabled(kind):  # which does not look into functions of one's own
            dtype = torch.get_autocast_dtype(kind)
            inputs, weight = inputs.to(dtype), weight.to(dtype)
        output: Tensor = _SparseRows.apply(inputs, weight)  # type: ignore[no-untyped-call]
        return output if linear.bias is None else output + linear.bias.to(output.dtype)

    return forward
