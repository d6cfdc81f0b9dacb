"""``Recipe``: which tensors are quantized, by which quantizer, with which options.

Rules are globs over Hugging Face tensor names; the first that matches decides. What no rule matches falls to the default
(``--quantizer``), which takes the weights of linear layers and leaves embeddings, norms, routers and lm_head alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from lowbit.errors import OptionError
from lowbit.interfaces import Entry, Quantizer
from lowbit.options import build_options, parse_settings
from lowbit.outliers import take_outliers, with_outliers
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
    "mtp.*",
    "*.mtp.*",
    "*visual.*",
    "*vision_*",
    "*multi_modal_projector*",
    "*mm_projector*",
)
"""2-D weights that the default leaves alone: looked up or sensitive, and small against the linears.

Heads for multi-token prediction, vision towers and what joins them to the language model are copied, as their loaders expect.
"""


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
    """A quantizer with its options, settled for one tensor; ``given`` are the options that the user set."""

    quantizer: Quantizer[Any]
    options: Any
    given: frozenset[str] = frozenset()

    @property
    def scheme(self) -> Scheme:
        """The scheme that the quantizer gives with these options."""
        return self.quantizer.scheme(self.options)

    def fitted(self, scheme: Scheme, name: str, codebook: Tensor | None = None) -> Choice:
        """Return this choice with options that give ``scheme`` (with ``codebook``); raise OptionError when there are none."""
        options = self.options if self.scheme == scheme else self.quantizer.fit(self.options, scheme)
        if options is not None and codebook is not None:
            options = self.quantizer.with_codebook(options, codebook)
        if options is None or self.quantizer.scheme(options) != scheme:
            raise OptionError(
                f"{name} must become {scheme.summary()}, and quantizer {self.quantizer.name!r} with these options gives "
                f"{self.scheme.summary()}; choose another quantizer, or leave the format's variant out"
            )
        if options == self.options:
            return self
        for key in sorted(self.given):
            asked, needed = getattr(self.options, key), getattr(options, key)
            if asked != needed:
                raise OptionError(f"{self.quantizer.name} is asked for {key}={asked}, but {name} needs {key}={needed}")
        return Choice(self.quantizer, options, self.given)


@dataclass(frozen=True, slots=True)
class Recipe:
    """The default rule (None: quantize nothing that no rule names) and the rules before it.

    ``requantize`` allows new codes for weights that are quantized already: those that a rule takes, and without a default those
    that have no exact route.
    """

    default: Rule | None = None
    rules: tuple[Rule, ...] = ()
    requantize: bool = False

    @property
    def quantizes(self) -> bool:
        """Whether any rule quantizes."""
        return self.default is not None or any(rule.quantizer != KEEP for rule in self.rules)

    def choose(
        self,
        entries: Mapping[str, Entry],
        registry: Registry,
        wanted: Mapping[str, Scheme] = MappingProxyType({}),
        codebooks: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> dict[str, Choice]:
        """Return the choice for every tensor that will be quantized.

        ``wanted`` holds the schemes that the format's variant asks for, by tensor; the default quantizer takes these tensors
        and no others, and every choice for one of them is fitted to its scheme, and to its codebook if the layout has one. Raises OptionError for a rule that matches no weight,
        options that make no sense, or a quantizer that cannot give the wanted scheme; UnknownComponentError for an unknown
        quantizer.
        """
        choices = {id(rule): self._choice(rule, registry) for rule in (*self.rules, self.default) if rule}
        weights = [name for name, entry in entries.items() if is_matrix(entry)]
        for rule in self.rules:
            if not any(fnmatchcase(name, rule.pattern) for name in weights):
                raise OptionError(f"rule {rule.pattern!r} matches no 2-D weight; lowbit inspect lists the names")
        chosen = {}
        for name in weights:
            decides = self._rule_for(name, name in wanted if wanted else is_linear_name(name))
            choice = choices[id(decides)] if decides else None
            if choice is not None:
                chosen[name] = choice.fitted(wanted[name], name, codebooks.get(name)) if name in wanted else choice
        return chosen

    def _rule_for(self, name: str, by_default: bool) -> Rule | None:
        for rule in self.rules:
            if fnmatchcase(name, rule.pattern):
                return rule
        return self.default if by_default else None

    def _choice(self, rule: Rule, registry: Registry) -> Choice | None:
        if rule.quantizer == KEEP:
            return None
        quantizer = registry.quantizers[rule.quantizer]
        settings = dict(rule.settings)
        if self.default and self.default.quantizer == rule.quantizer:
            settings = {**self.default.settings, **settings}
        settings, outliers = take_outliers(settings, quantizer.Options)
        options = build_options(quantizer.Options, settings, quantizer.name)
        if outliers:
            quantizer = with_outliers(quantizer, outliers)
        return Choice(quantizer, options, frozenset(settings))


NOTHING = Recipe()
"""The recipe that quantizes nothing: convert transcodes."""


def is_matrix(entry: Entry) -> bool:
    """Whether an entry is a 2-D weight of floats, packed or not."""
    return isinstance(entry, PackedSpec) or (len(entry.shape) == 2 and entry.dtype.is_floating_point)


def is_linear_name(name: str) -> bool:
    """Whether the name is that of a linear layer's weight, which the default quantizes."""
    return name.endswith(".weight") and not any(fnmatchcase(name, pattern) for pattern in LEFT_ALONE)


def parse_rules(texts: Iterable[str]) -> tuple[Rule, ...]:
    """Parse every ``--rule``; ``@FILE`` stands for the rules of a file, one in a line, ``#`` before a remark.

    Raises OptionError.
    """
    lines: list[str] = []
    for text in texts:
        lines += _rule_lines(Path(text[1:])) if text.startswith("@") else [text]
    return tuple(Rule.parse(line) for line in lines)


def _rule_lines(path: Path) -> list[str]:
    try:
        lines = [line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"--rule @{path} cannot be read: {error}") from error
    return [line for line in lines if line]
