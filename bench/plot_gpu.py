"""Draw bench/gpu_products.png: how close products come to reading their bytes, by shape.

python bench/plot_gpu.py
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).parent
SHAPES = ("4096x4096", "4096x11008", "4096x14336", "14336x4096", "8192x28672", "28672x8192")
KINDS = (
    "affine 4-bit g128 constant",
    "affine 3-bit g128 constant",
    "affine 2-bit g128 constant",
    "codebook 4-bit g64 constant",
)


def main() -> None:
    """Read the committed figures and write the picture."""
    document = json.loads((HERE / "baselines" / "nvidia-h200.json").read_text())
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
