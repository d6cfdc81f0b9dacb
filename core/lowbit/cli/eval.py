"""``lowbit eval``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lowbit.cli.console import human_bytes, json_option, print_json, print_table, progress_bar
from lowbit.cli.models import check_at_least, load_model, load_tokenizer, model_bytes, place_options
from lowbit.errors import OptionError

if TYPE_CHECKING:
    from lowbit.evaluation.scores import Score
    from lowbit.evaluation.windows import Windows


@click.command("eval", short_help="Perplexity, and divergence from a base model.")
@click.argument("models", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="MODEL...")
@click.option("--text", type=click.Path(path_type=Path), help="A UTF-8 text file, such as WikiText-2.")
@click.option("--dataset", help="A text that lowbit ships: heldout (the default without --text) or calibration.")
@click.option(
    "--against", type=click.Path(path_type=Path), metavar="BASE", help="Compare with this model's predictions."
)
@click.option("--context", type=int, help="Tokens of a window; default: 2048, or the most that every model takes.")
@click.option("--stride", type=int, help="Tokens from window to window; default: windows do not overlap.")
@click.option("--windows", "limit", type=int, help="Use only the first so many windows.")
@click.option("--tasks", help="Tasks of the lm-evaluation-harness in place of a text, such as arc_easy,hellaswag.")
@click.option("--examples", type=int, help="With --tasks: use only so many examples of each.")
@place_options
@json_option
def eval_command(
    models: tuple[Path, ...],
    text: Path | None,
    dataset: str | None,
    against: Path | None,
    device: str,
    dtype: str | None,
    tasks: str | None,
    as_json: bool,
    **flags: Any,
) -> None:
    """Score each MODEL on the same text: perplexity and, with --against, KL divergence and agreement of the likeliest token.

    The tokenizer is BASE's, or the first MODEL's. All models are in memory at once. On a CPU the default --dtype is float32:
    what is measured are the weights, and many CPUs multiply bfloat16 slowly.
    """
    from lowbit.evaluation.scores import evaluate
    from lowbit.evaluation.windows import cut

    dtype = dtype or ("float32" if device == "cpu" else None)
    if tasks is not None:
        if given := [name for name, value in (("text", text), ("dataset", dataset), ("against", against)) if value]:
            raise OptionError(f"--tasks bring their own texts and no base; leave --{given[0]} out")
        run_tasks(models, tasks, flags["examples"], device, dtype, as_json)
        return
    said, title = _read(text, dataset)
    tokenizer = load_tokenizer(against or models[0])
    base = load_model(against, device, dtype) if against else None
    loaded = [load_model(path, device, dtype) for path in models]
    everyone = [*loaded, base] if base is not None else loaded
    windows = cut(tokenizer, said, _longest(everyone), flags["context"], flags["stride"], flags["limit"])
    with progress_bar(len(windows), quiet=as_json) as advance:
        scores, base_score = evaluate(loaded, windows, base, lambda index: advance(1, f"window {index + 1}"))
    rows = [(path, model_bytes(model), score) for path, model, score in zip(models, loaded, scores, strict=True)]
    if against and base is not None and base_score is not None:
        rows.insert(0, (against, model_bytes(base), base_score))
    if as_json:
        print_json(_document(rows, title, windows, against))
    else:
        _show(rows, title, windows, against)


def _read(path: Path | None, dataset: str | None) -> tuple[str, str]:
    """Return the text to score, and what to call it."""
    from lowbit.data import calibration_text, heldout_text

    shipped = {"heldout": heldout_text, "calibration": calibration_text}
    if path is not None and dataset is not None:
        raise OptionError("give either --text, a file, or --dataset, a text that lowbit ships")
    if path is None:
        name = dataset or "heldout"
        if name not in shipped:
            raise OptionError(
                f"lowbit ships no dataset {name!r}, only {' and '.join(shipped)}; give other texts by --text FILE"
            )
        return shipped[name](), f"the {name} text that lowbit ships"
    try:
        return path.read_text(encoding="utf-8"), str(path)
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"--text {path} cannot be read as UTF-8 text: {error}") from error


def run_tasks(
    models: tuple[Path, ...], tasks: str, examples: int | None, device: str, dtype: str | None, as_json: bool
) -> None:
    """Run tasks of the harness on one model after the other."""
    from lowbit.evaluation import tasks as harness

    harness.need_harness()
    if examples is not None:
        check_at_least("examples", examples, 1)
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    results = {
        str(path): harness.run_tasks(load_model(path, device, dtype), load_tokenizer(path), names, examples)
        for path in models
    }
    if as_json:
        print_json({"tasks": names, "examples": examples, "results": results})
        return
    rows = [
        (path, task, metric, f"{value:.4f}")
        for path, found in results.items()
        for task, metrics in found.items()
        for metric, value in metrics.items()
    ]
    print_table("", ("model", "task", "metric", ">value"), rows)


def _longest(models: list[Any]) -> int | None:
    from lowbit.runtime.generate import max_context

    return min((longest for model in models if (longest := max_context(model))), default=None)


def _show(rows: list[tuple[Path, int, Score]], title: str, windows: Windows, against: Path | None) -> None:
    columns = ["model", ">in memory", ">perplexity"] + ([">KL mean", ">KL 99 %", ">same top token"] if against else [])
    cells = []
    for path, size, score in rows:
        row = [path.name or str(path), human_bytes(size), f"{score.perplexity:.3f}"]
        if score.mean_divergence is not None and score.divergence_99 is not None and score.agreement is not None:
            row += [f"{score.mean_divergence:.5f}", f"{score.divergence_99:.4f}", f"{100 * score.agreement:.2f} %"]
        cells.append(row + [""] * (len(columns) - len(row)))
    print_table("", columns, cells)
    tokens = rows[0][2].tokens
    click.echo(
        f"{title}: {tokens} tokens scored in {len(windows)} windows of {windows.context}, "
        f"stride {windows.stride}" + (f"; KL in nats, against {against}" if against else "")
    )


def _document(
    rows: list[tuple[Path, int, Score]], title: str, windows: Windows, against: Path | None
) -> dict[str, Any]:
    results = [
        {
            "model": str(path),
            "bytes": size,
            "perplexity": score.perplexity,
            "kl_mean": score.mean_divergence,
            "kl_99": score.divergence_99,
            "top1_agreement": score.agreement,
        }
        for path, size, score in rows
    ]
    return {
        "text": title,
        "context": windows.context,
        "stride": windows.stride,
        "windows": len(windows),
        "tokens": rows[0][2].tokens,
        "against": str(against) if against else None,
        "results": results,
    }
