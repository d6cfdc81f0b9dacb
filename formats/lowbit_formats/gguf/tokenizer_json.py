"""A GGUF vocabulary from Hugging Face's tokenizer files: the opposite of ``tokenizer_files``.

Byte-level BPE becomes ``gpt2`` with the ``pre`` that llama.cpp knows it by; BPE with byte fallback becomes ``llama`` with
scores that merge in the same order. Everything else is refused by name: a wrong tokenizer is a model that talks nonsense.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lowbit.errors import CheckpointError
from lowbit.metadata import Metadata
from lowbit_formats.gguf import pre_hashes
from lowbit_formats.gguf.pretokenizers import recognise
from lowbit_formats.gguf.tokenizer_files import SPACE, merges_by_score
from lowbit_formats.gguf.vocabulary import TokenType, Vocabulary
from lowbit_formats.strict_json import parse_object

_LOOK_SPECIAL = ("<pad>", "<mask>", "<2mass>", "[@BOS@]")  # conversion/base.py: does_token_look_special
_FENCES = (("<|", "|>"), ("<\uff5c", "\uff5c>"), ("<unused", ">"))
_BYTES = {f"<0x{byte:02X}>" for byte in range(256)}


def read(metadata: Metadata) -> Vocabulary:
    """Return the vocabulary of a checkpoint; raises CheckpointError for a tokenizer that GGUF cannot tell."""
    tokenizer = _document(metadata, "tokenizer.json")
    if tokenizer is None:
        raise CheckpointError(_missing(metadata))
    config = _document(metadata, "tokenizer_config.json") or {}
    size = metadata.config.get("vocab_size")
    model = tokenizer.get("model")
    if not isinstance(size, int) or not isinstance(model, dict) or not isinstance(model.get("vocab"), dict):
        kind = model.get("type") if isinstance(model, dict) else None
        raise CheckpointError(
            f"tokenizer.json holds a {kind or 'unknown'} model; GGUF export writes BPE tokenizers only"
        )
    try:
        return _vocabulary(metadata, tokenizer, config, size)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(
            f"tokenizer.json is malformed ({type(error).__name__}: {error}); save it again"
        ) from error


def _vocabulary(metadata: Metadata, tokenizer: Mapping[str, Any], config: Mapping[str, Any], size: int) -> Vocabulary:
    model = tokenizer["model"]
    if model.get("type", "BPE") != "BPE":
        raise CheckpointError(f"tokenizer.json holds a {model['type']} model; GGUF export writes BPE tokenizers only")
    ids = {**model["vocab"], **{token["content"]: token["id"] for token in tokenizer.get("added_tokens") or ()}}
    tokens, types = _tokens(tokenizer, ids, size)
    roles = _roles(metadata, config, ids)
    add_bos, add_eos = _sides(tokenizer, config, tokens, roles)
    base = Vocabulary(
        "gpt2", tokens, types, roles=roles, add_bos=add_bos, add_eos=add_eos, templates=_templates(metadata, config)
    )
    if not model.get("byte_fallback"):
        merges = [" ".join(part.replace(" ", "\u0120") for part in pair) for pair in _merges(model)]
        prefix = config.get("add_prefix_space")
        known_prefix = prefix if isinstance(prefix, bool) else None
        return replace(base, pre=_pre(metadata, tokenizer), merges=merges, add_space_prefix=known_prefix)
    _check_sentencepiece(tokenizer)
    types = _sentencepiece_types(tokens, types, model.get("unk_token"))
    pieces = replace(base, model="llama", types=types, pre="default", add_space_prefix=_adds_prefix(tokenizer))
    return replace(pieces, scores=_scores(pieces, _merges(model)))


def _tokens(tokenizer: Mapping[str, Any], ids: Mapping[str, int], size: int) -> tuple[list[str], list[int]]:
    """Return tokens and types by id; ids without a token are filled as llama.cpp's converter fills them."""
    tokens = [f"[PAD{id}]" for id in range(size)]
    types = [int(TokenType.UNUSED)] * size
    for token, id in ids.items():
        if not 0 <= id < size:
            raise CheckpointError(
                f"the token {token!r} has id {id:,} and the model has {size:,} embeddings; resize the embeddings first"
            )
        if types[id] != TokenType.UNUSED:
            raise CheckpointError(f"the tokens {tokens[id]!r} and {token!r} share the id {id:,}")
        tokens[id], types[id] = token, int(TokenType.NORMAL)
    for added in tokenizer.get("added_tokens") or ():
        special = added.get("special") or _looks_special(added["content"])
        types[added["id"]] = int(TokenType.CONTROL if special else TokenType.USER_DEFINED)
        if not special:
            tokens[added["id"]] = added["content"].replace(SPACE, " ")
    return tokens, types


def _looks_special(token: str) -> bool:
    return token in _LOOK_SPECIAL or any(token.startswith(a) and token.endswith(b) for a, b in _FENCES)


def _sentencepiece_types(tokens: list[str], types: list[int], unknown: str | None) -> list[int]:
    found = [int(TokenType.BYTE) if token in _BYTES else type for token, type in zip(tokens, types, strict=True)]
    if unknown in tokens:
        found[tokens.index(unknown)] = int(TokenType.UNKNOWN)
    return found


def _merges(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return merges from either of the two forms that tokenizer.json has had: "a b", and ["a", "b"]."""
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    return [(left, right) for left, right in pairs]


def _scores(vocabulary: Vocabulary, merges: list[tuple[str, str]]) -> list[float]:
    """Return scores that make ggml merge in the order of ``merges``; raises CheckpointError when none can.

    ggml merges the neighbours whose union is the token with the best score, however the two were cut. So each token must be
    merged from all of its cuts before the next token's turn.
    """
    normal = [id for id, type in enumerate(vocabulary.types) if type == TokenType.NORMAL]
    known = {vocabulary.tokens[id]: id for id in normal}
    order = [known[left + right] for left, right in merges if left + right in known]
    turns = [id for position, id in enumerate(order) if position == 0 or order[position - 1] != id]
    cuts = {(left, right) for left, right, _ in merges_by_score(vocabulary, by_position=True)}
    if len(set(turns)) != len(turns) or not cuts <= set(merges):
        raise CheckpointError(
            "the tokenizer has byte fallback but no SentencePiece merges (a token merges from one pair and not from another), "
            "which GGUF's llama tokenizer cannot tell"
        )
    ranked = normal if turns == sorted(turns) else [*turns, *(id for id in normal if id not in set(turns))]
    scores = [-1000.0 if type == TokenType.USER_DEFINED else 0.0 for type in vocabulary.types]
    for position, id in enumerate(ranked):
        scores[id] = -float(position)
    return scores


def _check_sentencepiece(tokenizer: Mapping[str, Any]) -> None:
    """Refuse what cuts text before the merges, which ggml's SentencePiece tokenizer does not."""
    pre = tokenizer.get("pre_tokenizer") or {}
    kind = pre.get("type")
    harmless = (
        kind is None
        or (kind == "Metaspace" and pre.get("split") is False)
        or (kind == "Split" and pre.get("pattern") == {"String": " "})  # gemma: no space is left by then
    )
    if not harmless:
        raise CheckpointError(
            f"the tokenizer has byte fallback after the pre-tokenizer {kind!r}, which GGUF cannot tell"
        )


def _adds_prefix(tokenizer: Mapping[str, Any]) -> bool:
    normalizer = tokenizer.get("normalizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    pre = tokenizer.get("pre_tokenizer") or {}
    metaspace = pre.get("type") == "Metaspace" and pre.get("prepend_scheme", "always") != "never"
    return metaspace or any(step.get("type") == "Prepend" for step in steps)


def _pre(metadata: Metadata, tokenizer: Mapping[str, Any]) -> str:
    """Return ``tokenizer.ggml.pre``: llama.cpp's name of this very tokenizer, else the name of how it cuts text."""
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise CheckpointError(
            'GGUF export of this tokenizer needs the tokenizers package, to learn which one it is; pip install "lowbit[hf]"'
        ) from error
    file = metadata.side_file("tokenizer.json")
    assert file is not None
    try:
        ids = Tokenizer.from_str(file.read().decode()).encode(pre_hashes.CHECK_TEXT).ids
    except Exception as error:  # the Rust library raises plain Exception
        raise CheckpointError(f"tokenizer.json cannot be loaded by the tokenizers package: {error}") from error
    digest = pre_hashes.fingerprint(ids)
    if digest in pre_hashes.NAMES:
        return pre_hashes.NAMES[digest]
    if found := recognise(tokenizer):
        return found.names[0]
    kind = (tokenizer.get("pre_tokenizer") or {}).get("type")
    raise CheckpointError(
        f"llama.cpp has no name for this tokenizer's pre-tokenizer ({kind}, check hash {digest[:16]}), so a GGUF file of it "
        f"would tokenize wrongly; export it as hf or native"
    )


def _roles(metadata: Metadata, config: Mapping[str, Any], ids: Mapping[str, int]) -> dict[str, int]:
    """Return ids by role: by the names in tokenizer_config.json, else by the ids in config.json."""
    roles: dict[str, int] = {}
    for role in ("bos", "eos", "unk", "pad"):
        token = config.get(f"{role}_token")
        name = token.get("content") if isinstance(token, dict) else token
        id = ids.get(name, metadata.config.get(f"{role}_token_id")) if name else metadata.config.get(f"{role}_token_id")
        if isinstance(id, int) and 0 <= id < metadata.config["vocab_size"]:
            roles[role] = id
    ends = (_document(metadata, "generation_config.json") or {}).get("eos_token_id")
    if isinstance(ends, list) and len(ends) == 2 and ends[0] == roles.get("eos"):
        roles["eot"] = ends[1]
    return roles


def _sides(
    tokenizer: Mapping[str, Any], config: Mapping[str, Any], tokens: list[str], roles: Mapping[str, int]
) -> tuple[bool, bool]:
    """Return whether bos and eos are added around a text: by the post-processor's template, else by tokenizer_config.json."""
    post = tokenizer.get("post_processor")
    templates = [
        step for step in (post or {}).get("processors", [post]) if step and step["type"] == "TemplateProcessing"
    ]
    if not templates:
        wanted = {side: config.get(f"add_{side}_token") for side in ("bos", "eos")} if post is None else {}
        return bool(wanted.get("bos")), bool(wanted.get("eos"))
    single = templates[0]["single"]
    named = {role: tokens[id] for role, id in roles.items()}
    first, last = (single[at].get("SpecialToken", {}).get("id") for at in (0, -1))
    if first not in (None, named.get("bos")) or last not in (None, named.get("eos")) or len(single) > 3:
        raise CheckpointError(
            f"the tokenizer adds {first!r} and {last!r} to a text, which are not its bos and eos tokens"
        )
    return first is not None, last is not None


def _templates(metadata: Metadata, config: Mapping[str, Any]) -> dict[str, str]:
    template = config.get("chat_template")
    if template is None and (file := metadata.side_file("chat_template.jinja")):
        template = file.read().decode()
    if template is None:
        template = (_document(metadata, "chat_template.json") or {}).get("chat_template")
    if isinstance(template, str):
        return {"": template}
    named = {entry["name"]: entry["template"] for entry in template or ()}
    return {"" if name == "default" else name: text for name, text in named.items()}


def _document(metadata: Metadata, name: str) -> dict[str, Any] | None:
    file = metadata.side_file(name)
    if file is None:
        return None
    return parse_object(file.read(), name, unique=False)


def _missing(metadata: Metadata) -> str:
    if reason := metadata.provenance.get("tokenizer"):
        return f"GGUF needs a tokenizer, and the source's was not read: {reason}"
    if metadata.side_file("tokenizer.model"):
        return (
            "GGUF needs tokenizer.json and the source has only tokenizer.model; load and save the tokenizer with transformers "
            "once to make it"
        )
    return "GGUF needs a tokenizer and the source has no tokenizer.json; add one to the source folder"
