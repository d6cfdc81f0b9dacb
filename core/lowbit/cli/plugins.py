"""``lowbit plugins``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from lowbit.cli.console import json_option, print_json, print_table

if TYPE_CHECKING:
    from lowbit.registry import Registry


@click.command("plugins", short_help="List quantizers, layouts, kernels and formats.")
@click.option("--matrix", is_flag=True, help="Show which scheme each format can hold.")
@click.option("--reasons", is_flag=True, help="With --matrix: list why formats refuse.")
@json_option
def plugins_command(matrix: bool, reasons: bool, as_json: bool) -> None:
    """List what is installed: quantizers with their options, layouts, kernels, formats."""
    from lowbit.plugins import installed

    registry = installed()
    if matrix:
        _matrix(registry, reasons, as_json)
    elif as_json:
        print_json(_components(registry))
    else:
        _show(registry)


def _components(registry: Registry) -> dict[str, Any]:
    from lowbit.options import describe_options

    tables: dict[str, Mapping[str, object]] = {
        "layouts": registry.packers,
        "kernels": registry.kernels,
        "import_formats": registry.importers,
        "export_formats": registry.exporters,
    }
    listed: dict[str, Any] = {
        "quantizers": {
            name: {"module": type(quantizer).__module__, "options": describe_options(quantizer.Options)}
            for name, quantizer in registry.quantizers.items()
        }
    }
    for kind, table in tables.items():
        listed[kind] = {name: {"module": type(component).__module__} for name, component in table.items()}
    for name, exporter in registry.exporters.items():
        listed["export_formats"][name]["variants"] = list(exporter.variants())
    return listed


def _show(registry: Registry) -> None:
    listed = _components(registry)
    for name, quantizer in listed["quantizers"].items():
        rows = [(option["name"], option["type"], option["default"], option["help"]) for option in quantizer["options"]]
        print_table(f"quantizer {name} ({quantizer['module']})", ("option", "values", "default", "what"), rows)
    formats = sorted({*listed["import_formats"], *listed["export_formats"]})
    rows = [
        (
            name,
            "yes" if name in listed["import_formats"] else "-",
            "yes" if name in listed["export_formats"] else "-",
            " ".join(listed["export_formats"].get(name, {}).get("variants", [])),
        )
        for name in formats
    ]
    print_table("formats", ("format", "reads", "writes", "variants"), rows)
    click.echo("layouts: " + " ".join(listed["layouts"]))
    click.echo("kernels: " + " ".join(listed["kernels"]))


def _matrix(registry: Registry, reasons: bool, as_json: bool) -> None:
    from lowbit.matrix import compute

    cells = compute(registry)
    if as_json:
        print_json(
            {
                name: {
                    format: {"layout": cell.layout, "reason": cell.reason, "re_expressed": cell.exact is not None}
                    for format, cell in row.items()
                }
                for name, row in cells.items()
            }
        )
        return
    formats = list(registry.exporters)
    print_table(
        "", ("scheme", *formats), [(name, *(row[format].text() for format in formats)) for name, row in cells.items()]
    )
    click.echo('"= layout": codes that exist already are re-expressed there exactly; "-": refused (--reasons says why)')
    if reasons:
        for name, row in cells.items():
            for format, cell in row.items():
                if cell.reason and not cell.exact:
                    click.echo(f"{format} refuses {name}: {cell.reason}")
