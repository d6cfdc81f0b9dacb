"""``lowbit.explain``: which kernel serves each packed layer, and why the faster ones do not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from lowbit.runtime.packed_module import PackedModule


@dataclass(frozen=True, slots=True)
class LayerExplanation:
    """One layer: what it holds, who multiplies, and the refusal of each faster kernel, fastest first."""

    name: str
    layout: str
    scheme: str
    shape: tuple[int, int]
    kernel: str
    refusals: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Explanation:
    """Every packed layer of a model; ``str`` of it lists equal ones once."""

    layers: tuple[LayerExplanation, ...]

    def __str__(self) -> str:
        if not self.layers:
            return "no layer of this model is packed"
        groups: dict[tuple[str, str, str, tuple[tuple[str, str], ...]], list[LayerExplanation]] = {}
        for layer in self.layers:
            key = (layer.kernel, layer.layout, layer.scheme, tuple(layer.refusals.items()))
            groups.setdefault(key, []).append(layer)
        lines = []
        for (kernel, layout, scheme, refusals), layers in groups.items():
            lines.append(f"{kernel} serves {len(layers)} of {layout} ({scheme}), such as {layers[0].name}")
            lines += [f"    not {name}: {reason}" for name, reason in refusals]
        return "\n".join(lines)


def explain(model: nn.Module) -> Explanation:
    """Explain every packed layer of a model, preparing those that are not."""
    return Explanation(
        tuple(_layer(name, module) for name, module in model.named_modules() if isinstance(module, PackedModule))
    )


def _layer(name: str, layer: PackedModule) -> LayerExplanation:
    layer.prepared()
    assert layer.choice is not None
    spec = layer.spec
    return LayerExplanation(
        name, spec.layout, spec.scheme.summary(), spec.shape, layer.choice.kernel.name, layer.choice.refusals
    )
