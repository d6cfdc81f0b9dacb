"""Hugging Face's tokenizer files from a GGUF vocabulary: tokenizer.json, tokenizer_config.json, generation_config.json.

A byte-level BPE model becomes what its published tokenizer.json was. A SentencePiece model becomes a BPE with byte fallback,
as transformers' converters make it: each way of cutting a token in two tokens is a merge, the best score first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from lowbit.errors import CheckpointError
from lowbit_formats.gguf.pretokenizers import BY_NAME
from lowbit_formats.gguf.vocabulary import TokenType, Vocabulary

SPACE = "\u2581"  # how SentencePiece writes a space
_PADDING = re.compile(r"\[PAD(\d+)\]")
_LONGEST = 1024  # characters of a piece; SentencePiece's own default limit is 16
_HF_ROLES = {"bos": "bos_token", "eos": "eos_token", "unk": "unk_token", "pad": "pad_token"}


def why_not(vocabulary: Vocabulary) -> str | None:
    """Return None when the tokenizer can be rebuilt, else the reason."""
    if vocabulary.model == "llama":
        return None if vocabulary.scores or vocabulary.merges else "a SentencePiece tokenizer without scores"
    if vocabulary.model != "gpt2":
        return f"tokenizer model {vocabulary.model!r}, known are gpt2 and llama"
    if (vocabulary.pre or "default") not in BY_NAME:
        return f"pre-tokenizer {vocabulary.pre!r}, known are {', '.join(BY_NAME)}"
    return None


def build(
    vocabulary: Vocabulary, architecture: str, context_length: int, sampling: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, bytes]:
    """Return the files by name; call only when ``why_not`` is None. Raises CheckpointError for impossible merges.

    ``sampling`` are fields of generation_config.json besides the vocabulary's.
    """
    tokenizer = _byte_level(vocabulary) if vocabulary.model == "gpt2" else _sentencepiece(vocabulary, architecture)
    files = {
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": _config(vocabulary, context_length),
        "generation_config.json": {**_generation(vocabulary), **sampling},
    }
    return {name: json.dumps(document, ensure_ascii=False, indent=1).encode() for name, document in files.items()}


def is_padding(token: str, id: int) -> bool:
    """Whether llama.cpp's converter invented this token to fill a hole in the ids."""
    found = _PADDING.fullmatch(token)
    return found is not None and int(found[1]) == id


def adds_bos(vocabulary: Vocabulary) -> bool:
    """Whether a text starts with the bos token; llama.cpp's defaults where the file does not say."""
    if vocabulary.add_bos is not None:
        return vocabulary.add_bos
    return vocabulary.model == "llama" or BY_NAME[vocabulary.pre or "default"].add_bos


def merges_by_score(vocabulary: Vocabulary, by_position: bool = False) -> Iterator[tuple[str, str, str]]:
    """Yield (left, right, whole) for every normal token that is two normal tokens, best score first.

    Tokens of one score keep the order of their ids, and the cuts of a token come longest left part first, as transformers'
    converters have them. ``by_position`` ranks by id alone: gemma's scores do not follow the order in which its pieces merge
    (transformers, gguf_tokenizer_mapping.py).
    """
    ids = {
        token: id
        for id, (token, type) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
        if type == TokenType.NORMAL
    }
    if long := next((token for token in ids if len(token) > _LONGEST), None):
        raise CheckpointError(
            f"a token of {len(long):,} characters ({long[:20]!r}...) is no piece of a SentencePiece model"
        )
    ranked = ids if by_position else sorted(ids, key=lambda token: -vocabulary.scores[ids[token]])
    for token in ranked:
        for cut in range(len(token) - 1, 0, -1):
            if token[:cut] in ids and token[cut:] in ids:
                yield token[:cut], token[cut:], token


def _byte_level(vocabulary: Vocabulary) -> dict[str, Any]:
    pre = BY_NAME[vocabulary.pre or "default"]
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": pre.ignore_merges,
        "vocab": _ids(vocabulary),
        "merges": list(_pairs(vocabulary)),
    }
    return {
        **_head(vocabulary),
        "normalizer": {"type": pre.normalizer} if pre.normalizer else None,
        "pre_tokenizer": pre.to_json(),
        "post_processor": _post_processor(vocabulary),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": model,
    }


def _sentencepiece(vocabulary: Vocabulary, architecture: str) -> dict[str, Any]:
    prefix = vocabulary.add_space_prefix is not False
    by_position = architecture.startswith("gemma")
    pairs = _pairs(vocabulary) if vocabulary.merges else (pair[:2] for pair in merges_by_score(vocabulary, by_position))
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = {"type": "Prepend", "prepend": SPACE}
    restore: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    unknown = vocabulary.roles.get("unk", 0)
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": vocabulary.tokens[unknown],
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": True,
        "ignore_merges": False,
        "vocab": _ids(vocabulary),
        "merges": list(pairs),
    }
    return {
        **_head(vocabulary),
        "normalizer": {"type": "Sequence", "normalizers": [prepend, replace] if prefix else [replace]},
        "pre_tokenizer": None,
        "post_processor": _post_processor(vocabulary),
        "decoder": {"type": "Sequence", "decoders": [*restore, strip] if prefix else restore},
        "model": model,
    }


def _ids(vocabulary: Vocabulary) -> dict[str, int]:
    """Return id by token, without the tokens that only fill holes."""
    return {
        token: id
        for id, (token, type) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
        if not (type == TokenType.UNUSED and is_padding(token, id))
    }


def _pairs(vocabulary: Vocabulary) -> Iterator[tuple[str, str]]:
    known = set(vocabulary.tokens)
    for merge in vocabulary.merges:
        left, _, right = merge.partition(" ")
        if not {left, right, left + right} <= known:
            raise CheckpointError(f"the merge {merge!r} of the tokenizer does not join two tokens to a third")
        yield left, right


def _head(vocabulary: Vocabulary) -> dict[str, Any]:
    added = [
        {
            "id": id,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": type != TokenType.USER_DEFINED,
        }
        for id, (token, type) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
        if type in (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)
    ]
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added}


def _post_processor(vocabulary: Vocabulary) -> dict[str, Any] | None:
    """Return a template when a special token is added on either side of a text, else None."""
    wanted = {"bos": adds_bos(vocabulary), "eos": bool(vocabulary.add_eos)}
    roles = {role: vocabulary.roles[role] for role, add in wanted.items() if add and role in vocabulary.roles}
    return _template({role: (id, vocabulary.tokens[id]) for role, id in roles.items()}) if roles else None


def _template(roles: Mapping[str, tuple[int, str]]) -> dict[str, Any]:
    def side(role: str, type_id: int) -> list[dict[str, Any]]:
        return [{"SpecialToken": {"id": roles[role][1], "type_id": type_id}}] if role in roles else []

    def text(sequence: str, type_id: int) -> list[dict[str, Any]]:
        return [*side("bos", type_id), {"Sequence": {"id": sequence, "type_id": type_id}}, *side("eos", type_id)]

    special = {token: {"id": token, "ids": [id], "tokens": [token]} for id, token in roles.values()}
    return {
        "type": "TemplateProcessing",
        "single": text("A", 0),
        "pair": [*text("A", 0), *text("B", 1)],
        "special_tokens": special,
    }


def _config(vocabulary: Vocabulary, context_length: int) -> dict[str, Any]:
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": adds_bos(vocabulary),
        "add_eos_token": bool(vocabulary.add_eos),
    }
    if vocabulary.model == "llama" or vocabulary.add_space_prefix is not None:
        config["add_prefix_space"] = vocabulary.add_space_prefix is not False
    for role, name in _HF_ROLES.items():
        config[name] = vocabulary.tokens[vocabulary.roles[role]] if role in vocabulary.roles else None
    if named := [{"name": name or "default", "template": text} for name, text in vocabulary.templates.items()]:
        config["chat_template"] = named if set(vocabulary.templates) != {""} else vocabulary.templates[""]
    return config


def _generation(vocabulary: Vocabulary) -> dict[str, Any]:
    roles = vocabulary.roles
    config: dict[str, Any] = {f"{role}_token_id": roles[role] for role in ("bos", "eos", "pad") if role in roles}
    if "eos" in roles and roles.get("eot", roles["eos"]) != roles["eos"]:
        config["eos_token_id"] = [roles["eos"], roles["eot"]]
    return {"_from_model_config": True, **config}
