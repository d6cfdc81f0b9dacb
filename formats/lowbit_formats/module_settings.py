"""What quantization configs say of single modules: bits, groups and symmetry, by default, by name and by pattern."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lowbit.errors import CheckpointError
from lowbit.scheme import Scheme
from lowbit.tensors import PackedSpec

WEIGHT = ".weight"
KEPT = "lowbit"
"""Key of a quantization_config under which lowbit's exporters keep what tensors alone do not tell; loaders ignore it.

A module's name maps to a list: ``zeros`` where integer zeros are the midpoint everywhere, which reads as symmetric without
this, and ``permutation`` where an act-order index is sequential, which reads as none.
"""


@dataclass(frozen=True, slots=True)
class Setting:
    """How one module is quantized; None where a file does not say.

    Attributes:
        bits: Bits of a code.
        group_size: Weights that share a scale; None is the whole row.
        symmetric: Whether the zero is the midpoint.
        act_order: Whether columns choose their group (``desc_act``).
    """

    bits: int
    group_size: int | None
    symmetric: bool | None = None
    act_order: bool | None = None

    @classmethod
    def of(cls, scheme: Scheme) -> Setting:
        """Return the setting of a scheme."""
        return cls(scheme.bits, scheme.group_size, scheme.symmetric, scheme.permutation)

    @property
    def stored_group_size(self) -> int:
        """The group size as configs write it: -1 for the whole row."""
        return self.group_size or -1


def read_setting(config: Mapping[str, Any], where: str, keys: Mapping[str, tuple[str, ...]]) -> Setting:
    """Return the setting that a config document makes.

    Args:
        config: The document.
        where: What names it in a CheckpointError, which a value of the wrong type raises.
        keys: The document's names for ``bits``, ``group_size``, ``symmetric`` and ``act_order``, the first present counts.
    """
    found = {field: _first(config, names) for field, names in keys.items()}
    bits, group_size = found["bits"], found["group_size"]
    if type(bits) is not int or not 2 <= bits <= 8:
        raise CheckpointError(f"{where} must give {keys['bits'][0]} from 2 to 8, got {bits!r}")
    if type(group_size) is not int or not (group_size == -1 or group_size > 0):
        raise CheckpointError(f"{where} must give a positive {keys['group_size'][0]} or -1, got {group_size!r}")
    flags = {field: found.get(field) for field in ("symmetric", "act_order")}
    for field, value in flags.items():
        if value is not None and type(value) is not bool:
            raise CheckpointError(f"{where}: {keys[field][0]} must be true or false, got {value!r}")
    return Setting(bits, None if group_size == -1 else group_size, **flags)


def read_kept(config: Mapping[str, Any], where: str) -> dict[str, frozenset[str]]:
    """Return what a quantization_config has under ``KEPT``; raise CheckpointError for anything but lists of words by module."""
    document = config.get(KEPT, {})
    lists = list(document.values()) if isinstance(document, dict) else [None]
    if not all(isinstance(words, list) and all(isinstance(word, str) for word in words) for words in lists):
        raise CheckpointError(
            f"{where}: {KEPT!r} must map modules to lists of words; remove it if lowbit did not write it"
        )
    return {module: frozenset(words) for module, words in document.items()}


def module_name(weight: str) -> str:
    """Return the module of a weight's name: without ``.weight``."""
    return weight.removesuffix(WEIGHT)


def by_setting(modules: Mapping[str, PackedSpec]) -> dict[Setting, list[str]]:
    """Group module names by their settings, the most frequent setting first."""
    grouped: dict[Setting, list[str]] = {}
    for name, spec in modules.items():
        grouped.setdefault(Setting.of(spec.scheme), []).append(name)
    return dict(sorted(grouped.items(), key=lambda item: -len(item[1])))


def patterns(chosen: Collection[str], others: Collection[str]) -> list[str]:
    r"""Return regular expressions that match the ``chosen`` module names whole, and none of ``others``.

    Modules that differ only in their numbers share one expression where every such module is chosen:
    ``^model\.layers\.\d+\.mlp\.gate$`` in place of one name for each layer.
    """
    taken = {_family(name) for name in others}
    found: dict[str, None] = {}
    for name in chosen:
        family = _family(name)
        found[f"^{re.escape(name) if family in taken else family}$"] = None
    return list(found)


def with_fused(names: Collection[str]) -> list[str]:
    """Add the names of the modules that vLLM and SGLang fuse, where all of their parts are among ``names``.

    They look up a fused module's own name in GPTQ's ``dynamic`` (vLLM 0.33, ``gptq_utils.get_dynamic_override``).
    """
    known, fused = set(names), []
    for whole, parts in {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}.items():
        for name in names:
            parent, _, last = name.rpartition(".")
            if last == parts[0] and all(f"{parent}.{part}" in known for part in parts):
                fused.append(f"{parent}.{whole}")
    return [*names, *fused]


def is_in_block(name: str) -> bool:
    """Whether a module is part of a numbered block, as decoder layers and experts are."""
    return any(part.isdigit() for part in name.split("."))


def matcher(pattern: str, where: str, search: bool = False) -> Callable[[str], bool]:
    """Return a test of names by a regular expression (``re.match``, or ``re.search``); CheckpointError for a broken one."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise CheckpointError(
            f"{where} has the pattern {pattern!r}, which is no regular expression: {error}"
        ) from error
    test = compiled.search if search else compiled.match
    return lambda name: test(name) is not None


def _first(config: Mapping[str, Any], names: Iterable[str]) -> Any:
    return next((config[name] for name in names if config.get(name) is not None), None)


def _family(name: str) -> str:
    """Return the expression that matches a name whatever its numbers."""
    return r"\.".join(_part(name))


def _part(name: str) -> Iterator[str]:
    for part in name.split("."):
        yield r"\d+" if part.isdigit() else re.escape(part)
