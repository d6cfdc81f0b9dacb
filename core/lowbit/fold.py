"""Act-order folded into the neighbours, exactly, for formats that have no place for a permutation.

``down_proj`` multiplies the product of what ``gate_proj`` and ``up_proj`` give, element by element. So its columns may be put in
the order of their groups if the rows of the two others are: ``down[:, p] @ (f(gate[p] x) * (up[p] x))`` has the same terms. Rows
move whole, with their scales. No other permutation can be folded: the inputs of q, k, v, gate and up are the residual stream,
which every layer shares and every norm scales, and those of o_proj are heads, whose order RoPE and grouped queries fix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowbit.exact import exact_scheme
from lowbit.interfaces import Checkpoint, Entry, Value
from lowbit.registry import Registry, Route
from lowbit.scheme import Across, Grid, Scheme
from lowbit.tensors import ROW_PARTS, PackedSpec, PackedTensor, QuantizedTensor

DOWN, SIBLINGS = "down_proj", ("gate_proj", "up_proj")


def fold_act_order(checkpoint: Checkpoint, format: str, registry: Registry) -> Checkpoint:
    """Return the checkpoint with every permutation folded that the format cannot store and that can be; itself if none is.

    The columns of such a ``down_proj`` and the rows of its ``gate_proj`` and ``up_proj`` then come in another order.
    """
    folds = {}
    for name, entry in checkpoint.entries.items():
        parent = name.removesuffix(f".{DOWN}.weight")
        if parent != name and isinstance(entry, PackedSpec) and _wanted(entry, format, registry):
            order = _order(checkpoint, parent, entry, registry)
            if order is not None:
                folds[parent] = order
    return FoldedCheckpoint(checkpoint, folds, registry) if folds else checkpoint


@dataclass(frozen=True, slots=True)
class _Move:
    """What happens to one tensor: rows in another order, or columns, and then no permutation any more."""

    order: Tensor
    columns: bool = False


class FoldedCheckpoint(Checkpoint):
    """A checkpoint in which some tensors are reordered as they are read."""

    def __init__(self, inner: Checkpoint, folds: Mapping[str, Tensor], registry: Registry) -> None:
        self._inner, self._registry = inner, registry
        self._moves: dict[str, _Move] = {}
        for parent, order in folds.items():
            self._moves[f"{parent}.{DOWN}.weight"] = _Move(order, columns=True)
            rows = {f"{parent}.{sibling}.{kind}" for sibling in SIBLINGS for kind in ("weight", "bias")}
            self._moves |= {name: _Move(order) for name in rows & inner.entries.keys()}
        self.path = inner.path
        self.entries = {name: self._entry(name, entry) for name, entry in inner.entries.items()}
        said = f"folded into the rows of {' and '.join(SIBLINGS)}, {len(folds)} times"
        self.metadata = replace(inner.metadata, provenance={**inner.metadata.provenance, "act_order": said})

    def read(self, name: str) -> Value:
        """Read one tensor, in its new order."""
        value, move = self._inner.read(name), self._moves.get(name)
        if move is None:
            return value
        if not isinstance(value, PackedTensor):
            return value[move.order]
        packer = self._registry.packers[value.layout]
        return packer.pack(_reordered(packer.unpack(value), move))

    def close(self) -> None:
        """Close the checkpoint."""
        self._inner.close()

    def _entry(self, name: str, entry: Entry) -> Entry:
        if not isinstance(entry, PackedSpec) or name not in self._moves or not self._moves[name].columns:
            return entry
        return self._registry.packers[entry.layout].spec(replace(entry.scheme, permutation=False), entry.shape)


def _wanted(entry: PackedSpec, format: str, registry: Registry) -> bool:
    """Whether the format refuses the permutation, and would take the weight without it."""
    scheme, shape = entry.scheme, entry.shape
    if not scheme.permutation or entry.layout not in registry.packers:
        return False
    plain = replace(scheme, permutation=False)
    if isinstance(registry.ask(scheme, shape, format), Route) or registry.packers[entry.layout].why_not(plain, shape):
        return False
    return exact_scheme(registry, plain, shape, format) is not None


def _order(checkpoint: Checkpoint, parent: str, entry: PackedSpec, registry: Registry) -> Tensor | None:
    """Return the order of columns that makes the groups of a down_proj sequential; None where it cannot be folded."""
    entries, columns = checkpoint.entries, entry.shape[1]
    allowed = {f"{parent}.{part}.{kind}" for part in (DOWN, *SIBLINGS) for kind in ("weight", "bias")}
    if any(name.startswith(f"{parent}.") and name not in allowed for name in entries):
        return None  # a norm between them, say
    for sibling in SIBLINGS:
        other = entries.get(f"{parent}.{sibling}.weight")
        if other is None or other.shape[0] != columns or not _rows_move(other, registry):
            return None
    value = checkpoint.read(f"{parent}.{DOWN}.weight")
    assert isinstance(value, PackedTensor)
    index = registry.packers[entry.layout].unpack(value).parts["group_index"].long()
    size = entry.scheme.group_size or columns
    order = torch.argsort(index, stable=True)
    return order if torch.equal(index[order], torch.arange(columns) // size) else None  # groups of other sizes stay


def _rows_move(entry: Entry, registry: Registry) -> bool:
    """Whether rows of a weight can change places: always, unless it is packed and something spans them."""
    if not isinstance(entry, PackedSpec):
        return True
    scheme: Scheme = entry.scheme
    spans = scheme.flat or scheme.outliers or scheme.rotation or scheme.scales.across is Across.ROWS
    return scheme.grid in (Grid.AFFINE, Grid.CODEBOOK) and not spans and entry.layout in registry.packers


def _reordered(quantized: QuantizedTensor, move: _Move) -> QuantizedTensor:
    parts = dict(quantized.parts)
    if not move.columns:
        rows = {name: part[move.order] if name in ROW_PARTS else part for name, part in parts.items()}
        return QuantizedTensor(quantized.scheme, quantized.shape, rows)
    del parts["group_index"]
    parts["codes"] = parts["codes"][:, move.order].contiguous()
    return QuantizedTensor(replace(quantized.scheme, permutation=False), quantized.shape, parts)
