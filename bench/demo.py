"""``make demo``: take a real language model, convert it six ways, and show what each costs and what it still says."""

from __future__ import annotations

import argparse
import io
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from models import smollm2
from rich.console import Console

import lowbit
from lowbit.cli.console import human_bytes, print_table, progress_bar
from lowbit.convert import Report, execute, plan_conversion
from lowbit.data import heldout_text
from lowbit.evaluation.scores import Score, evaluate
from lowbit.evaluation.windows import Windows, cut
from lowbit.plan import Step, Target
from lowbit.recipe import Recipe, Rule
from lowbit.runtime.generate import stop_tokens, stream

TITLE = "SmolLM2-135M-Instruct, converted"
PROMPT = "The opposite of hot is"
TOKENS = 10
CONTEXT, WINDOWS = 256, 4
CASES = (
    ("hf, float32", "hf", None),
    ("native, as it is", "native", None),
    ("native, kbit 3-bit g16", "native", Rule("*", "kbit", {"bits": "3", "group_size": "16", "scale_bits": "6"})),
    ("gptq, 4-bit g64", "gptq", Rule("*", "autoround", {"bits": "4", "group_size": "64"})),
    ("awq, 4-bit g64", "awq", Rule("*", "autoround", {"bits": "4", "group_size": "64", "symmetric": "false"})),
    ("gguf Q4_K_M", "gguf:q4_k_m", None),
)
HALF = ("gptq", "awq")  # their floats, among them the embedding, in float16, as such folders have them
COLUMNS = (
    "written as",
    ">bits/weight",
    ">size",
    ">error",
    ">perplexity",
    ">KL",
    ">seconds",
    f"“{PROMPT} ...”",
)


@dataclass(frozen=True, slots=True)
class Written:
    """One way of writing the model: where it is, what the conversion reports, and the seconds that it took."""

    title: str
    path: Path
    report: Report
    seconds: float

    def size(self) -> int:
        """Return the bytes of the file, or of all files of the folder."""
        return sum(file.stat().st_size for file in ([self.path] if self.path.is_file() else self.path.iterdir()))

    def row(self, score: Score, words: str) -> tuple[str, ...]:
        """Return the cells of the table."""
        divergence = "" if score.mean_divergence is None else f"{score.mean_divergence:.4f}"
        return (
            self.title,
            f"{self.report.plan.bits_per_weight:.2f}",
            human_bytes(self.size()),
            self.report.error.text(),
            f"{score.perplexity:.2f}",
            divergence,
            f"{self.seconds:.1f}",
            words,
        )


def main() -> None:
    """Run the demo in a temporary folder; ``--picture FILE`` keeps the table as an SVG."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--picture", type=Path)
    picture = parser.parse_args().picture
    source = smollm2()
    print(
        f"Source: {source.name}, {human_bytes(source.stat().st_size)}: a Q4_1 GGUF with 30 layers and a tied embedding.\n"
    )
    with tempfile.TemporaryDirectory(prefix="lowbit-demo-") as folder:
        written = [convert(source, Path(folder), *case) for case in CASES]
        rows, windows = measure(written)
    print_table(TITLE, COLUMNS, rows)
    if picture:
        recorder = Console(record=True, width=165, file=io.StringIO())
        print_table(TITLE, COLUMNS, rows, to=recorder)
        recorder.save_svg(str(picture), title="make demo")
    print(
        "Error is the relative RMSE of the linear weights against the source, itself a 4-bit model; “exact” means that every\n"
        "dequantized bit agrees. Every file was reopened and compared before it appeared. Perplexity and KL divergence (nats,\n"
        f"against the first row) are on {len(windows)} windows of {windows.context} tokens of a novel that lowbit ships; lowbit "
        "eval does this at any length.\nNext: lowbit convert --help"
    )


def convert(source: Path, folder: Path, title: str, format: str, rule: Rule | None) -> Written:
    """Convert with a progress bar, choosing new codes for codes: a demo may round twice."""
    registry, target = lowbit.installed(), Target.parse(format, torch.float16 if format in HALF else None)
    destination = folder / f"{len(list(folder.iterdir()))}{registry.exporters[target.format].suffix}"
    started = time.perf_counter()
    with registry.open(source) as checkpoint:
        plan = plan_conversion(checkpoint, target, Recipe(rule, requantize=True), registry)
        with progress_bar(plan.source_nbytes + plan.nbytes, quiet=False) as advance:

            def progress(phase: str, step: Step) -> None:
                entry = step.source if phase == "convert" else step.target
                advance(entry.nbytes, f"{title}: {phase} {step.name}")

            report = execute(plan, checkpoint, destination, registry, progress=progress)
    written = Written(title, destination, report, time.perf_counter() - started)
    note(f"{title}: {human_bytes(written.size())}, {report.error.text()}, {written.seconds:.1f} s")
    return written


def measure(written: list[Written]) -> tuple[list[tuple[str, ...]], Windows]:
    """Load everything as it lies there, let each continue the prompt, and score all against the first on the same text."""
    tokenizer = lowbit.load_tokenizer(written[0].path)
    models, words = [], []
    for each in written:
        with timed(f"{each.title}: load and continue the prompt"):
            models.append(lowbit.load(each.path, dtype=torch.float32))
            words.append(speak(models[-1], tokenizer))
    windows = cut(tokenizer, heldout_text(), None, CONTEXT, limit=WINDOWS)
    with timed(f"{len(windows)} windows of {windows.context} tokens through {len(models)} models"):
        scores, base = evaluate(models[1:], windows, models[0])
    assert base is not None
    rows = zip(written, [base, *scores], words, strict=True)
    return [each.row(score, said) for each, score, said in rows], windows


def speak(model: Any, tokenizer: Any) -> str:
    """Continue the prompt greedily."""
    ids = tokenizer(PROMPT)["input_ids"]
    tokens = list(stream(model, ids, TOKENS, stop=stop_tokens(model, tokenizer)))
    return " ".join(tokenizer.decode(tokens).split())


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Say on stderr what was done and how long it took."""
    started = time.perf_counter()
    yield
    note(f"{what}: {time.perf_counter() - started:.1f} s")


def note(text: str) -> None:
    """Write a line of progress."""
    print(f"  {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
