"""Draw bench/gpu_products.png, how close products come to reading their bytes, and write the table of products in bench/README.md.

python bench/plot_gpu.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).parent
README, BASELINES = HERE / "README.md", ("nvidia-h200.json", "nvidia-h200-peers.json")
SHAPES = ("4096x4096", "4096x11008", "4096x14336", "14336x4096", "8192x28672", "28672x8192")
KINDS = (
    "affine 4-bit g128 constant",
    "affine 3-bit g128 constant",
    "affine 2-bit g128 constant",
    "codebook 4-bit g64 constant",
)


OURS = {
    **{f"affine {bits}-bit g128 constant": f"{bits}-bit" for bits in (4, 3, 2)},
    **{f"codebook {bits}-bit g64 constant": f"{bits}-bit codebook" for bits in (4, 3, 2)},
}
OTHERS = (
    "cuBLAS fp16",
    "torch int4 bf16 g128",
    "humming 4-bit",
    "humming 3-bit",
    "humming 2-bit",
    "bitsandbytes nf4 g64",
)
Figures = dict[str, dict[str, float]]


def main() -> None:
    """Read the committed figures and write picture and table."""
    document, peers = (json.loads((HERE / "baselines" / name).read_text()) for name in BASELINES)
    draw(document)
    text = README.read_text()
    before, rest = text.split("<!-- products -->\n")
    after = rest.split("<!-- /products -->\n")[1]
    table = "\n".join(rows(document["figures"], peers["figures"]))
    README.write_text(f"{before}<!-- products -->\n{table}\n<!-- /products -->\n{after}")


def rows(figures: Figures, peers: Figures) -> Iterator[str]:
    """Yield the lines of the table: our products, then those of others."""
    yield "| shape | weights | floor | M=1 | GB/s | of the floor | M=1, dependent launch | M=8 | M=16 | M=64 |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for shape in SHAPES:
        for kind, label in OURS.items():
            one = figures[f"{kind} M=1 {shape}"]
            more = [figures.get(f"{kind} M={tokens} {shape}", {}).get("us") for tokens in (8, 16, 64)]
            rate = [
                f"{one['floor_us']:.1f}",
                f"{one['us']:.1f}",
                f"{one['MB'] / one['us'] * 1e3:.0f}",
                f"{one['of_floor']:.2f}",
            ]
            yield line(shape, label, *rate, f"{one['us_dependent']:.1f}", *map(number, more))
        for name in OTHERS:
            found = [(figures | peers).get(f"{name} M={tokens} {shape}", {}).get("us") for tokens in (1, 8, 16, 64)]
            if any(found):
                yield line(
                    shape, name.replace(" bf16 g128", ""), "", number(found[0]), "", "", "", *map(number, found[1:])
                )


def line(*cells: str) -> str:
    """Return a row of a table."""
    return f"| {' | '.join(cells)} |"


def number(us: float | None) -> str:
    """Return microseconds, or nothing where nothing was measured."""
    return "" if us is None else f"{us:.1f}"


def draw(document: dict[str, Any]) -> None:
    """Draw the picture."""
    figures = document["figures"]
    picture, panels = plt.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
    for panel, tokens in zip(panels, (1, 8), strict=True):
        for number, kind in enumerate(KINDS):
            heights = [figures[f"{kind} M={tokens} {shape}"]["of_floor"] for shape in SHAPES]
            panel.bar(
                [at + 0.2 * number for at in range(len(SHAPES))], heights, 0.19, label=kind.removesuffix(" constant")
            )
        panel.set_xticks([at + 0.3 for at in range(len(SHAPES))], SHAPES, rotation=20)
        panel.set_title(f"{tokens} row{'s' if tokens > 1 else ''} of x")
        panel.axhline(1, color="black", linewidth=0.8)
    panels[0].set_ylabel("time to read the bytes / time")
    picture.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(KINDS), fontsize=9)
    picture.suptitle(f"{document['device']}, {document['date']}, K x N, without dependent launch")
    picture.savefig(HERE / "gpu_products.png", dpi=110)


if __name__ == "__main__":
    main()
