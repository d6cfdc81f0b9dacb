"""The picture of ``lowbit sensitivity --plot``; needs the extra ``plot``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lowbit.errors import LowbitError, OptionError
from lowbit.sensitivity import Layer

INCHES_PER_LAYER = 0.16
SUFFIXES = (".png", ".svg", ".pdf")


class MissingExtraError(LowbitError):
    """A library of an optional extra is not installed."""


def check_plot(path: Path) -> None:
    """Raise OptionError for a suffix that is no picture's, MissingExtraError without matplotlib: before the work, not after."""
    if path.suffix not in SUFFIXES:
        raise OptionError(f"--plot writes {', '.join(SUFFIXES)}, got {path.name!r}")
    if not path.absolute().parent.is_dir():
        raise OptionError(f"--plot {path}: {path.absolute().parent} is no folder; make it first")
    try:
        import matplotlib  # noqa: F401  # only to say at once that it is missing
    except ModuleNotFoundError:
        raise MissingExtraError("--plot needs matplotlib, which is not installed: pip install 'lowbit[plot]'") from None


def plot(layers: Sequence[Layer], path: Path, title: str, chosen: Mapping[str, int] | None = None) -> None:
    """Write a picture: the relative error of every layer, a line for each width; rings mark the widths of a budget."""
    from matplotlib.figure import Figure  # no pyplot: no global state, no window

    figure = Figure(figsize=(max(8.0, INCHES_PER_LAYER * len(layers) + 2), 6), layout="constrained")
    axes = figure.subplots()
    places = range(len(layers))
    for index, width in enumerate(layers[0].widths):
        errors = [layer.widths[index].cost ** 0.5 for layer in layers]
        axes.plot(places, errors, marker=".", linewidth=1, label=f"{width.bits:g} bits")
    if chosen is not None:
        errors = [layer.widths[chosen[layer.name]].cost ** 0.5 for layer in layers]
        axes.plot(places, errors, "o", fillstyle="none", color="black", markersize=8, label="budget")
    axes.set_yscale("log")
    axes.set_xticks(places, [layer.name.removesuffix(".weight") for layer in layers], rotation=90, fontsize=6)
    axes.set_xlim(-0.5, len(layers) - 0.5)
    axes.set_ylabel(f"relative error of the {'weight' if layers[0].widths[0].output_error is None else 'output'}")
    axes.set_title(title)
    axes.grid(visible=True, which="both", linewidth=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
