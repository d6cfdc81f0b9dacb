"""``lowbit convert``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lowbit.cli.calibration import calibration_options, seeds_samples_only
from lowbit.cli.console import human_bytes, human_count, json_option, print_json, print_table
from lowbit.cli.jobs import folder_names, followers, planned, run, run_several
from lowbit.errors import OptionError

if TYPE_CHECKING:
    import torch

    from lowbit.convert import Report
    from lowbit.interfaces import Entry
    from lowbit.plan import Plan, Step, Target
    from lowbit.recipe import Recipe
    from lowbit.registry import Registry

DTYPES = ("float32", "float16", "bfloat16")


@click.command("convert", short_help="Quantize, or move codes to another format exactly.")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("destination", type=click.Path(path_type=Path))
@click.option("--quantizer", "-q", help="Choose new codes with this quantizer; without it, convert transcodes exactly.")
@click.option(
    "--bits",
    "-b",
    help="Bits of a code; a fraction such as 3.5 is an average of stored bits: each layer gets its width.",
)
@click.option("--group-size", "-g", help="Weights that share a scale; 'none' for the whole row.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any option of the quantizer; repeatable.")
@click.option("--recipe", help="How much a quantizer that has recipes works: rtn, light, default, best.")
@click.option(
    "--rule",
    "rules",
    multiple=True,
    metavar="GLOB=QUANTIZER,KEY=VALUE",
    help="Options for some tensors; the first match decides, GLOB=none keeps, @FILE reads them; repeatable.",
)
@click.option(
    "--format",
    "-f",
    "format",
    default="native",
    show_default=True,
    help="FORMAT or FORMAT:VARIANT, such as gguf:q4_0; several (native,gptq) go into a folder each.",
)
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    help="Float type of the matrices that are not packed; default: as they are, float32 once dequantized.",
)
@click.option(
    "--imatrix",
    type=click.Path(path_type=Path),
    help="Importance matrix (llama.cpp's GGUF) for quantizers that use one.",
)
@click.option(
    "--allow-requantize",
    is_flag=True,
    help="Choose new codes for what is quantized already: everything --quantizer takes, or what has no exact route.",
)
@click.option("--seed", type=int, help="For the choice of calibration samples (default 42), and a quantizer's own.")
@calibration_options
@click.option(
    "--for", "loader", help="Refuse, before any work, what this program would not load (vllm, llama.cpp, ...)."
)
@click.option("--tp", type=int, default=1, show_default=True, help="Tensor-parallel degree for --for.")
@click.option("--shard-size", help="Most bytes of tensors in one file of a folder.  [default: 5GB]")
@click.option(
    "--dry-run", is_flag=True, help="Print route, bits and bytes of every tensor and the predicted memory; do nothing."
)
@click.option("--overwrite", is_flag=True, help="Replace the destination if it exists.")
@click.option("--quiet", is_flag=True, help="No progress bar and no table.")
@json_option
def convert_command(source: Path, destination: Path, as_json: bool, quiet: bool, dry_run: bool, **flags: Any) -> None:
    """Convert SOURCE (a model folder, a .gguf or a .safetensors file) to DESTINATION.

    With --quantizer the weights of linear layers get new codes; embeddings, norms and lm_head are left alone unless a --rule
    names them. Without it the codes move to the other format exactly, or the conversion is refused; --allow-requantize
    chooses new codes where a weight is quantized already and the table says what that costs. The destination is
    reopened and compared before it appears; the table says "exact" or the measured error.

    A quantizer that looks at activations is calibrated one decoder block at a time, on a text that lowbit ships unless
    --dataset names another; finished blocks are kept in DESTINATION.lowbit-work until the end, for --resume. Ctrl-C stops behind
    the block that is worked on, with exit code 75.
    """
    from lowbit.plan import Target
    from lowbit.plugins import installed
    from lowbit.staging import check_destination

    registry, silent = installed(), quiet or as_json
    formats, dtype = flags["format"].split(","), _dtype(flags["dtype"])
    targets = {
        name: Target.parse(text.strip(), dtype) for name, text in zip(folder_names(formats), formats, strict=True)
    }
    recipe = _recipe(flags, registry)
    if dry_run:
        _show_dry_run(source, targets, recipe, flags, registry, as_json)
        return
    check_destination(destination, flags["overwrite"])
    if len(targets) == 1:
        (target,) = targets.values()
        reports = {"": run(source, destination, target, recipe, flags, registry, silent)}
    else:
        reports = run_several(source, destination, targets, recipe, flags, registry, silent)
    documents = [_report_json(report, destination / name) for name, report in reports.items()]
    if as_json:
        print_json(documents[0] if len(documents) == 1 else {"destination": str(destination), "formats": documents})
    elif not quiet:
        for name, report in reports.items():
            _show_report(report, destination / name)


def _show_dry_run(
    source: Path,
    targets: Mapping[str, Target],
    recipe: Recipe,
    flags: dict[str, Any],
    registry: Registry,
    as_json: bool,
) -> None:
    target, *others = targets.values()
    with planned(source, target, recipe, flags, registry) as (_, plan, _, _):
        plans = [plan, *followers(source, plan, others, flags, registry)]
    if as_json:
        documents = [_plan_json(plan) for plan in plans]
        print_json({"formats": documents} if others else documents[0])
        return
    for name, plan in zip(targets, plans, strict=True):
        _show_plan(plan, f"{name}:" if others else "")
    click.echo("Nothing was written (--dry-run).")


def _recipe(flags: dict[str, Any], registry: Registry) -> Recipe:
    from lowbit.options import parse_settings
    from lowbit.recipe import Recipe, Rule, parse_rules

    given = {name: str(flags[name]) for name in ("bits", "group_size", "recipe", "seed") if flags[name] is not None}
    if "seed" in given and seeds_samples_only(flags, registry):
        del given["seed"]
    settings = parse_settings(flags["settings"])
    if twice := given.keys() & settings.keys():
        raise OptionError(f"{min(twice)} is given both as a flag and with --set; give it once")
    if flags["quantizer"] is None:
        if given or settings:
            raise OptionError(f"{min(given | settings)} is an option of a quantizer; name one with --quantizer")
        return Recipe(None, parse_rules(flags["rules"]), flags["allow_requantize"])
    default = Rule("*", flags["quantizer"], {**given, **settings})
    return Recipe(default, parse_rules(flags["rules"]), flags["allow_requantize"])


def _dtype(name: str | None) -> torch.dtype | None:
    if name is None:
        return None
    from lowbit.parts import torch_dtype

    return torch_dtype(name)


def describe(entry: Entry) -> str:
    """Return the layout and scheme of a packed entry, or the dtype of a plain one."""
    from lowbit.card import described

    return described(entry)


def _plan_json(plan: Plan) -> dict[str, Any]:
    return {
        "format": plan.exporter.format,
        "tensors": [_step_json(step) for step in plan.steps],
        "source_bytes": plan.source_nbytes,
        "bytes": plan.nbytes,
        "bits_per_weight": round(plan.bits_per_weight, 4),
        "predicted_peak_memory": plan.peak_memory,
    }


def _show_plan(plan: Plan, title: str) -> None:
    rows = [
        (
            step.name,
            step.action.value,
            describe(step.source),
            describe(step.target),
            _bits(step),
            human_bytes(step.target.nbytes),
        )
        for step in plan.steps
    ]
    total = ("total", "", human_bytes(plan.source_nbytes), "", f"{plan.bits_per_weight:.3f}", human_bytes(plan.nbytes))
    print_table(title, ("tensor", "action", "from", "to", ">bits", ">bytes"), rows, total)
    click.echo(f"Predicted peak memory: {human_bytes(plan.peak_memory)}.")


def _show_report(report: Report, destination: Path) -> None:
    groups: dict[tuple[str, str, str], list[Any]] = {}
    for outcome in report.outcomes:
        step = outcome.step
        groups.setdefault((step.action.value, describe(step.source), describe(step.target)), []).append(outcome)
    rows = []
    for (action, source, target), outcomes in groups.items():
        weights = sum(outcome.step.weights for outcome in outcomes)
        nbytes = sum(outcome.step.target.nbytes for outcome in outcomes)
        error = sum((outcome.error for outcome in outcomes[1:]), outcomes[0].error)
        cells = (
            action,
            source,
            target,
            str(len(outcomes)),
            human_count(weights),
            f"{8 * nbytes / max(1, weights):.3f}",
        )
        rows.append((*cells, human_bytes(nbytes), error.text()))
    plan = report.plan
    weights = sum(step.weights for step in plan.steps)
    total = ("total", "", "", str(len(plan.steps)), human_count(weights), f"{plan.bits_per_weight:.3f}")
    columns = ("action", "from", "to", ">tensors", ">weights", ">bits", ">bytes", ">error")
    print_table("", columns, rows, (*total, human_bytes(plan.nbytes), report.error.text()))
    click.echo(f"Wrote {destination}; reopened, and every byte is as meant.")


def _bits(step: Step) -> str:
    return f"{8 * step.target.nbytes / max(1, step.weights):.3f}"


def _step_json(step: Step) -> dict[str, Any]:
    return {
        "name": step.name,
        "action": step.action.value,
        "shape": list(step.source.shape),
        "from": entry_json(step.source),
        "to": entry_json(step.target),
    }


def entry_json(entry: Entry) -> dict[str, Any]:
    """Return a JSON description of a plain or packed entry."""
    from lowbit.tensors import PackedSpec

    if isinstance(entry, PackedSpec):
        bits = round(entry.bits_per_weight, 4)
        return {
            "layout": entry.layout,
            "scheme": entry.scheme.to_json(),
            "bytes": entry.nbytes,
            "bits_per_weight": bits,
        }
    dtype = describe(entry)
    return {"dtype": dtype, "bytes": entry.nbytes, "bits_per_weight": 8 * entry.dtype.itemsize}


def _report_json(report: Report, destination: Path) -> dict[str, Any]:
    tensors = []
    for outcome in report.outcomes:
        error = {
            "exact": outcome.error.exact,
            "max_abs": outcome.error.max_abs,
            "relative_rmse": outcome.error.relative,
        }
        tensors.append({**_step_json(outcome.step), "error": error})
    total = report.error
    return {
        "destination": str(destination),
        "format": report.plan.exporter.format,
        "bytes": report.plan.nbytes,
        "bits_per_weight": round(report.plan.bits_per_weight, 4),
        "exact": total.exact,
        "max_abs": total.max_abs,
        "relative_rmse": total.relative,
        "verified": True,
        "tensors": tensors,
    }
