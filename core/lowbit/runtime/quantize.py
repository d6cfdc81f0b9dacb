"""``lowbit.quantize_model``: quantize the linears of a model that is already in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from lowbit.errors import OptionError, SchemeError, WeightError
from lowbit.interfaces import Entry
from lowbit.parts import TensorSpec
from lowbit.plugins import installed
from lowbit.recipe import Choice, Recipe, Rule
from lowbit.registry import Registry
from lowbit.runtime.experts import PackedExperts, is_fused
from lowbit.runtime.linear import QuantLinear
from lowbit.runtime.slots import replace_module

FORMAT = "native"


def quantize_model(
    model: Any,
    quantizer: str | None,
    *,
    rules: Iterable[str | Rule] = (),
    registry: Registry | None = None,
    **options: Any,
) -> Any:
    """Quantize linears of ``model`` in place, one at a time, and return it.

    The same choice as ``lowbit convert`` makes: embeddings, routers and lm_head stay as they are unless a rule names them.
    Fused experts of transformers 5 are opened first. A transformers model is saved afterwards, by ``save_pretrained``, as a
    native folder.

    Args:
        model: Any module; ``nn.Linear`` weights are named by their path.
        quantizer: The default quantizer; None quantizes only what a rule names.
        rules: ``Rule`` objects, or text as of ``--rule``: ``"*.down_proj.weight=kbit,bits=5"``.
        registry: Components to use; by default everything installed.
        **options: Options of the quantizer, such as ``bits=4, group_size=64``.

    Raises:
        OptionError: For options that make no sense, rules that match nothing, and quantizers that need calibration.
        WeightError: When a weight cannot be quantized.
        NoRouteError: When no installed layout holds the scheme.
    """
    registry = registry or installed()
    default = Rule("*", quantizer, {key: _text(value) for key, value in options.items()}) if quantizer else None
    recipe = Recipe(default, tuple(Rule.parse(rule) if isinstance(rule, str) else rule for rule in rules))
    _open_experts(model)
    linears = dict(_linears(model))
    entries: dict[str, Entry] = {name: TensorSpec.of(linear.weight) for name, linear in linears.items()}
    choices = recipe.choose(entries, registry)
    for name, choice in choices.items():
        _check(name, choice, linears[name], registry)
    for name, choice in choices.items():
        replace_module(model, name.removesuffix(".weight"), _quantized(name, linears.pop(name), choice, registry))
    if choices and hasattr(model, "save_pretrained"):
        from lowbit.runtime.save import native_save

        native_save(model)
    return model


def _text(value: Any) -> str:
    """Return an option as ``--set`` takes it."""
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and not isinstance(module, QuantLinear):
            yield f"{path}.weight", module


def _open_experts(model: nn.Module) -> None:
    for path, module in [(path, module) for path, module in model.named_modules() if is_fused(module)]:
        opened = PackedExperts(module, {"gate_proj", "up_proj", "down_proj"}, path)
        opened.copy_weights(module)
        replace_module(model, path, opened)


def _check(name: str, choice: Choice, linear: nn.Linear, registry: Registry) -> None:
    if missing := choice.quantizer.needs_for(choice.options):
        needs = ", ".join(sorted(missing))
        raise OptionError(
            f"{choice.quantizer.name} needs {needs} from calibration, which lowbit convert collects ({name})"
        )
    registry.route(choice.scheme, (linear.out_features, linear.in_features), FORMAT)


def _quantized(name: str, linear: nn.Linear, choice: Choice, registry: Registry) -> QuantLinear:
    weight = linear.weight.detach()
    try:
        quantized = choice.quantizer.quantize(weight, choice.options)
    except (WeightError, SchemeError) as error:
        raise type(error)(f"{name}: {error}") from error
    packer = registry.route(quantized.scheme, quantized.shape, FORMAT).packer
    assert packer is not None  # the native format stores packed weights
    packed = packer.pack(quantized)
    layer = QuantLinear.from_packed(packed, linear.bias, dtype=weight.dtype, registry=registry)
    return layer.train(linear.training)
