"""What linear layers receive: mean squares and mean outer products of their inputs, gathered by hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lowbit.errors import WeightError
from lowbit.interfaces import Calibration
from lowbit.runtime.experts import EXPERT

LEAST_TOKENS = 64
"""An expert that saw fewer tokens takes the mean over all experts of its block instead of its own."""
DRIFT = 1e-3
"""Largest relative difference of a Hessian's diagonal from the same sums in float64; float32 sums of 10^6 terms stay below."""


class InputSums:
    """Sums over the inputs x of one linear layer: x^2 in float64, and x xT in float32 when asked.

    Args:
        columns: in_features.
        hessian: Whether to sum outer products too.
        device: Where the sums are.
    """

    def __init__(self, columns: int, hessian: bool, device: torch.device) -> None:
        self.tokens = 0
        self.squares = torch.zeros(columns, dtype=torch.float64, device=device)
        self.products = torch.zeros(columns, columns, device=device) if hessian else None

    def add(self, tokens: int, squares: Tensor, products: Tensor | None) -> None:
        """Add the sums of one batch."""
        self.tokens += tokens
        self.squares += squares
        if self.products is not None and products is not None:
            self.products += products

    def merge(self, other: InputSums) -> None:
        """Add the sums of another layer with as many columns."""
        self.add(other.tokens, other.squares, other.products)

    def result(self, name: str) -> Calibration:
        """Return the means. Raises WeightError, naming the layer, when activations overflow or float32 sums have drifted."""
        count = max(1, self.tokens)
        if not bool(torch.isfinite(self.squares).all()):
            raise WeightError(
                f"{name}: an input of this layer is NaN or infinite in calibration; leave it out with --rule"
            )
        if self.products is not None:
            diagonal = self.products.diagonal().double()
            drift = float(((diagonal - self.squares).abs() / self.squares.clamp(min=1e-30)).max())
            if not drift <= DRIFT:
                raise WeightError(
                    f"{name}: the Hessian's sums in float32 differ by {drift:.1e} from float64; use fewer samples"
                )
        importance = (self.squares / count).float().cpu()
        return Calibration(importance, None if self.products is None else (self.products / count).cpu())


class Statistics:
    """Gathers ``InputSums`` for linears of a block while it runs.

    Args:
        block: The module.
        linears: Tensor name -> path of the linear in ``block``.
        hessian: Names of the tensors whose Hessian is wanted; the mean squares are gathered for all.
    """

    def __init__(self, block: nn.Module, linears: Mapping[str, str], hessian: frozenset[str]) -> None:
        self._block, self._linears = block, linears
        self._sums: dict[str, InputSums] = {}
        self._hessian = hessian
        self._last: tuple[Tensor, Tensor, Tensor | None] | None = None

    @contextmanager
    def gathering(self) -> Iterator[None]:
        """Gather from every forward pass of the block inside the context."""
        handles = [
            self._block.get_submodule(path).register_forward_pre_hook(self._hook(name))
            for name, path in self._linears.items()
        ]
        try:
            yield
        finally:
            self._last = None
            for handle in handles:
                handle.remove()

    def results(self, note: Callable[[str], None] = lambda text: None) -> dict[str, Calibration]:
        """Return the measurements of every linear; experts that saw few tokens take the mean of all, and ``note`` says so."""
        pooled = self._pool_experts()
        found = {}
        for name in self._linears:
            sums = self._sums.get(name)
            if (pool := pooled.get(_family(name))) and (sums is None or sums.tokens < LEAST_TOKENS):
                note(f"{name} saw {sums.tokens if sums else 0} tokens; it takes the mean of all experts of its block")
                sums = pool
            if sums is not None and sums.tokens:
                found[name] = sums.result(name)
        return found

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        hessian = name in self._hessian

        def gather(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            if name not in self._sums:
                self._sums[name] = InputSums(x.shape[-1], hessian, x.device)
            rows = x.shape[:-1].numel()
            self._sums[name].add(rows, *self._batch(x, hessian))

        return gather

    def _batch(self, x: Tensor, hessian: bool) -> tuple[Tensor, Tensor | None]:
        """Return the sums of one batch; q, k and v (gate and up) get the same input, whose sums are computed once."""
        if self._last is not None and self._last[0] is x and not (hessian and self._last[2] is None):
            return self._last[1], self._last[2]
        rows = x.detach().reshape(-1, x.shape[-1])
        squares = _squares(rows, hessian)
        rows = rows.float() if hessian else rows
        products = rows.T @ rows if hessian else None
        self._last = (x, squares, products)
        return squares, products

    def _pool_experts(self) -> dict[str, InputSums]:
        pools: dict[str, InputSums] = {}
        for name, sums in self._sums.items():
            if not (family := _family(name)):
                continue
            if family not in pools:
                pools[family] = InputSums(len(sums.squares), sums.products is not None, sums.squares.device)
            pools[family].merge(sums)
        return pools


def _squares(rows: Tensor, checks: bool) -> Tensor:
    """Return the sums of squares over rows, to be added in float64; those that ``checks`` a Hessian are float64 from the start.

    On a GPU the rows are read once and nothing is written: torch sums float16 and bfloat16 in float32 as it reads them, but
    makes a copy of all rows for float64.
    """
    if rows.device.type == "cpu":
        return rows.float().square().sum(0, dtype=torch.float64)
    norms: Tensor = torch.linalg.vector_norm(rows, dim=0, dtype=torch.float64 if checks else torch.float32)
    return norms.double().square()


def _family(name: str) -> str:
    """Return what all experts' weights of one projection have in common, or nothing for other weights."""
    match = EXPERT.fullmatch(name.removesuffix(".weight"))
    return f"{match['experts']}.{match['linear']}" if match else ""
