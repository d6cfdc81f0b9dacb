"""``outliers=0.5%`` for any quantizer: a few weights kept apart in a sparse matrix, whose places cost the output most.

With E = W - D, D being what the dense codes mean, H the mean of x xT over calibration tokens and e_ij one error of E, the mean
squared output error is ``tr(E H ET)``, and storing ``w - d`` at (i, j) lowers it by ``2 e_ij (E H)_ij - e_ij**2 H_jj``. The places
with the largest gain are taken. Without a Hessian H is the diagonal of importances, and without those 1: the gain is
``e_ij**2 H_jj``.

The dense part is chosen twice, once for W and once for W without its largest entries (by ``w_ij**2 H_jj``), which no longer
stretch the scales of their groups; the outliers are then placed by gain, and the result with the lower error is kept. A
quantizer that tunes a whole block sees the outliers at work: their places are those that it would get without tuning, and the block
runs with these weights added while the rest is tuned.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lowbit.calibration.block import Block
from lowbit.errors import OptionError, WeightError
from lowbit.grids import dequantize
from lowbit.interfaces import Calibration, Quantizer
from lowbit.parts import outlier_count, part_specs
from lowbit.scheme import Outliers, Scheme
from lowbit.tensors import QuantizedTensor

SETTINGS = ("outliers", "outlier_dtype")


def take_outliers(settings: Mapping[str, str], options: type) -> tuple[dict[str, str], Outliers | None]:
    """Split ``outliers`` and ``outlier_dtype`` from the settings of a quantizer, unless its options have such a field.

    ``outliers`` is a share, ``0.5%`` or ``0.005``; ``0`` and ``none`` mean none. Raises OptionError.
    """
    own = {field.name for field in fields(options)}
    rest = {key: text for key, text in settings.items() if key not in SETTINGS or key in own}
    mine = {key: text for key, text in settings.items() if key not in rest}
    if "outliers" not in mine:
        if mine:
            raise OptionError("outlier_dtype says how outliers are stored: give outliers too, such as outliers=0.5%")
        return rest, None
    density = _density(mine["outliers"])
    dtype = mine.get("outlier_dtype", "float16")
    if dtype not in ("float16", "bfloat16", "float32"):
        raise OptionError(f"outlier_dtype must be float16, bfloat16 or float32, got {dtype!r}")
    return rest, Outliers(density, dtype) if density else None


def _density(text: str) -> float:
    if text.lower() == "none":
        return 0.0
    try:
        density = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        density = -1.0
    if not 0 <= density <= 0.5:
        raise OptionError(f"outliers is a share of the weights, 0.5% or 0.005, at most 50%, got {text!r}")
    return density


@cache
def with_outliers(quantizer: Quantizer[Any], outliers: Outliers) -> Quantizer[Any]:
    """Return the quantizer that stores outliers beside what ``quantizer`` gives; the same one for the same arguments."""
    return WithOutliers(quantizer, outliers)


class WithOutliers(Quantizer[Any]):
    """Any quantizer and a sparse matrix beside it; the options are the quantizer's."""

    def __init__(self, inner: Quantizer[Any], outliers: Outliers) -> None:
        self.inner, self.outliers = inner, outliers
        # The name goes into provenance and into the identity of a job that may be resumed.
        self.name = f"{inner.name}+{100 * outliers.density:g}% {outliers.dtype}"  # type: ignore[misc]
        self.Options = inner.Options
        self.needs = inner.needs  # type: ignore[misc]  # one instance for each quantizer

    def needs_for(self, options: Any) -> frozenset[str]:
        """What the quantizer needs; where a block runs anyway, the importance of its inputs too."""
        needs = self.inner.needs_for(options)
        return needs | {"importance"} if "block_inputs" in needs else needs

    def sampling(self, options: Any) -> Mapping[str, int]:
        """Return what the quantizer asks of calibration."""
        return self.inner.sampling(options)

    def scheme(self, options: Any) -> Scheme:
        """Return the quantizer's scheme with outliers. Raises OptionError where it stores outliers of its own."""
        scheme = self.inner.scheme(options)
        if scheme.outliers:
            raise OptionError(
                f"quantizer {self.inner.name!r} stores outliers of its own; leave the setting outliers out"
            )
        return replace(scheme, outliers=self.outliers)

    def fit(self, options: Any, scheme: Scheme) -> Any:
        """Return options that give a scheme with these outliers, or None."""
        return self.inner.fit(options, replace(scheme, outliers=None)) if scheme.outliers == self.outliers else None

    def codebook(self, options: Any) -> Tensor | None:
        """Return the quantizer's codebook."""
        return self.inner.codebook(options)

    def with_codebook(self, options: Any, codebook: Tensor) -> Any:
        """Return options for a codebook."""
        return self.inner.with_codebook(options, codebook)

    def quantize(self, weight: Tensor, options: Any, calibration: Calibration | None = None) -> QuantizedTensor:
        """Quantize twice, place the outliers, and keep the better. Raises WeightError, for NaN and for values beyond the dtype."""
        problem, best = self._placed(weight, options, calibration)
        return self._stored(best.dense, problem, best.mask, (problem.weight - dequantize(best.dense))[best.mask])

    def _placed(self, weight: Tensor, options: Any, calibration: Calibration | None) -> tuple[_Problem, _Placed]:
        problem = _Problem.of(weight, calibration)
        count = outlier_count(self.scheme(options), problem.shape)
        results = [problem.place(self.inner.quantize(weight, options, calibration), count)]
        if count:
            trimmed = torch.where(problem.largest(count), 0, weight)
            results.append(problem.place(self.inner.quantize(trimmed, options, calibration), count))
        return problem, min(results, key=lambda result: result.error)

    def quantize_block(
        self,
        weights: Mapping[str, Tensor],
        options: Mapping[str, Any],
        calibration: Mapping[str, Calibration],
        block: Block | None = None,
    ) -> dict[str, QuantizedTensor]:
        """Quantize each alone, or, where a block is tuned, all together while the outliers are at work in it."""
        tuned = [name for name in weights if block and "block_inputs" in self.inner.needs_for(options[name])]
        if block is None or not tuned:
            return super().quantize_block(weights, options, calibration, block)
        problems, masks = {}, {}
        for name, weight in weights.items():
            problems[name], best = self._placed(weight, options[name], calibration.get(name))
            masks[name] = best.mask
        rest = {name: torch.where(masks[name], 0, weight) for name, weight in weights.items()}
        apart = {name: weights[name] - rest[name] for name in weights}
        with _added(block, apart):
            found = self.inner.quantize_block(rest, options, calibration, block)
        return {
            name: self._stored(found[name], problems[name], masks[name], apart[name].float()[masks[name]])
            for name in weights
        }

    def _stored(self, dense: QuantizedTensor, problem: _Problem, mask: Tensor, values: Tensor) -> QuantizedTensor:
        """Return ``dense`` with the values at the places of ``mask`` (out, in), in row order, as CSR."""
        scheme = replace(dense.scheme, outliers=self.outliers)
        specs = part_specs(scheme, problem.shape)
        stored = values.to(specs["outlier_values"].dtype)
        if not bool(torch.isfinite(stored).all()):
            raise WeightError(
                f"needs an outlier of {float(values.abs().max()):g}, which {self.outliers.dtype} cannot hold; set outlier_dtype "
                f"to {'bfloat16 or float32' if self.outliers.dtype == 'float16' else 'float32'}"
            )
        rows = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)).int()
        columns = mask.nonzero()[:, 1].to(specs["outlier_columns"].dtype)
        parts = {"outlier_rows": rows, "outlier_columns": columns, "outlier_values": stored}
        return QuantizedTensor(scheme, problem.shape, {**dense.parts, **parts})


@dataclass(frozen=True, slots=True)
class _Placed:
    """A dense part, the places of outliers beside it as bool (out, in), and the output error that is left."""

    dense: QuantizedTensor
    mask: Tensor
    error: float


@dataclass(frozen=True, slots=True)
class _Problem:
    """A weight, float32 (out, in), and what is known of its inputs: a Hessian (in, in), or the importance of columns (in,)."""

    weight: Tensor
    importance: Tensor
    hessian: Tensor | None

    @classmethod
    def of(cls, weight: Tensor, calibration: Calibration | None) -> _Problem:
        values = weight.float()
        if not bool(torch.isfinite(values).all()):
            raise WeightError(
                "holds NaN or infinity; repair the checkpoint, or keep this tensor with a rule PATTERN=none"
            )
        hessian = None if calibration is None or calibration.hessian is None else calibration.hessian.to(weight.device)
        importance = torch.ones_like(values[0])
        if hessian is not None:
            importance = hessian.diagonal()
        elif calibration is not None and calibration.importance is not None:
            importance = calibration.importance.to(weight.device)
        return cls(values, importance, hessian)

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]

    def largest(self, count: int) -> Tensor:
        """Return the places of the largest ``w**2 * importance``, bool (out, in)."""
        unit = self.weight / self.weight.abs().amax().clamp_min(1e-30)  # squares neither overflow nor vanish
        return _highest(unit.square() * self.importance, count)

    def place(self, dense: QuantizedTensor, count: int) -> _Placed:
        """Place outliers beside a dense part, by gain."""
        size = self.weight.abs().amax().clamp_min(1e-30)
        error = (self.weight - dequantize(dense)) / size
        if self.hessian is None:
            gain = error.square() * self.importance
        else:
            gain = error * (2 * (error @ self.hessian) - error * self.importance)
        mask = _highest(gain, count)
        left = error.masked_fill(mask, 0)
        pushed = left * self.importance if self.hessian is None else left @ self.hessian
        return _Placed(dense, mask, float((pushed * left).double().sum()))


def _highest(scores: Tensor, count: int) -> Tensor:
    """Return where the ``count`` highest scores are; of equal ones the first."""
    if not count:
        return torch.zeros_like(scores, dtype=torch.bool)
    flat, place = scores.flatten(), scores.numel() - count
    if flat.device.type == "cpu":  # torch's kthvalue makes int64 indices beside its copy: three times the memory
        threshold = torch.tensor(np.partition(flat.numpy(), place)[place])
    else:
        threshold = flat.kthvalue(place + 1).values
    above = flat > threshold
    equal = (flat == threshold).nonzero()[: count - int(above.sum()), 0]
    above[equal] = True
    return above.view(scores.shape)


@contextmanager
def _added(block: Block, matrices: Mapping[str, Tensor]) -> Iterator[None]:
    """Let the named linears of a block add ``x @ matrix.T`` to their outputs."""
    handles = []
    try:
        for name, matrix in matrices.items():
            linear = block.module.get_submodule(block.linears[name])
            handles.append(linear.register_forward_hook(_Adding(matrix)))
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Adding:
    """A forward hook that adds a product."""

    def __init__(self, matrix: Tensor) -> None:
        self._matrix = matrix

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        (x,) = inputs
        return output + nn.functional.linear(x, self._matrix.to(x.dtype)).to(output.dtype)
