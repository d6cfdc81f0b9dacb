"""What groups of 16, act-order and outliers cost: whole layers by CUDA graph over rotating cold weights, against a plain 4-bit layer.

PYTHONPATH=core:cuda:formats python3 bench/gpu_addons.py [OUTPUT.json]
"""

from __future__ import annotations

import json
import sys
import time
from functools import partial
from pathlib import Path

import torch
from gpu_products import COLD_BYTES, graph_time

import lowbit.plugins
import lowbit_formats.plain
from lowbit import Grid, PackedTensor, QuantizedTensor, ScaleFormat, Scheme, Zero
from lowbit.scheme import Outliers
from lowbit.testing import samples
from lowbit_cuda.plugin import UnitsKernel

HALF = ScaleFormat("float16")
SHAPE = (14336, 4096)
TOKENS = (1, 8, 16, 64, 2048)
SCHEMES = {
    "4-bit g128": Scheme(Grid.AFFINE, 4, 128, scales=HALF),
    "4-bit g128 act-order": Scheme(Grid.AFFINE, 4, 128, scales=HALF, permutation=True),
    "4-bit g128 outliers 0.5%": Scheme(Grid.AFFINE, 4, 128, scales=HALF, outliers=Outliers(0.005)),
    "4-bit g16": Scheme(Grid.AFFINE, 4, 16, scales=HALF),
    "4-bit g24": Scheme(Grid.AFFINE, 4, 24, scales=HALF),
    "Q6_K": Scheme(Grid.AFFINE, 6, 16, scales=ScaleFormat(bits=8, super_group=16, signed=True)),
    "Q2_K": Scheme(Grid.AFFINE, 2, 16, Zero.MINIMUM, ScaleFormat(bits=4, super_group=16)),
    "codebook 4-bit g64": Scheme(Grid.CODEBOOK, 4, 64, scales=HALF),
    **{f"codebook {bits}-bit g64": Scheme(Grid.CODEBOOK, bits, 64, scales=HALF) for bits in (5, 6, 7, 8)},
}


def prepared(scheme: Scheme, kernel: UnitsKernel, packer) -> PackedTensor:
    """Return a random weight of ``SHAPE``, arranged on the GPU."""
    quantized = samples.quantized(scheme, SHAPE)
    packed = packer.pack(QuantizedTensor(scheme, SHAPE, quantized.parts))
    return kernel.prepare(PackedTensor(packed.spec, {name: buffer.cuda() for name, buffer in packed.buffers.items()}))


def main() -> None:
    """Measure, print, and write."""
    packers = lowbit.plugins.registry(lowbit_formats.plain).packers
    kernel, figures = UnitsKernel(packers), {}
    for name, scheme in SCHEMES.items():
        first = prepared(scheme, kernel, packers["plain"])
        nbytes = sum(buffer.nbytes for buffer in first.buffers.values())
        copies = [first] + [
            PackedTensor(first.spec, {key: buffer.clone() for key, buffer in first.buffers.items()})
            for _ in range(int(COLD_BYTES // nbytes))
        ]
        found = {"MB": round(nbytes / 1e6, 1)}
        for tokens in TOKENS:
            x = torch.randn(tokens, SHAPE[1], device="cuda").half()
            found[f"M={tokens} us"] = graph_time([partial(kernel.matmul, x, each) for each in copies])
        found["dequantize us"] = graph_time([partial(kernel.dequantize, each, torch.float16) for each in copies])
        figures[name] = found
        print(name, found, flush=True)
    if len(sys.argv) > 1:
        document = {
            "date": time.strftime("%Y-%m-%d"),
            "device": torch.cuda.get_device_name(),
            "shape": SHAPE,
            "figures": figures,
        }
        Path(sys.argv[1]).write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
