"""``make demo``: take a real language model, convert it five ways, and show what each costs and what it still says."""

from __future__ import annotations

import argparse
import io
import os
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from models import smollm2
from rich.console import Console

from lowbit.cli.console import human_bytes, print_table, progress_bar
from lowbit.convert import Report, execute, plan_conversion
from lowbit.plan import Step, Target
from lowbit.plugins import installed
from lowbit.recipe import Recipe, Rule

TITLE = "SmolLM2-135M-Instruct, converted"
PROMPT = "The capital of France is"
TOKENS = 14
CASES = (
    ("hf, float32", "hf", None),
    ("native, as it is", "native", None),
    ("native, kbit 4-bit g64", "native", Rule("*", "kbit", {"bits": "4", "group_size": "64"})),
    ("native, kbit 3-bit g64", "native", Rule("*", "kbit", {"bits": "3", "group_size": "64"})),
    ("gguf Q8_0", "gguf", Rule("*", "autoround", {"bits": "8", "group_size": "32"})),
    ("gguf Q4_0", "gguf", Rule("*", "autoround", {"bits": "4", "group_size": "32"})),
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
        rows = [demonstrate(source, Path(folder), *case) for case in CASES]
    columns = ("written as", ">bits/weight", ">size", ">error", ">seconds", f"“{PROMPT} ...”")
    print_table(TITLE, columns, rows)
    if picture:
        recorder = Console(record=True, width=150, file=io.StringIO())
        print_table(TITLE, columns, rows, to=recorder)
        recorder.save_svg(str(picture), title="make demo")
    print(
        "Error is the relative RMSE of the linear weights against the source, itself a 4-bit model; “exact” means that every\n"
        "dequantized bit agrees. Every file was reopened and compared before it appeared. Next: lowbit convert --help"
    )


def demonstrate(source: Path, folder: Path, title: str, format: str, rule: Rule | None) -> tuple[str, ...]:
    """Convert, measure, and let the result continue the prompt."""
    destination = folder / ("model.gguf" if format.startswith("gguf") else "model")
    started = time.perf_counter()
    report = run(source, destination, Target.parse(format), Recipe(rule, requantize=True), title)
    seconds = time.perf_counter() - started
    size = destination.stat().st_size if destination.is_file() else sum(f.stat().st_size for f in destination.iterdir())
    words = speak(destination, folder / "spoken", title)
    remove(destination)
    error = report.error.text()
    print(f"  {title}: {human_bytes(size)}, {error}, {seconds:.1f} s", file=sys.stderr)
    return title, f"{report.plan.bits_per_weight:.2f}", human_bytes(size), error, f"{seconds:.1f}", words


def run(source: Path, destination: Path, target: Target, recipe: Recipe, title: str) -> Report:
    """Convert with a progress bar."""
    registry = installed()
    with registry.open(source) as checkpoint:
        plan = plan_conversion(checkpoint, target, recipe, registry)
        with progress_bar(plan.source_nbytes + plan.nbytes, quiet=False) as advance:

            def progress(phase: str, step: Step) -> None:
                entry = step.source if phase == "convert" else step.target
                advance(entry.nbytes, f"{title}: {phase} {step.name}")

            return execute(plan, checkpoint, destination, registry, progress=progress)


def speak(path: Path, scratch: Path, title: str) -> str:
    """Continue the prompt greedily in transformers, which loads the model through the plain ``hf`` format."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model_folder = path
    if not (path.is_dir() and title.startswith("hf")):
        run(path, scratch, Target("hf"), Recipe(), f"{title}, to speak")
        model_folder = scratch
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer = AutoTokenizer.from_pretrained(model_folder)
        model = AutoModelForCausalLM.from_pretrained(model_folder)
        inputs = tokenizer(PROMPT, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
    remove(scratch)
    return " ".join(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]).split())


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
