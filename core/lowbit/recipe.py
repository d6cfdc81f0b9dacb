"""``Recipe``: which tensors are quantized, by which quantizer, with which options.

Rules are globs over Hugging Face tensor names; the first that matches decides. What no rule matches falls to the default
(``--quantizer``), which takes the weights of linear layers and leaves embeddings, norms, routers and lm_head alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from lowbit.errors import OptionError
from lowbit.interfaces import Entry, Quantizer
from lowbit.options import build_options, parse_settings
from lowbit.registry import Registry
from lowbit.scheme import Scheme
from lowbit.tensors import PackedSpec

KEEP = "none"
"""The word in place of a quantizer that leaves matching tensors as they are."""

LEFT_ALONE = (
    "*embed*",
    "*wte.weight",
    "*wpe.weight",
    "*norm*",
    "lm_head.*",
    "*.lm_head.*",
    "*.gate.weight",
    "*router*",
)
"""2-D weights that the default leaves alone: looked up or sensitive, and small against the linears."""


@dataclass(frozen=True, slots=True)
class Rule:
    """A glob, the quantizer for what it matches (``none`` keeps it), and settings as text."""

    pattern: str
    quantizer: str
    settings: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Rule:
        """Parse ``PATTERN=QUANTIZER[,key=value...]``; raises OptionError."""
        pattern, equals, rest = text.partition("=")
        quantizer, *settings = [part.strip() for part in rest.split(",")]
        if not equals or not pattern.strip() or not quantizer or "=" in quantizer:
            raise OptionError(f"a rule is written PATTERN=QUANTIZER,key=value (or PATTERN=none to keep), got {text!r}")
        return cls(pattern.strip(), quantizer, parse_settings(settings))


@dataclass(frozen=True, slots=True)
class Choice:
    """A quantizer with its options, settled for one tensor."""

    quantizer: Quantizer[Any]
    options: Any


@dataclass(frozen=True, slots=True)
class Recipe:
    """The default rule (None: quantize nothing that no rule names) and the rules before it."""

    default: Rule | None = None
    rules: tuple[Rule, ...] = ()

    @property
    def quantizes(self) -> bool:
        """Whether any rule quantizes."""
        return self.default is not None or any(rule.quantizer != KEEP for rule in self.rules)

    def choose(self, entries: Mapping[str, Entry], registry: Registry) -> dict[str, Choice]:
        """Return the choice for every tensor that will be quantized.

        Raises OptionError for a rule that matches no weight or options that make no sense, UnknownComponentError for an
        unknown quantizer.
        """
        choices = {id(rule): self._choice(rule, registry) for rule in (*self.rules, self.default) if rule}
        weights = [name for name, entry in entries.items() if is_matrix(entry)]
        for rule in self.rules:
            if not any(fnmatchcase(name, rule.pattern) for name in weights):
                raise OptionError(f"rule {rule.pattern!r} matches no 2-D weight; lowbit inspect lists the names")
        chosen = {name: self._rule_for(name) for name in weights}
        return {name: choice for name, rule in chosen.items() if rule and (choice := choices[id(rule)])}

    def fitted(self, scheme: Scheme, registry: Registry) -> Recipe:
        """Return this recipe with what ``scheme`` says filled in: the format's variant (``gguf:q4_0``) asks for it.

        Raises OptionError where a rule asks for something else.
        """
        fit = partial(_fit, scheme=scheme, registry=registry)
        return Recipe(fit(self.default) if self.default else None, tuple(fit(rule) for rule in self.rules))

    def _rule_for(self, name: str) -> Rule | None:
        for rule in self.rules:
            if fnmatchcase(name, rule.pattern):
                return rule
        return self.default if is_linear_name(name) else None

    def _choice(self, rule: Rule, registry: Registry) -> Choice | None:
        if rule.quantizer == KEEP:
            return None
        quantizer = registry.quantizers[rule.quantizer]
        settings = dict(rule.settings)
        if self.default and self.default.quantizer == rule.quantizer:
            settings = {**self.default.settings, **settings}
        return Choice(quantizer, build_options(quantizer.Options, settings, quantizer.name))


NOTHING = Recipe()
"""The recipe that quantizes nothing: convert transcodes."""


def is_matrix(entry: Entry) -> bool:
    """Whether an entry is a 2-D weight of floats, packed or not."""
    return isinstance(entry, PackedSpec) or (len(entry.shape) == 2 and entry.dtype.is_floating_point)


def is_linear_name(name: str) -> bool:
    """Whether the name is that of a linear layer's weight, which the default quantizes."""
    return name.endswith(".weight") and not any(fnmatchcase(name, pattern) for pattern in LEFT_ALONE)


def parse_rules(texts: Iterable[str]) -> tuple[Rule, ...]:
    """Parse every ``--rule``."""
    return tuple(Rule.parse(text) for text in texts)


def _fit(rule: Rule, scheme: Scheme, registry: Registry) -> Rule:
    if rule.quantizer == KEEP:
        return rule
    options_type = registry.quantizers[rule.quantizer].Options
    says = {
        "bits": str(scheme.bits),
        "group_size": "none" if scheme.group_size is None else str(scheme.group_size),
        "symmetric": str(scheme.symmetric).lower(),
        "scale_dtype": scheme.scales.dtype,
    }
    if not scheme.symmetric:
        says["zero"] = scheme.zero.value
    says = {name: value for name, value in says.items() if name in options_type.__dataclass_fields__}
    for name, value in says.items():
        if rule.settings.get(name, value).lower() != value:
            raise OptionError(
                f"{rule.quantizer} is asked for {name}={rule.settings[name]}, but the format needs {name}={value}"
            )
    return replace(rule, settings={**rule.settings, **says})
