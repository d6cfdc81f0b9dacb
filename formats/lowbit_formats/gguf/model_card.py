"""What a model card says, and how to sample: front matter of README.md and generation_config.json as ``general.*`` keys, and back.

A single GGUF file has no place for other files, so that of a model card the fields survive that GGUF has keys for (gguf-py's
``metadata.py`` writes the same): licence, languages, tags, base models, data sets. The text of the card does not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from lowbit.errors import CheckpointError
from lowbit.metadata import Metadata
from lowbit_formats.gguf.keys import Key, Keys, f32, text, texts, u32
from lowbit_formats.strict_json import parse_object

CARD, GENERATION = "README.md", "generation_config.json"
_HUB = "https://huggingface.co/"
_STRINGS = {
    "license": "general.license",
    "license_name": "general.license.name",
    "license_link": "general.license.link",
}
_LISTS = {"tags": "general.tags", "language": "general.languages"}
_SOURCES = {"base_model": "general.base_model", "datasets": "general.dataset"}
_SAMPLING = {
    "temperature": ("general.sampling.temp", "f32"),
    "top_k": ("general.sampling.top_k", "i32"),
    "top_p": ("general.sampling.top_p", "f32"),
    "min_p": ("general.sampling.min_p", "f32"),
    "repetition_penalty": ("general.sampling.penalty_repeat", "f32"),
}
_FIELD = re.compile(r"([A-Za-z_][\w-]*):(?:\s+(.*))?")
_ITEM = re.compile(r"\s*-\s+(.+)")
_COMMENT = re.compile(r"(?:^|\s+)#.*$")
_LONGEST_CARD = 1 << 20

Fields = Mapping[str, list[str]]


def owns(name: str) -> bool:
    """Whether a key of a file becomes part of the rebuilt README.md."""
    return name in _STRINGS.values() or name.startswith(tuple(f"{stem}." for stem in _SOURCES.values()))


def to_keys(metadata: Metadata) -> list[Key]:
    """Return the keys that the card and the generation config give; a field that is no plain text or list is left out."""
    card = metadata.side_file(CARD)
    fields = {} if card is None else front_matter(card.read()[:_LONGEST_CARD].decode(errors="replace"))
    keys = [text(key, fields[name][0]) for name, key in _STRINGS.items() if fields.get(name)]
    keys += [texts(key, fields[name]) for name, key in _LISTS.items() if fields.get(name)]
    for name, stem in _SOURCES.items():
        keys += _source_keys(stem, fields.get(name) or [])
    name = (fields.get("model_name") or [metadata.provenance.get("source", "")])[0]
    if name and "general.name" not in metadata.provenance:
        keys.append(text("general.name", name))
    return keys + _sampling_keys(metadata)


def from_keys(keys: Keys) -> bytes | None:
    """Return a README.md with the front matter that the file tells, or None when it tells nothing of it."""
    fields: dict[str, str | list[str]] = {
        name: value for name, key in _STRINGS.items() if (value := keys.text(key, None)) is not None
    }
    fields |= {name: found for name, key in _LISTS.items() if (found := keys.items(key, str, []))}
    fields |= {name: found for name, stem in _SOURCES.items() if (found := _sources(keys, stem))}
    if not fields:
        return None
    lines = ["---"]
    for field, said in fields.items():
        quoted = [json.dumps(item, ensure_ascii=False) for item in ([said] if isinstance(said, str) else said)]
        lines += (
            [f"{field}: {quoted[0]}"] if isinstance(said, str) else [f"{field}:", *(f"- {item}" for item in quoted)]
        )
    title = keys.text("general.name", "Model")
    lines += [
        "---",
        "",
        f"# {title}",
        "",
        "The fields above are those of the GGUF file that this model was read from.",
        "",
    ]
    return "\n".join(lines).encode()


def sampling(keys: Keys) -> dict[str, Any]:
    """Return the fields of generation_config.json that the file tells; empty when it tells none."""
    found: dict[str, Any] = {}
    for name, (key, kind) in _SAMPLING.items():
        if key in keys:
            found[name] = keys.number(key) if kind == "f32" else keys.integer(key)
    return {"do_sample": True, **found} if found else {}


def front_matter(card: str) -> dict[str, list[str]]:
    """Return the top-level fields between the ``---`` lines that start a card: strings and lists of strings, always as lists.

    A small part of YAML: nested fields, block texts and anchors are passed over, as are fields that are no text.
    """
    lines = card.lstrip("\ufeff").splitlines()
    if not lines or lines[0].strip() != "---":
        return {}
    fields: dict[str, list[str]] = {}
    current: list[str] | None = None
    for line in lines[1:]:
        if line.strip() == "---":
            return {name: values for name, values in fields.items() if values}
        if (item := _ITEM.fullmatch(line)) and current is not None:
            if not _FIELD.fullmatch(item[1]):
                current.append(_scalar(item[1]))
        elif field := _FIELD.fullmatch(line):
            current = fields[field[1]] = _values(field[2] or "")
        elif line[:1].strip():
            current = None
    return {}  # no second line of dashes: it was a rule under nothing, and what follows is text


def _values(written: str) -> list[str]:
    plain = _COMMENT.sub("", written).strip()
    if plain.startswith("[") and plain.endswith("]"):
        return [_scalar(item) for item in plain[1:-1].split(",") if item.strip()]
    if plain[:1] in ("|", ">", "{", "&", "*") or not written.strip():
        return []
    return [_scalar(written)] if _scalar(written) else []


def _scalar(written: str) -> str:
    written = written.strip()
    if written[:1] in ('"', "'") and (end := written.rfind(written[0])) > 0:
        quoted = written[: end + 1]
        try:
            return str(json.loads(quoted))
        except ValueError:
            return quoted[1:-1].replace("''", "'")
    return _COMMENT.sub("", written).strip()


def _source_keys(stem: str, names: list[str]) -> list[Key]:
    """Return the keys of base models or data sets, given as ``organization/name``, as a name alone, or as an address."""
    if not names:
        return []
    keys = [u32(f"{stem}.count", len(names))]
    for index, given in enumerate(names):
        path = given.removeprefix(_HUB)
        organization, _, name = path.rpartition("/")
        keys.append(text(f"{stem}.{index}.name", name or path))
        if organization and "/" not in organization:
            keys.append(text(f"{stem}.{index}.organization", organization))
        if organization:
            keys.append(text(f"{stem}.{index}.repo_url", given if "://" in given else _HUB + given))
    return keys


def _sources(keys: Keys, stem: str) -> list[str]:
    found = []
    for index in range(min(keys.integer(f"{stem}.count", 0), len(keys.values))):
        address, name = (keys.text(f"{stem}.{index}.{part}", None) for part in ("repo_url", "name"))
        if address or name:
            found.append((address or name or "").removeprefix(_HUB))
    return found


def _sampling_keys(metadata: Metadata) -> list[Key]:
    """Return how the model wants to be sampled; a model that is not to be sampled says nothing."""
    file = metadata.side_file(GENERATION)
    if file is None:
        return []
    config = parse_object(file.read(), GENERATION, unique=False)
    if not config.get("do_sample"):
        return []
    keys = []
    for name, (key, kind) in _SAMPLING.items():
        value = config.get(name)
        if value is None:
            continue
        whole = kind == "i32"
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or abs(value) >= 2**31:
            raise CheckpointError(f"{GENERATION} says that {name} is {value!r}; it must be a {'whole ' * whole}number")
        keys.append(f32(key, value) if kind == "f32" else Key(key, "i32", value))
    return keys
