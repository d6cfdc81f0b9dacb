"""``Vocabulary``: a tokenizer as GGUF tells it, read from keys and written to keys."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum

from lowbit.errors import CheckpointError
from lowbit_formats.gguf.keys import Key, Keys, flag, text, texts, u32


class TokenType(IntEnum):
    """What a token is (enum llama_token_type)."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


# Roles that a Hugging Face config names, and others that are only carried along.
ROLES = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "pad": "padding_token_id"}
_OTHER_ROLES = {"eot": "eot_token_id"}


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Tokens, how they merge, and what is added around a text.

    Attributes:
        model: ``gpt2`` (byte-level BPE) or ``llama`` (SentencePiece with scores).
        pre: How text is cut before BPE; None where the file does not say.
        tokens: By id.
        types: A TokenType for each token.
        scores: For ``llama``, higher merges first; otherwise empty.
        merges: For ``gpt2``, "left right", first merges first; otherwise empty.
        roles: Ids by role: bos, eos, unk, pad, eot.
        templates: Chat templates by name, the unnamed one under "".
    """

    model: str
    tokens: list[str]
    types: list[int]
    pre: str | None = None
    scores: list[float] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)
    roles: Mapping[str, int] = field(default_factory=dict)
    add_bos: bool | None = None
    add_eos: bool | None = None
    add_space_prefix: bool | None = None
    templates: Mapping[str, str] = field(default_factory=dict)


def from_keys(keys: Keys) -> Vocabulary | None:
    """Return the vocabulary of a file, or None when it has none.

    Raises CheckpointError when its lists contradict each other. Roles of tokens that do not exist are left out, as
    llama.cpp leaves them out.
    """
    if "tokenizer.ggml.tokens" not in keys:
        return None
    tokens = keys.items("tokenizer.ggml.tokens", str)
    vocabulary = Vocabulary(
        model=keys.text("tokenizer.ggml.model"),
        tokens=tokens,
        types=keys.items("tokenizer.ggml.token_type", int, []) or [int(TokenType.NORMAL)] * len(tokens),
        pre=keys.text("tokenizer.ggml.pre", None),
        scores=keys.items("tokenizer.ggml.scores", float, []),
        merges=keys.items("tokenizer.ggml.merges", str, []),
        roles=_roles(keys, len(tokens)),
        add_bos=_flag(keys, "add_bos_token"),
        add_eos=_flag(keys, "add_eos_token"),
        add_space_prefix=_flag(keys, "add_space_prefix"),
        templates=_templates(keys),
    )
    _check(keys, vocabulary)
    return vocabulary


def to_keys(vocabulary: Vocabulary) -> list[Key]:
    """Return the keys of a vocabulary."""
    keys = [text("tokenizer.ggml.model", vocabulary.model), text("tokenizer.ggml.pre", vocabulary.pre or "default")]
    keys.append(texts("tokenizer.ggml.tokens", vocabulary.tokens))
    if vocabulary.scores:
        keys.append(Key("tokenizer.ggml.scores", "f32[]", vocabulary.scores))
    keys.append(Key("tokenizer.ggml.token_type", "i32[]", vocabulary.types))
    if vocabulary.model == "gpt2":
        keys.append(texts("tokenizer.ggml.merges", vocabulary.merges))
    names = {**ROLES, **_OTHER_ROLES}
    keys += [u32(f"tokenizer.ggml.{names[role]}", id) for role, id in vocabulary.roles.items()]
    flags = {
        "add_bos_token": vocabulary.add_bos,
        "add_eos_token": vocabulary.add_eos,
        "add_space_prefix": vocabulary.add_space_prefix,
    }
    keys += [flag(f"tokenizer.ggml.{name}", value) for name, value in flags.items() if value is not None]
    if named := [name for name in vocabulary.templates if name]:
        keys.append(texts("tokenizer.chat_templates", named))
    for name, template in vocabulary.templates.items():
        keys.append(text(f"tokenizer.chat_template.{name}".rstrip("."), template))
    return keys


def _flag(keys: Keys, name: str) -> bool | None:
    full = f"tokenizer.ggml.{name}"
    return keys.boolean(full) if full in keys else None


def _templates(keys: Keys) -> dict[str, str]:
    default = keys.text("tokenizer.chat_template", None)
    named = {
        name: keys.text(f"tokenizer.chat_template.{name}") for name in keys.items("tokenizer.chat_templates", str, [])
    }
    return ({} if default is None else {"": default}) | named


def _roles(keys: Keys, count: int) -> dict[str, int]:
    names = {role: f"tokenizer.ggml.{name}" for role, name in {**ROLES, **_OTHER_ROLES}.items()}
    found = {role: keys.integer(name) for role, name in names.items() if name in keys}
    return {role: id for role, id in found.items() if id < count}


def _check(keys: Keys, vocabulary: Vocabulary) -> None:
    count = len(vocabulary.tokens)
    if len(set(vocabulary.tokens)) != count:
        twice = Counter(vocabulary.tokens).most_common(1)[0][0]
        raise CheckpointError(f"{keys.path}: the token {twice!r} is in tokenizer.ggml.tokens twice")
    for name, values in (("token_type", vocabulary.types), ("scores", vocabulary.scores)):
        if values and len(values) != count:
            raise CheckpointError(
                f"{keys.path}: tokenizer.ggml.{name} has {len(values):,} elements for {count:,} tokens; the file is damaged"
            )
