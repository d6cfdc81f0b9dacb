"""How much each weight loses at several widths, and which widths to choose under a budget.

The error of a layer is relative: ``|W - D| / |W|`` of the weight, and, where its inputs were measured, of the output,
``sqrt(tr(E H ET) / tr(W H WT))`` with E = W - D and H the Hessian or the diagonal of importances. A budget is met by the widths
with the least sum of squared relative errors over layers: to first order the loss of a model grows with that sum, each layer
with a factor of its own that does not depend on the quantizer (the linearity theorem, arXiv 2411.17525; the factors are taken as
equal). Layers that a program fuses get one width.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
from torch import Tensor

from lowbit.errors import OptionError
from lowbit.grids import dequantize
from lowbit.interfaces import Calibration, Checkpoint
from lowbit.loaders import FUSED
from lowbit.metrics import measure
from lowbit.plan import COLLECTED, Action, Step, Target, make_plan
from lowbit.recipe import Recipe, Rule
from lowbit.registry import Registry
from lowbit.tensors import PackedSpec
from lowbit.work import floats

BUCKETS = 1 << 17
"""Parts that a budget is divided into; each group of layers may waste one."""


@dataclass(frozen=True, slots=True)
class Width:
    """One weight at one width: stored bits, scales and all, for each weight; relative error of the weight and of the output."""

    bits: float
    stored: float
    error: float
    output_error: float | None

    @property
    def cost(self) -> float:
        """What a budget adds up: the squared error of the output if known, else of the weight."""
        return (self.error if self.output_error is None else self.output_error) ** 2


@dataclass(frozen=True, slots=True)
class Layer:
    """One weight at every width that was asked for, in that order."""

    name: str
    shape: tuple[int, int]
    widths: tuple[Width, ...]

    @property
    def weights(self) -> int:
        """How many weights it has."""
        return math.prod(self.shape)


def measure_layers(
    checkpoint: Checkpoint,
    registry: Registry,
    rule: Rule,
    widths: Sequence[float],
    target: Target,
    calibration: Mapping[str, Calibration] = MappingProxyType({}),
    progress: Callable[[str], None] = lambda name: None,
) -> list[Layer]:
    """Quantize every weight that ``rule`` takes at every width, one weight in memory at a time.

    Args:
        checkpoint: The model; packed weights are dequantized.
        registry: The components.
        rule: The quantizer with its settings, bits aside.
        widths: Bits.
        target: The format whose stored bits count.
        calibration: By weight, what was measured of its inputs.
        progress: Called with the name of each weight that is done.

    Raises what ``make_plan`` raises for a width that the quantizer or the format does not have.
    """
    plans = []
    for bits in widths:
        recipe = Recipe(at_width(rule, bits), requantize=True)
        # quantizers that calibrate are planned as if they had, and round without it: that is enough to compare widths
        steps = make_plan(checkpoint, recipe, target, registry, calibration, COLLECTED).steps
        plans.append({step.name: step for step in steps if step.action is Action.QUANTIZE})
    layers = []
    for name, first in plans[0].items():
        weight = floats(checkpoint.read(name), registry)
        known = calibration.get(name)
        cells = [_width(bits, plan[name], weight, known) for bits, plan in zip(widths, plans, strict=True)]
        layers.append(Layer(name, (first.source.shape[0], first.source.shape[1]), tuple(cells)))
        progress(name)
    if not layers:
        raise OptionError(f"{checkpoint.path.name} has no linear layer to quantize; lowbit inspect lists its tensors")
    return layers


def at_width(rule: Rule, bits: float) -> Rule:
    """Return the rule with these bits."""
    return replace(rule, settings={**rule.settings, "bits": f"{bits:g}"})


def _width(bits: float, step: Step, weight: Tensor, known: Calibration | None) -> Width:
    assert step.choice is not None
    quantized = step.choice.quantizer.quantize(weight, step.choice.options, known)
    stored = step.target.bits_per_weight if isinstance(step.target, PackedSpec) else 8.0 * step.target.dtype.itemsize
    output = None
    if known is not None:
        reference = weight.float()
        output = _output_error(reference, dequantize(quantized), known)
    return Width(bits, stored, measure(weight, quantized).relative, output)


def _output_error(weight: Tensor, result: Tensor, known: Calibration) -> float | None:
    """Return the relative root mean square error of ``x @ W.T``, or None when nothing was measured."""
    measured = known.importance if known.hessian is None else known.hessian
    if measured is None:
        return None

    def power(matrix: Tensor) -> float:
        pushed = matrix * measured if measured.dim() == 1 else matrix @ measured
        return float((pushed * matrix).double().sum())

    total = power(weight)
    return math.sqrt(max(0.0, power(result - weight)) / total) if total > 0 else 0.0


def choose_widths(layers: Sequence[Layer], budget: float) -> dict[str, int]:
    """Return the index of the width of every layer: the least sum of costs whose stored bits average at most ``budget``.

    Dynamic programming over groups of layers (``fused_groups``); stored bits are rounded up to ``BUCKETS`` parts of the budget, so it
    is never exceeded. Raises OptionError when even the narrowest widths exceed it.
    """
    by_name = {layer.name: layer for layer in layers}
    groups = fused_groups(list(by_name))
    weights = sum(layer.weights for layer in layers)
    options = [_group_options([by_name[name] for name in group]) for group in groups]
    least = sum(min(bits for bits, _ in choices) for choices in options) / weights
    if least > budget:
        raise OptionError(
            f"a budget of {budget:g} bits a weight is below the narrowest widths, which store {least:.3f}; raise it, or allow "
            "narrower ones or larger groups"
        )
    part = budget * weights / BUCKETS
    costs = np.zeros(BUCKETS + 1)  # least cost of the groups so far, by parts spent at most
    picks = []
    for choices in options:
        candidates = np.full((len(choices), BUCKETS + 1), np.inf)
        for index, (bits, cost) in enumerate(choices):
            spent = math.ceil(bits / part - 1e-9)
            if spent <= BUCKETS:
                candidates[index, spent:] = costs[: BUCKETS + 1 - spent] + cost
        picks.append(candidates.argmin(0).astype(np.uint8))
        costs = candidates.min(0)
    left = BUCKETS
    if not np.isfinite(costs[left]):  # rounding up left no room: the narrowest fit exactly
        return {layer.name: min(range(len(layer.widths)), key=lambda i: layer.widths[i].stored) for layer in layers}
    chosen: dict[str, int] = {}
    for group, choices, pick in reversed(list(zip(groups, options, picks, strict=True))):
        index = int(pick[left])
        chosen |= dict.fromkeys(group, index)
        left -= math.ceil(choices[index][0] / part - 1e-9)
    return {layer.name: chosen[layer.name] for layer in layers}


def _group_options(layers: Sequence[Layer]) -> list[tuple[float, float]]:
    """Return stored bits and cost of a group of layers at every width."""
    return [
        (
            sum(layer.weights * layer.widths[index].stored for layer in layers),
            sum(layer.widths[index].cost for layer in layers),
        )
        for index in range(len(layers[0].widths))
    ]


def fused_groups(names: Sequence[str]) -> list[list[str]]:
    """Return the names in groups that must have one width: q, k and v, gate and up, and the same of all experts of a layer."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        module = re.sub(r"\.experts\.\d+\.", ".experts.*.", name.removesuffix(".weight"))
        parent, _, last = module.rpartition(".")
        kind = next((number for number, fused in enumerate(FUSED) if last in fused), None)
        groups.setdefault((parent, last if kind is None else str(kind)), []).append(name)
    return list(groups.values())


def average_bits(layers: Sequence[Layer], chosen: Mapping[str, int]) -> float:
    """Return the stored bits for each weight with these widths."""
    bits = sum(layer.weights * layer.widths[chosen[layer.name]].stored for layer in layers)
    return bits / sum(layer.weights for layer in layers)


def total_cost(layers: Sequence[Layer], chosen: Mapping[str, int]) -> float:
    """Return the sum of squared relative errors with these widths."""
    return sum(layer.widths[chosen[layer.name]].cost for layer in layers)


def rules(layers: Sequence[Layer], chosen: Mapping[str, int], rule: Rule) -> list[str]:
    """Return one rule for each layer, as ``lowbit convert --rule`` takes them."""
    others = "".join(f",{key}={value}" for key, value in rule.settings.items())
    return [f"{layer.name}={rule.quantizer},bits={layer.widths[chosen[layer.name]].bits:g}{others}" for layer in layers]


def default_quantizer(registry: Registry, widths: Sequence[float]) -> str:
    """Return the first quantizer, by name, that has all widths and needs no calibration. Raises OptionError."""
    from lowbit.options import build_options

    for name, quantizer in registry.quantizers.items():
        try:
            made = [build_options(quantizer.Options, {"bits": f"{bits:g}"}, name) for bits in widths]
        except OptionError:
            continue
        if not any(quantizer.needs_for(options) for options in made):
            return name
    raise OptionError("no installed quantizer has all these widths without calibration; name one with --quantizer")
