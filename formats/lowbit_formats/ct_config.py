"""The quantization_config of compressed-tensors: config groups with targets, an ignore list, in and out.

    {"quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
     "ignore": ["lm_head"], "config_groups": {"group_0": {"targets": ["Linear"], "weights": {...}, "format": ...}}}

A target or an ignored name is a module's class, its whole name, or ``re:`` and a regular expression that the name begins with.
A whole name decides before an expression, and that before a class (compressed-tensors 0.20, ``utils.match.match_targets``).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lowbit.errors import CheckpointError
from lowbit.tensors import PackedSpec
from lowbit_formats.module_settings import Setting, by_setting, matcher, patterns, read_setting

FORMAT = "pack-quantized"
STRATEGIES = ("group", "channel")
KEYS = {"bits": ("num_bits",), "group_size": ("group_size",), "symmetric": ("symmetric",), "act_order": ()}


@dataclass(frozen=True, slots=True)
class ConfigGroup:
    """What one config group targets, and how it quantizes that."""

    targets: tuple[str, ...]
    setting: Setting


@dataclass(frozen=True, slots=True)
class ModuleSettings:
    """The settings of modules by name; ``where`` names the config in errors."""

    groups: tuple[ConfigGroup, ...]
    ignore: tuple[str, ...]
    where: str

    def setting(self, module: str) -> Setting:
        """Return the setting of a quantized module; raise CheckpointError when the config ignores or forgets it."""
        if ignored := next((target for target in self.ignore if self._rank(target, module) < _CLASS), None):
            raise CheckpointError(f"{module} is quantized, but {self.where} ignores {ignored!r}")
        ranked = [
            (rank, number)
            for number, group in enumerate(self.groups)
            for target in group.targets
            if (rank := self._rank(target, module)) <= _CLASS
        ]
        if not ranked:
            raise CheckpointError(f"{module} is quantized, but no config group of {self.where} targets it")
        return self.groups[min(ranked)[1]].setting

    def _rank(self, target: str, module: str) -> int:
        """Return how closely a target means a module: 0 for its name, then an expression, a class; ``_NONE`` not at all."""
        if target == module:
            return _NAME
        if target.startswith("re:"):
            return _EXPRESSION if matcher(target.removeprefix("re:"), self.where)(module) else _NONE
        return _CLASS if target.endswith("Linear") else _NONE


_NAME, _EXPRESSION, _CLASS, _NONE = range(4)


def read_groups(config: Mapping[str, Any], where: str) -> ModuleSettings:
    """Return the settings that a quantization_config makes.

    Raises CheckpointError, naming ``where``, for formats other than pack-quantized, quantized activations or caches, and
    anything malformed.
    """
    for key in ("kv_cache_scheme", "sparsity_config", "transform_config"):
        if config.get(key):
            raise CheckpointError(f"{where} has a {key}, which lowbit would lose; it reads quantized weights only")
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        raise CheckpointError(f"{where} must have config_groups, an object of objects, got {groups!r}")
    found = tuple(_read_group(group, f"{name} of {where}", config.get("format")) for name, group in groups.items())
    return ModuleSettings(found, _names(config.get("ignore") or [], f"ignore of {where}"), where)


def build_config(packed: Mapping[str, PackedSpec], plain: Collection[str]) -> dict[str, Any]:
    """Return the quantization_config for packed modules and the 2-D modules that stay plain.

    One setting targets the class Linear. Several target names: vLLM matches a class before the names of the parts of a
    fused module, so that beside a ``Linear`` they would not be found (0.33, ``compressed_tensors/utils.py``).
    """
    settings = by_setting(packed)
    ignored = [name for name in plain if name not in packed]
    if "lm_head" not in packed and "lm_head" not in ignored:
        ignored.append("lm_head")  # tied to the embedding, it has no tensor, but loaders find the module
    groups = {}
    for number, (setting, names) in enumerate(settings.items()):
        chosen = set(names)
        others = [name for name in (*packed, *plain) if name not in chosen]
        heads = [name for name in names if name.rpartition(".")[2] == "lm_head"]  # of another class in vLLM
        targets = ["Linear", *heads] if len(settings) == 1 else _targets(names, others)
        groups[f"group_{number}"] = _group(targets, setting)
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "ignore": _targets(ignored, packed),
        "config_groups": groups,
    }


def _targets(names: Sequence[str], others: Collection[str]) -> list[str]:
    """Return a name as it is, and an expression where one stands for the same module of every block."""
    return [_plain_name(pattern) or f"re:{pattern}" for pattern in patterns(names, others)]


def _plain_name(pattern: str) -> str | None:
    """Return the only name that a pattern of ``patterns`` matches; None when it stands for several."""
    return None if r"\d+" in pattern else pattern[1:-1].replace("\\", "")


def _group(targets: list[str], setting: Setting) -> dict[str, Any]:
    weights = {
        "num_bits": setting.bits,
        "type": "int",
        "symmetric": setting.symmetric,
        "strategy": "group" if setting.group_size else "channel",
        "group_size": setting.group_size,
        "dynamic": False,
    }
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "format": FORMAT,
    }


def _read_group(group: Mapping[str, Any], where: str, format: Any) -> ConfigGroup:
    weights = group.get("weights")
    if not isinstance(weights, dict):
        raise CheckpointError(f"{where} must quantize weights, got weights {weights!r}")
    problems = dict(_problems(group, weights, format))
    if problems:
        key, value = next(iter(problems.items()))
        raise CheckpointError(f"{where} has {key} {value!r}; lowbit reads integer weights packed as {FORMAT} only")
    size = -1 if _strategy(weights) == "channel" else weights.get("group_size")
    setting = read_setting({"symmetric": True, **weights, "group_size": size}, where, KEYS)
    return ConfigGroup(_names(group.get("targets"), f"targets of {where}"), setting)


def _problems(group: Mapping[str, Any], weights: Mapping[str, Any], format: Any) -> Iterator[tuple[str, Any]]:
    """Yield what a group says and lowbit cannot read."""
    if (own := group.get("format") or format) != FORMAT:
        yield "format", own
    for key in ("input_activations", "output_activations"):
        if group.get(key):
            yield key, group[key]
    if weights.get("type", "int") != "int":
        yield "type", weights["type"]
    if weights.get("dynamic"):
        yield "dynamic", weights["dynamic"]
    if _strategy(weights) not in STRATEGIES:
        yield "strategy", _strategy(weights)


def _strategy(weights: Mapping[str, Any]) -> Any:
    """Return the strategy; one left out follows from the group size, as in compressed-tensors' QuantizationArgs."""
    if (strategy := weights.get("strategy")) is not None:
        return strategy
    size = weights.get("group_size")
    return "tensor" if size is None else "channel" if size == -1 else "group"


def _names(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise CheckpointError(f"{where} must be a list of names, got {value!r}")
    return tuple(value)
