"""``lowbit generate``."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from lowbit.cli.console import json_option, print_json
from lowbit.cli.models import check_at_least, load_model, load_tokenizer, place_options
from lowbit.errors import OptionError


@click.command("generate", short_help="Continue a prompt, or answer a message.")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--prompt", "-p", help="Text to continue.")
@click.option("--chat", "-c", help="A message to answer, put into the model's chat template.")
@click.option("--max-tokens", "-n", default=128, show_default=True, help="Most tokens to generate.")
@click.option("--temperature", default=0.0, show_default=True, help="0 takes the most likely token; more draws.")
@click.option("--top-p", default=1.0, show_default=True, help="Draw from the most likely tokens of this probability.")
@click.option("--seed", default=0, show_default=True, help="Seed of the draws.")
@place_options
@json_option
def generate_command(
    model: Path, prompt: str | None, chat: str | None, device: str, dtype: str | None, as_json: bool, **flags: Any
) -> None:
    """Load MODEL (a model folder, a .gguf or a .safetensors file) and let it write; tokens appear as they come."""
    from lowbit.runtime.generate import Sampling

    if (prompt is None) == (chat is None):
        raise OptionError("give either --prompt, a text to continue, or --chat, a message to answer")
    check_at_least("max-tokens", flags["max_tokens"], 1)
    sampling = Sampling(flags["temperature"], flags["top_p"], flags["seed"])
    tokenizer = load_tokenizer(model)
    ids = tokenizer(prompt)["input_ids"] if prompt is not None else _chat(tokenizer, str(chat), model)
    loaded = load_model(model, device, dtype)
    run = _run(loaded, tokenizer, ids, flags["max_tokens"], sampling, show=not as_json)
    if as_json:
        print_json({"model": str(model), **run.document()})
    else:
        click.echo()
        click.echo(run.summary(), err=True)


@dataclass(frozen=True, slots=True)
class Run:
    """What was generated, and how long prompt and continuation took."""

    prompt_tokens: int
    tokens: list[int]
    text: str
    first: float
    rest: float

    def document(self) -> dict[str, Any]:
        """Return the run for ``--json``."""
        return {
            "text": self.text,
            "prompt_tokens": self.prompt_tokens,
            "tokens": len(self.tokens),
            "prefill_seconds": round(self.first, 6),
            "decode_tokens_per_second": self.rate,
        }

    @property
    def rate(self) -> float | None:
        """Tokens per second after the first; None when there was no second."""
        return round((len(self.tokens) - 1) / self.rest, 3) if len(self.tokens) > 1 and self.rest else None

    def summary(self) -> str:
        """Return one line about speed."""
        rate = f"{self.rate:.1f} tokens/s" if self.rate else "no rate to give"
        return f"{self.prompt_tokens} tokens of prompt in {self.first:.2f} s, {len(self.tokens)} generated at {rate}"


def _run(model: Any, tokenizer: Any, ids: list[int], limit: int, sampling: Any, show: bool) -> Run:
    from lowbit.runtime.generate import Detokenizer, stop_tokens, stream

    detokenizer, tokens, pieces = Detokenizer(tokenizer), [], []
    started = first = time.perf_counter()
    for token in stream(model, ids, limit, sampling, stop_tokens(model, tokenizer)):
        tokens.append(token)
        if len(tokens) == 1:
            first = time.perf_counter()
        pieces.append(detokenizer.add(token))
        if show:
            click.echo(pieces[-1], nl=False)
    ended = time.perf_counter()
    first = first if tokens else ended
    return Run(len(ids), tokens, "".join(pieces), first - started, ended - first)


def _chat(tokenizer: Any, message: str, model: Path) -> list[int]:
    if not tokenizer.chat_template:
        raise OptionError(f"{model} has no chat template; use --prompt")
    turns = [{"role": "user", "content": message}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
