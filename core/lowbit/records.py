"""Frozen dataclasses as JSON documents and back: strict, because the documents come from files that anyone may have written."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from lowbit.errors import SchemeError

T = TypeVar("T")


def to_document(record: Any) -> dict[str, Any]:
    """Return a JSON document of a dataclass; its fields at their default are left out, nested records are complete."""
    values = {field.name: (getattr(record, field.name), field.default) for field in fields(record)}
    return {name: _plain(value) for name, (value, default) in values.items() if value != default}


def from_document(kind: type[T], document: Any) -> T:
    """Build ``kind`` from a document; raise SchemeError for unknown fields and for values of another type than the field's."""
    if not isinstance(document, dict):
        raise SchemeError(f"a {kind.__name__} must be a JSON object, got {document!r}")
    erased: type = kind  # mypy takes a type as hashable, but not a type[T]
    hints = _hints(erased)
    if unknown := sorted(str(name) for name in document if name not in hints):
        raise SchemeError(f"unknown {kind.__name__} field {unknown[0]!r}; this lowbit is older than the file")
    arguments = {name: _value(kind, name, hints[name], value) for name, value in document.items()}
    try:
        return kind(**arguments)
    except TypeError as error:  # a field without a default is missing
        raise SchemeError(f"incomplete {kind.__name__}: {error}") from error


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Enum):
        return value.value
    return list(value) if isinstance(value, tuple) else value


@cache
def _hints(kind: type) -> dict[str, Any]:
    resolved = get_type_hints(kind)
    return {field.name: resolved[field.name] for field in fields(kind)}


def _value(kind: type, name: str, hint: Any, value: Any) -> Any:
    """Convert one JSON value to the type that the field's annotation asks for."""
    options = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    (wanted,) = (option for option in options if option is not type(None))
    if is_dataclass(wanted):
        assert isinstance(wanted, type)
        return from_document(wanted, value)
    if isinstance(wanted, type) and issubclass(wanted, Enum):
        return _member(name, wanted, value)
    if get_origin(wanted) is tuple:
        return _integers(kind, name, get_args(wanted), value)
    if type(value) is not wanted:  # not isinstance: True is no 1
        raise SchemeError(f"{kind.__name__} {name} must be {wanted.__name__}, got {value!r}")
    return value


def _member(name: str, kind: type[Enum], value: Any) -> Enum:
    try:
        return kind(value)
    except ValueError as error:
        known = ", ".join(str(member.value) for member in kind)
        raise SchemeError(f"{name} must be one of {known}, got {value!r}") from error


def _integers(kind: type, name: str, items: tuple[Any, ...], value: Any) -> tuple[int, ...]:
    """Return a list as a tuple of int: of any length for ``tuple[int, ...]``, else of as many as the annotation has."""
    fits = isinstance(value, list) and all(type(item) is int for item in value)
    if not fits or (items[-1] is not Ellipsis and len(value) != len(items)):
        raise SchemeError(f"{kind.__name__} {name} must be a list of whole numbers, got {value!r}")
    return tuple(value)
