"""``lowbit sensitivity``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lowbit.cli.console import json_option, print_json, print_table, progress_bar
from lowbit.errors import OptionError

if TYPE_CHECKING:
    from lowbit.interfaces import Calibration, Checkpoint
    from lowbit.recipe import Rule
    from lowbit.registry import Registry
    from lowbit.sensitivity import Layer


@click.command("sensitivity", short_help="Error of each layer at several widths; widths for a budget.")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--bits", "-b", default="2,3,4,8", show_default=True, help="Widths to try, with commas between.")
@click.option("--quantizer", "-q", help="Default: the first installed one with these widths that needs no calibration.")
@click.option("--group-size", "-g", help="Weights that share a scale; 'none' for the whole row.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any option of the quantizer; repeatable.")
@click.option(
    "--format", "-f", "format", default="native", show_default=True, help="The format whose stored bits count."
)
@click.option(
    "--imatrix", type=click.Path(path_type=Path), help="Importance matrix: errors of outputs, not of weights."
)
@click.option(
    "--statistics",
    type=click.Path(path_type=Path),
    help="What convert --statistics measured: importances and Hessians.",
)
@click.option(
    "--budget", type=float, help="Stored bits a weight on average, scales and all: choose each layer's width."
)
@click.option("--rules-out", type=click.Path(path_type=Path), help="Write the chosen widths, for convert --rule @FILE.")
@click.option("--plot", type=click.Path(path_type=Path), help="Write a picture (.png, .svg, .pdf); needs lowbit[plot].")
@json_option
def sensitivity_command(model: Path, as_json: bool, **flags: Any) -> None:
    """Quantize each linear layer of MODEL at several widths, one at a time, and show what each loses.

    With --budget the widths are chosen that lose least at so many stored bits a weight; q, k and v, and gate and up, get one
    width, because programs fuse them.
    """
    from lowbit.plan import Target
    from lowbit.plugins import installed
    from lowbit.sensitivity import choose_widths, measure_layers, rules
    from lowbit.sensitivity_plot import check_plot, plot

    registry, widths = installed(), _widths(flags["bits"])
    if flags["plot"]:
        check_plot(flags["plot"])
    if flags["rules_out"] and flags["budget"] is None:
        raise OptionError("--rules-out writes the widths that --budget chooses; give --budget too")
    rule = _rule(registry, widths, flags)
    with registry.open(model) as checkpoint:
        known = _known(checkpoint, registry, flags)
        total = sum(1 for name in checkpoint.entries if name.endswith(".weight"))
        with progress_bar(total, quiet=as_json) as advance:
            layers = measure_layers(
                checkpoint, registry, rule, widths, Target.parse(flags["format"]), known, lambda name: advance(1, name)
            )
    chosen = choose_widths(layers, flags["budget"]) if flags["budget"] is not None else None
    if flags["plot"]:
        plot(layers, flags["plot"], f"{model.name}, {rule.quantizer}", chosen)
    if chosen is not None and flags["rules_out"]:
        flags["rules_out"].write_text("\n".join(rules(layers, chosen, rule)) + "\n")
    if as_json:
        print_json(_document(model, layers, rule, chosen, flags["budget"]))
    else:
        _show(layers, rule, chosen, flags)


def _widths(text: str) -> list[float]:
    try:
        widths = sorted({float(part) for part in text.split(",")})
    except ValueError:
        raise OptionError(f"--bits takes widths such as 2,3,4,8, got {text!r}") from None
    return widths


def _rule(registry: Registry, widths: Sequence[float], flags: Mapping[str, Any]) -> Rule:
    from lowbit.options import parse_settings
    from lowbit.recipe import Rule
    from lowbit.sensitivity import default_quantizer

    settings = parse_settings(flags["settings"])
    if flags["group_size"] is not None:
        settings["group_size"] = flags["group_size"]
    if "bits" in settings:
        raise OptionError("bits are what this command varies; give --bits 2,3,4")
    return Rule("*", flags["quantizer"] or default_quantizer(registry, widths), settings)


def _known(checkpoint: Checkpoint, registry: Registry, flags: Mapping[str, Any]) -> Mapping[str, Calibration]:
    imatrix = registry.calibration(flags["imatrix"], checkpoint) if flags["imatrix"] else {}
    if not flags["statistics"]:
        return imatrix
    from lowbit.calibration.measured import StatisticsFile

    return StatisticsFile(flags["statistics"], checkpoint).beside(imatrix)


def _document(
    model: Path, layers: Sequence[Layer], rule: Rule, chosen: Mapping[str, int] | None, budget: float | None
) -> dict[str, Any]:
    from lowbit.sensitivity import average_bits, rules, total_cost

    document: dict[str, Any] = {
        "model": str(model),
        "quantizer": rule.quantizer,
        "settings": dict(rule.settings),
        "layers": [
            {
                "name": layer.name,
                "shape": list(layer.shape),
                "widths": [
                    {
                        "bits": width.bits,
                        "bits_per_weight": round(width.stored, 4),
                        "relative_rmse": width.error,
                        "output_relative_rmse": width.output_error,
                    }
                    for width in layer.widths
                ],
            }
            for layer in layers
        ],
    }
    if chosen is not None:
        document["budget"] = {
            "bits_per_weight": budget,
            "reached": round(average_bits(layers, chosen), 4),
            "sum_of_squared_errors": total_cost(layers, chosen),
            "bits": {layer.name: layer.widths[chosen[layer.name]].bits for layer in layers},
            "rules": rules(layers, chosen, rule),
        }
    return document


def _show(layers: Sequence[Layer], rule: Rule, chosen: Mapping[str, int] | None, flags: Mapping[str, Any]) -> None:
    from lowbit.sensitivity import average_bits, total_cost

    first = layers[0].widths
    of_output = first[0].output_error is not None
    columns = ["layer", "shape", *(f">{width.bits:g} bits ({width.stored:.2f})" for width in first)]
    columns += [">budget"] if chosen is not None else []
    rows = []
    for layer in layers:
        row = [layer.name, "x".join(map(str, layer.shape)), *(f"{width.cost**0.5:.4f}" for width in layer.widths)]
        rows.append(row + ([f"{layer.widths[chosen[layer.name]].bits:g}"] if chosen is not None else []))
    mean = [
        f"{(sum(layer.widths[index].cost for layer in layers) / len(layers)) ** 0.5:.4f}" for index in range(len(first))
    ]
    footer = ["root mean square", "", *mean]
    footer += [f"{average_bits(layers, chosen):.3f}"] if chosen is not None else []
    print_table("", columns, rows, footer)
    click.echo(
        f"Relative error of the {'output' if of_output else 'weight'}, {rule.quantizer}; stored bits in parentheses."
    )
    if chosen is not None:
        root = (total_cost(layers, chosen) / len(layers)) ** 0.5
        click.echo(
            f"Within {flags['budget']:g} bits: {average_bits(layers, chosen):.3f}, root mean square error {root:.4f}."
        )
        if flags["rules_out"]:
            click.echo(f"Wrote {flags['rules_out']}; use it: lowbit convert MODEL OUT --rule @{flags['rules_out']}")
