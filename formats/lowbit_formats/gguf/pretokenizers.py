"""How text is cut before byte-level BPE: from ``tokenizer.ggml.pre`` to a Hugging Face pre-tokenizer, and back.

llama.cpp keeps the expressions in ``src/llama-vocab.cpp`` (llm_tokenizer_bpe), each name standing for a list of them; the
Hugging Face forms are those of the published tokenizer.json files, which split alike. GPT-2's expression is what
``ByteLevel`` applies with ``use_regex``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
)
_CASED_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_CASED_REST}"
_GPT4O = rf"{_CASED[0]}{_CONTRACTIONS}?|{_CASED[1]}{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_CASED_REST}"
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """One way of cutting text.

    Attributes:
        names: Values of ``tokenizer.ggml.pre`` that mean it; the first is written for a tokenizer with no name of its own.
        splits: Expressions applied one after the other; "digits" cuts digits apart, "" is ByteLevel's own expression.
        ignore_merges: Whether a piece that is a token is taken whole.
        add_bos: llama.cpp's default for ``add_bos_token``.
        normalizer: Of the published tokenizers with these names.
    """

    names: tuple[str, ...]
    splits: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False
    normalizer: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the pre-tokenizer as tokenizer.json has it."""
        steps = [_step(split) for split in self.splits if split]
        byte_level = {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": "" in self.splits,
        }
        return {"type": "Sequence", "pretokenizers": [*steps, byte_level]} if steps else byte_level


_ALL = (
    PreTokenizer(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"), ("digits", "")
    ),
    PreTokenizer(
        (
            "gpt-2",
            "phi-2",
            "gigachat",
            "a.x-4.0",
            "mellum",
            "exaone4",
            "mpt",
            "olmo",
            "jais",
            "trillion",
            "granite-docling",
        ),
        ("",),
    ),
    PreTokenizer(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
        (_LLAMA3,),
        ignore_merges=True,
        add_bos=True,
    ),
    PreTokenizer(("smaug-bpe", "dbrx", "chatglm-bpe"), (_LLAMA3,)),
    PreTokenizer(("qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez"), (_QWEN2,), normalizer="NFC"),
    PreTokenizer(("stablelm2", "hunyuan", "solar-open"), (_QWEN2,)),
    PreTokenizer(("tekken",), (_TEKKEN,), ignore_merges=True, add_bos=True),
    PreTokenizer(("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"), (_GPT4O,)),
    PreTokenizer(("default",), _DEFAULT),
)

BY_NAME = {name: found for found in _ALL for name in found.names}


def recognise(tokenizer: Mapping[str, Any]) -> PreTokenizer | None:
    """Return the pre-tokenizer that a tokenizer.json spells out, or None for one that llama.cpp has no name for."""
    splits = _splits(tokenizer.get("pre_tokenizer"))
    normalizer = tokenizer.get("normalizer") or {}
    kind = normalizer.get("type") if normalizer.get("normalizers", ["some"]) else None
    ignore_merges = bool(tokenizer["model"].get("ignore_merges"))
    for found in _ALL:
        if (found.splits, found.ignore_merges, found.normalizer) == (splits, ignore_merges, kind):
            return found
    return None


def _step(split: str) -> dict[str, Any]:
    if split == "digits":
        return {"type": "Digits", "individual_digits": True}
    return {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False}


def _splits(pre_tokenizer: Any) -> tuple[str, ...] | None:
    """Undo ``to_json``; None when something else is in it."""
    if not isinstance(pre_tokenizer, dict):
        return None
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    splits: list[str] = []
    for step in steps:
        kind = step.get("type")
        if kind == "Digits" and step.get("individual_digits"):
            splits.append("digits")
        elif kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            splits.append(step.get("pattern", {}).get("Regex", "unknown"))
        elif kind == "ByteLevel" and not step.get("add_prefix_space") and step is steps[-1]:
            splits += [""] if step.get("use_regex", True) else []
        else:
            return None
    return tuple(splits)
