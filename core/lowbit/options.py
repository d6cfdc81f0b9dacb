"""Options of plugins: from ``--set key=value`` strings to a frozen dataclass, by its type annotations."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, Literal, Union

from lowbit.errors import OptionError

_NONE = "none"
_ROW_WORDS = ("row", "channel", "-1")
"""What programs call a group of a whole row, beside none."""


def parse_settings(texts: Iterable[str]) -> dict[str, str]:
    """Parse ``key=value`` texts; ``-`` and ``_`` in keys are the same. Raises OptionError for anything else or a repeat."""
    settings: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not key:
            raise OptionError(f"a setting is written key=value, got {text!r}")
        if key in settings:
            raise OptionError(f"{key} is set twice: {settings[key]!r} and {value.strip()!r}")
        settings[key] = value.strip()
    return settings


def build_options(options_type: type, settings: Mapping[str, str], owner: str) -> Any:
    """Return an ``options_type`` (a dataclass) with ``settings`` applied; ``owner`` names the quantizer in errors.

    Fields may be annotated int, float, bool, str, Literal[...] or one of these ``| None``. Raises OptionError for an unknown
    key or a value that its field cannot take, and passes on what the dataclass itself refuses.
    """
    hints = typing.get_type_hints(options_type)
    known = [field.name for field in fields(options_type)]
    values = {}
    for key, text in settings.items():
        if key not in known:
            raise OptionError(_unknown(key, known, owner))
        says_row = key.endswith("group_size") and text.lower() in _ROW_WORDS
        values[key] = _convert(_NONE if says_row else text, hints[key], f"{owner} option {key}")
    return options_type(**values)


def describe_options(options_type: type) -> list[dict[str, str]]:
    """Return name, type, default and help of every option, for ``lowbit plugins`` and READMEs."""
    assert is_dataclass(options_type)
    hints = typing.get_type_hints(options_type)
    return [
        {
            "name": field.name,
            "type": _type_name(hints[field.name]),
            "default": _default(field),
            "help": str(field.metadata.get("help", "")),
        }
        for field in fields(options_type)
    ]


def _unknown(key: str, known: list[str], owner: str) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{owner} has no option {key!r}; it has {', '.join(known) or 'none'}{hint}"


def _convert(text: str, hint: Any, what: str) -> Any:
    members = _members(hint)
    if type(None) in members and text.lower() == _NONE:
        return None
    for member in members:
        if member is type(None):
            continue
        try:
            return _convert_one(text, member)
        except ValueError:
            continue
    raise OptionError(f"{what} must be {_type_name(hint)}, got {text!r}")


def _convert_one(text: str, kind: Any) -> Any:
    if typing.get_origin(kind) is Literal:
        for choice in typing.get_args(kind):
            if text == str(choice):
                return choice
        raise ValueError(text)
    if kind is bool:
        words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if text.lower() not in words:
            raise ValueError(text)
        return words[text.lower()]
    return kind(text)


def _members(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return " | ".join(str(choice) for choice in typing.get_args(hint))
    if len(members := _members(hint)) > 1:
        return " | ".join(_type_name(member) for member in members)
    return "none" if hint is type(None) else str(getattr(hint, "__name__", hint))


def _default(field: Field[Any]) -> str:
    return (
        "required"
        if field.default is MISSING
        else str(field.default).lower()
        if field.default is None
        else str(field.default)
    )
