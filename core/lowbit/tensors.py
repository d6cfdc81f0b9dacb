"""The two values that carry a low-bit weight: what an algorithm means, and what a file stores and a kernel reads.

Weights are ``(out_features, in_features)`` and groups run along in_features, everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch

from lowbit.errors import SchemeError, WeightError
from lowbit.parts import TensorSpec, part_specs
from lowbit.scheme import Across, BinaryForm, Grid, Scheme, Zero

ROW_PARTS = frozenset(
    f"{prefix}{name}{suffix}"
    for name in ("codes", "scales", "zeros", "minimums")
    for prefix, suffix in (("", ""), ("super_", ""), ("super_", "_zeros"))
)


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def row_parts(scheme: Scheme, names: Iterable[str]) -> frozenset[str]:
    """Return which of the parts ``names`` hold one row of the weight after the other; empty when some part mixes rows."""
    mixed = scheme.flat or scheme.outliers or (scheme.rotation and scheme.rotation.out_block)
    if mixed or scheme.grid not in (Grid.AFFINE, Grid.CODEBOOK) or scheme.scales.across is not Across.GROUPS:
        return frozenset()
    return ROW_PARTS.intersection(names)


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedTensor:
    """What an algorithm means: logical parts, as ``lowbit.parts`` lists them for the scheme and the shape.

    Raises SchemeError when parts are missing, unknown, or of another dtype or shape; values are checked by ``validate``.
    """

    scheme: Scheme
    shape: tuple[int, int]
    parts: Mapping[str, torch.Tensor]

    def __post_init__(self) -> None:
        _check_specs(
            self.parts, part_specs(self.scheme, self.shape), f"a {self.scheme.summary()} weight of {self.shape}"
        )

    @property
    def row_separable(self) -> bool:
        """Whether ``rows`` can cut this weight: no part mixes rows."""
        scheme = self.scheme
        return (
            (scheme.grid in (Grid.AFFINE, Grid.CODEBOOK) or _is_sum(scheme))
            and not (scheme.flat or scheme.outliers or (scheme.rotation and scheme.rotation.out_block))
            and scheme.scales.across is Across.GROUPS
        )

    def rows(self, start: int, stop: int) -> QuantizedTensor:
        """Return rows start to stop as a view; only when ``row_separable``."""
        assert self.row_separable
        shape = (stop - start, self.shape[1])
        if _is_sum(self.scheme):  # planes come first
            cut = {name: self.parts[name][:, start:stop] for name in ("planes", "scales")}
        else:
            cut = {name: part[start:stop] for name, part in self.parts.items() if name in ROW_PARTS}
        return QuantizedTensor(self.scheme, shape, {**self.parts, **cut})

    @property
    def dense(self) -> QuantizedTensor:
        """The same weight without its outliers, sharing memory."""
        if not self.scheme.outliers:
            return self
        parts = {name: part for name, part in self.parts.items() if not name.startswith("outlier_")}
        return QuantizedTensor(replace(self.scheme, outliers=None), self.shape, parts)

    def validate(self, name: str = "weight") -> None:
        """Raise WeightError when a code is out of range or a float part is not finite; ``name`` goes into the sentence."""
        scheme = self.scheme
        if scheme.grid in (Grid.AFFINE, Grid.CODEBOOK):
            highest = int(self.parts["codes"].max()) if self.parts["codes"].numel() else 0
            if highest >= scheme.code_count:
                raise WeightError(
                    f"{name}: code {highest} is out of range, {scheme.summary()} has {scheme.code_count} codes"
                )
        if scheme.zero is Zero.INTEGER and bool((self.parts["zeros"] < 0).any()):
            raise WeightError(f"{name}: a zero point is negative; integer zeros are codes, 0 to {2**scheme.bits - 1}")
        for part, values in self.parts.items():
            if values.is_floating_point() and not bool(torch.isfinite(values.float()).all()):
                raise WeightError(f"{name}: {part} holds NaN or infinity")


@dataclass(frozen=True, slots=True)
class PackedSpec:
    """Everything about a packed weight but its bytes: known from headers, before data."""

    layout: str
    scheme: Scheme
    shape: tuple[int, int]
    buffers: Mapping[str, TensorSpec]

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(spec.nbytes for spec in self.buffers.values())

    @property
    def bits_per_weight(self) -> float:
        """Stored bits, scales and all, for each weight."""
        return 8 * self.nbytes / math.prod(self.shape)


@dataclass(frozen=True, slots=True, eq=False)
class PackedTensor:
    """What a file stores and a kernel reads: a layout's name and exact buffers.

    Raises SchemeError when a buffer is missing, unknown, or of another dtype or shape than the spec says.
    """

    spec: PackedSpec
    buffers: Mapping[str, torch.Tensor]

    def __post_init__(self) -> None:
        _check_specs(self.buffers, self.spec.buffers, f"a {self.spec.layout} weight of {self.spec.shape}")

    @property
    def layout(self) -> str:
        """The layout's name."""
        return self.spec.layout

    @property
    def scheme(self) -> Scheme:
        """What the codes mean."""
        return self.spec.scheme

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.spec.shape


def _is_sum(scheme: Scheme) -> bool:
    return scheme.binary is not None and scheme.binary.form is BinaryForm.SUM


def bit_equal(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bits; unlike ``torch.equal`` NaN equals itself, -0 is not 0."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    first, second = raw_bytes(left), raw_bytes(right)
    if all(len(it) % 8 == 0 == it.storage_offset() % 8 for it in (first, second)):  # seven times as fast
        first, second = first.view(torch.int64), second.view(torch.int64)
    return torch.equal(first, second)


def as_integers(tensor: torch.Tensor) -> torch.Tensor:
    """Return the same memory as integers of the same width: what moves them then cannot convert them."""
    return tensor.view(_INTEGERS[tensor.dtype.itemsize])


def raw_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a tensor, in row-major order, as uint8 (nbytes,); a view where that is possible."""
    # as_strided: a single element may have any stride and counts as contiguous, but only stride 1 can be viewed as bytes
    return tensor.contiguous().as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def _check_specs(tensors: Mapping[str, torch.Tensor], specs: Mapping[str, TensorSpec], owner: str) -> None:
    if missing := specs.keys() - tensors.keys():
        raise SchemeError(f"{owner} needs {min(missing)!r}; got {', '.join(sorted(tensors)) or 'nothing'}")
    if unknown := tensors.keys() - specs.keys():
        raise SchemeError(f"{owner} has no {min(unknown)!r}; it has {', '.join(specs)}")
    for name, spec in specs.items():
        if (found := TensorSpec.of(tensors[name])) != spec:
            raise SchemeError(f"{owner}: {name} must be {spec.dtype} {spec.shape}, got {found.dtype} {found.shape}")
