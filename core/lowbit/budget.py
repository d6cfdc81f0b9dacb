"""An average budget, ``--bits 3.5``: each layer gets the width that ``lowbit.sensitivity`` chooses for it.

What counts are the bits that the format stores for each weight, scales and all. A quantizer whose ``bits`` are a fraction by
themselves gets them as they are.
"""

from __future__ import annotations

import math
import typing
from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from types import MappingProxyType

from lowbit.errors import LowbitError, OptionError
from lowbit.interfaces import Calibration, Checkpoint
from lowbit.plan import COLLECTED, Target, make_plan
from lowbit.recipe import Recipe, Rule
from lowbit.registry import Registry
from lowbit.sensitivity import Layer, at_width, average_bits, choose_widths, measure_layers

WIDTHS = (2, 3, 4, 5, 6, 8)
"""Bits of codes that a layer may get, as far as the quantizer and the format have them."""


def within_budget(
    recipe: Recipe,
    checkpoint: Checkpoint,
    target: Target,
    registry: Registry,
    calibration: Mapping[str, Calibration] = MappingProxyType({}),
) -> Recipe:
    """Return ``recipe`` with a rule for each weight that its default takes, where the default's bits are an average.

    Errors are those of rounding every weight at every width; they are of outputs where ``calibration`` knows the inputs.
    Raises OptionError for a budget that no choice of widths meets or needs, or that a variant or a rule leaves open.
    """
    budget = average_of(recipe, registry)
    default = recipe.default
    if budget is None or default is None:
        return recipe
    if not math.isfinite(budget) or budget <= 0:
        raise OptionError(f"--bits must be a number above 0, got {default.settings['bits']}")
    if target.variant:
        raise OptionError(
            f"--bits {budget:g} is an average over layers, and {target.format}:{target.variant} says the type of each; leave the "
            "variant out, or --bits"
        )
    for rule in recipe.rules:
        if rule.quantizer == default.quantizer and "bits" not in rule.settings:
            raise OptionError(
                f"--bits {budget:g} is an average over the layers that no rule takes, so rule {rule.pattern!r} needs bits of its "
                f"own; write {rule.pattern}={rule.quantizer},bits=4"
            )
    layers = _measured(recipe, default, checkpoint, target, registry, calibration)
    chosen = _chosen(layers, budget)
    widths = {layer.name: layer.widths[chosen[layer.name]].bits for layer in layers}
    rules = tuple(Rule(name, default.quantizer, {"bits": f"{bits:g}"}) for name, bits in widths.items())
    return replace(recipe, default=at_width(default, min(widths.values())), rules=(*recipe.rules, *rules))


def average_of(recipe: Recipe, registry: Registry) -> float | None:
    """Return the average that the default's ``bits`` are, or None where they are bits of a code."""
    if recipe.default is None or recipe.default.quantizer not in registry.quantizers:
        return None
    options = registry.quantizers[recipe.default.quantizer].Options
    try:
        bits = float(recipe.default.settings["bits"])
    except (KeyError, ValueError):
        return None
    return bits if typing.get_type_hints(options).get("bits") is int and bits % 1 else None


def _measured(
    recipe: Recipe,
    default: Rule,
    checkpoint: Checkpoint,
    target: Target,
    registry: Registry,
    calibration: Mapping[str, Calibration],
) -> list[Layer]:
    """Return the layers that no rule takes at every width that there is."""
    widths, refusal = [], None
    for bits in WIDTHS:
        asked = Recipe(at_width(default, bits), recipe.rules, recipe.requantize)
        try:
            make_plan(checkpoint, asked, target, registry, calibration, COLLECTED)
        except LowbitError as error:
            refusal = error
        else:
            widths.append(bits)
    if not widths and refusal is not None:
        raise refusal
    layers = measure_layers(checkpoint, registry, default, widths, target, calibration)
    left = [layer for layer in layers if not any(fnmatchcase(layer.name, rule.pattern) for rule in recipe.rules)]
    if not left:
        raise OptionError(
            "an average of --bits needs layers to choose for, and the rules take every one; give whole bits"
        )
    return left


def _chosen(layers: list[Layer], budget: float) -> dict[str, int]:
    widest = {layer.name: max(range(len(layer.widths)), key=lambda i: layer.widths[i].stored) for layer in layers}
    most = average_bits(layers, widest)
    if budget > most:
        raise OptionError(
            f"--bits {budget:g} is more than the widest codes store, which is {most:.3f}; give whole bits"
        )
    return choose_widths(layers, budget)
