"""Calibration texts: files, data sets and mixtures of them become samples of tokens, all of one length.

A source is a text file (one document), ``.jsonl`` or ``.parquet`` (a document in each line or row: ``text``, or ``messages`` for
the tokenizer's chat template), the name of a Hugging Face data set, or ``default``, the text that lowbit ships. Documents
are tokenized, joined with the end-of-text token, and cut into windows; nothing is padded, and nothing global is seeded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.data import calibration_text
from lowbit.errors import OptionError

DEFAULT = "default"
NSAMPLES, SEQLEN, SEED = 128, 2048, 42
"""As AutoRound and GPTQ calibrate."""
FILE_SUFFIXES = (".txt", ".md", ".json", ".jsonl", ".parquet")
TEXT_KEYS, CHAT_KEYS = ("text", "content"), ("messages", "conversations", "conversation")


@dataclass(frozen=True, slots=True)
class Sampling:
    """What to calibrate on.

    Attributes:
        dataset: One source, or several with weights: ``a.txt:0.7,b.jsonl:0.3``.
        nsamples: How many samples to take; fewer are taken where the texts have no more.
        seqlen: Tokens of a sample; None is 2048, or the most that the model takes.
        seed: For the choice of samples.
    """

    dataset: str = DEFAULT
    nsamples: int = NSAMPLES
    seqlen: int | None = None
    seed: int = SEED

    def __post_init__(self) -> None:
        if self.nsamples < 1:
            raise OptionError(f"--nsamples must be at least 1, got {self.nsamples}")
        if self.seqlen is not None and self.seqlen < 2:
            raise OptionError(f"--seqlen must be at least 2, got {self.seqlen}")

    def length(self, longest: int | None) -> int:
        """Return the tokens of a sample for a model that takes ``longest``; raise OptionError when that is too few."""
        if self.seqlen is None:
            return min(SEQLEN, longest or SEQLEN)
        if longest is not None and self.seqlen > longest:
            raise OptionError(f"the model takes at most {longest} tokens, got --seqlen {self.seqlen}")
        return self.seqlen


def sample(sampling: Sampling, tokenizer: Any, longest: int | None) -> Tensor:
    """Return the calibration samples, int64 ``(at most nsamples, seqlen)``; the same for the same texts, tokenizer and seed.

    Args:
        sampling: What to take.
        tokenizer: Of transformers; one that starts texts with a token of its own starts every sample so.
        longest: The longest context that the model takes, if it says.

    Raises:
        OptionError: For a source that cannot be read, is empty, or is shorter than one sample.
    """
    seqlen, generator = sampling.length(longest), torch.Generator().manual_seed(sampling.seed)
    sources = parse_mix(sampling.dataset)
    total, parts, left = sum(weight for _, weight in sources), [], sampling.nsamples
    for number, (source, weight) in enumerate(sources):
        is_last = number == len(sources) - 1
        wanted = left if is_last else min(left, round(sampling.nsamples * weight / total))
        left -= wanted
        if wanted:
            parts.append(_windows(source, tokenizer, wanted, seqlen, generator))
    together = torch.cat(parts)
    return together[torch.randperm(len(together), generator=generator)]


def parse_mix(text: str) -> list[tuple[str, float]]:
    """Return sources and weights of ``SOURCE[:WEIGHT],...``; raises OptionError for weights that are not positive."""
    mix = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        source, colon, weight = part.rpartition(":")
        try:
            value = float(weight) if colon else 1.0
        except ValueError:  # the colon belongs to the name
            source, value = part, 1.0
        if not 0 < value < float("inf"):
            raise OptionError(f"the weight of a --dataset must be positive, got {part!r}")
        mix.append((source if colon and source else part, value))
    if not mix:
        raise OptionError("--dataset names nothing; give a file, a data set, or 'default'")
    return mix


def _windows(source: str, tokenizer: Any, wanted: int, seqlen: int, generator: torch.Generator) -> Tensor:
    """Return up to ``wanted`` windows of one source, int64 (n, seqlen), chosen at random where there are more."""
    start = tokenizer("")["input_ids"]
    first = start[:1] if start and start[0] == tokenizer.bos_token_id else []
    length = seqlen - len(first)
    tokens = _tokens(source, tokenizer, wanted * length, generator)
    count = len(tokens) // length
    if count == 0:
        raise OptionError(
            f"--dataset {source} has {len(tokens)} tokens, less than one sample of {seqlen}; give a longer text or a smaller "
            "--seqlen"
        )
    windows = tokens[: count * length].view(count, length)
    if first:
        windows = torch.cat((torch.full((count, 1), first[0]), windows), 1)
    return windows[torch.randperm(count, generator=generator)[:wanted]]


def _tokens(source: str, tokenizer: Any, wanted: int, generator: torch.Generator) -> Tensor:
    """Tokenize a source: all of a single text; of many documents, in random order, as many as are needed."""
    documents = _documents(source)
    if isinstance(documents, str):
        texts: Iterator[str] = iter((documents,))
    else:
        order = torch.randperm(len(documents), generator=generator).tolist()
        texts = (_text(documents[number], tokenizer, source) for number in order)
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    tokens: list[int] = []
    for text in texts:
        if text:
            tokens += (end if tokens else []) + tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(tokens) >= wanted and not isinstance(documents, str):
            break
    if not tokens:
        raise OptionError(f"--dataset {source} is empty; give a text to calibrate on, or 'default'")
    return torch.tensor(tokens, dtype=torch.int64)


def _documents(source: str) -> str | Sequence[Any]:
    """Return the text of a source, or its documents: strings or records."""
    path = Path(source)
    if source == DEFAULT:
        return calibration_text()
    if path.suffix == ".parquet" and path.exists():
        return _parquet(path)
    if not path.is_file():
        return _named(source)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"--dataset {source} cannot be read as UTF-8 text: {error}") from error
    return _records(text, source) if path.suffix in (".jsonl", ".json") else text


def _records(text: str, source: str) -> list[Any]:
    """Return the records of JSON lines, or of one JSON list."""
    try:
        if text.lstrip().startswith("["):
            return list(json.loads(text))
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except ValueError as error:
        raise OptionError(f"--dataset {source} is no JSON, one record a line: {error}") from error


def _parquet(path: Path) -> Sequence[Any]:
    if find_spec("pyarrow") is None:
        raise OptionError(f"--dataset {path} needs pyarrow; pip install pyarrow, or give a .jsonl file")
    import pyarrow.parquet

    try:
        return list(pyarrow.parquet.read_table(path).to_pylist())
    except (OSError, ValueError) as error:
        raise OptionError(f"--dataset {path} cannot be read as parquet: {error}") from error


def _named(source: str) -> Sequence[Any]:
    """Load the training part of a Hugging Face data set."""
    if Path(source).suffix in FILE_SUFFIXES:
        raise OptionError(f"--dataset {source} is no file; give one that is there, or the name of a data set")
    if find_spec("datasets") is None:
        raise OptionError(
            f"--dataset {source} is no file, and names of data sets need the datasets package; give a text, .jsonl or .parquet "
            "file, or pip install datasets"
        )
    import datasets

    try:
        found: Sequence[Any] = datasets.load_dataset(source, split="train")
    except Exception as error:  # the package raises errors of every kind for what is not there
        raise OptionError(f"--dataset {source} cannot be loaded: {' '.join(str(error).split())[:200]}") from error
    return found


def _text(record: Any, tokenizer: Any, source: str) -> str:
    """Return the text of a document: itself, its text, or its messages in the tokenizer's chat template."""
    if isinstance(record, str):
        return record
    if isinstance(record, Mapping):
        for key in TEXT_KEYS:
            if isinstance(record.get(key), str):
                return str(record[key])
        for key in CHAT_KEYS:
            if isinstance(record.get(key), (list, tuple)):
                return _chat(record[key], tokenizer, source)
    keys = ", ".join(map(str, record)) if isinstance(record, Mapping) else type(record).__name__
    raise OptionError(f"a record of --dataset {source} has no {' or '.join((*TEXT_KEYS, *CHAT_KEYS))}; it has {keys}")


def _chat(messages: Sequence[Any], tokenizer: Any, source: str) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise OptionError(f"--dataset {source} holds chats, and the tokenizer has no chat template; give plain texts")
    try:
        return str(tokenizer.apply_chat_template([_message(said) for said in messages], tokenize=False))
    except Exception as error:  # templates raise what their authors chose
        raise OptionError(f"a chat of --dataset {source} does not fit the chat template: {error}") from error


def _message(said: Any) -> Any:
    """Return a message as templates expect it; ShareGPT's files say ``from`` and ``value``."""
    if isinstance(said, Mapping) and "from" in said and "value" in said:
        roles = {"human": "user", "gpt": "assistant"}
        return {"role": roles.get(said["from"], said["from"]), "content": said["value"]}
    return said
