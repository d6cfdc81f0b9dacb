"""What happens once, at load: arranging a whole model on a GPU, and compiling a kernel.

    PYTHONPATH=core:cuda:formats:plugins/kbit python3 bench/gpu_prepare.py [OUTPUT.json]

The linear layers of a Llama of 8 B weights (32 blocks, hidden 4096, intermediate 14336, 8 of 32 heads for keys and values) in several
layouts, one block's weights for each block; the time is that of ``Kernel.prepare`` for all of them, without reading files.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path

import torch

import lowbit.plugins
import lowbit_formats.awq
import lowbit_formats.gguf
import lowbit_formats.gptq
import lowbit_formats.plain
import lowbit_kbit
from lowbit import Grid, PackedTensor, ScaleFormat, Scheme, Zero
from lowbit.testing import samples
from lowbit_cuda.arch import architecture
from lowbit_cuda.decoder import AFFINE
from lowbit_cuda.gemv import GemvShape
from lowbit_cuda.plugin import UnitsKernel
from lowbit_cuda.units import UnitFormat

BLOCKS = 32
BLOCK = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)]
HALF = ScaleFormat("float16")
LAYOUTS = {
    "gptq": Scheme(Grid.AFFINE, 4, 128, scales=HALF),
    "gptq act-order": Scheme(Grid.AFFINE, 4, 128, scales=HALF, permutation=True),
    "awq-gemm": Scheme(Grid.AFFINE, 4, 128, Zero.INTEGER, HALF),
    "gguf-q4_k": Scheme(Grid.AFFINE, 4, 32, Zero.MINIMUM, ScaleFormat(bits=6, super_group=8)),
    "gguf-q6_k": Scheme(Grid.AFFINE, 6, 16, scales=ScaleFormat(bits=8, super_group=16, signed=True)),
    "kbit-dense": Scheme(Grid.CODEBOOK, 4, 64, scales=HALF),
}


def packed_block(layout: str, scheme: Scheme, packers) -> list[PackedTensor]:
    """Return one block's weights on the GPU; a tall weight repeats its first 256 rows, which changes no time."""
    found = []
    for rows, columns in BLOCK:
        few = samples.quantized(scheme, (256, columns))
        whole = type(few)(
            scheme,
            (rows, columns),
            {
                name: part.repeat(rows // 256, *[1] * (part.dim() - 1)) if part.shape[:1] == (256,) else part
                for name, part in few.parts.items()
            },
        )
        packed = packers[layout].pack(whole)
        found.append(PackedTensor(packed.spec, {name: buffer.cuda() for name, buffer in packed.buffers.items()}))
    return found


def prepare_model(name: str, scheme: Scheme) -> dict[str, float]:
    """Return the seconds of arranging all blocks, and the memory that this takes beside the weights."""
    packers = lowbit.plugins.registry(
        lowbit_formats.awq, lowbit_formats.gguf, lowbit_formats.gptq, lowbit_formats.plain, lowbit_kbit
    ).packers
    kernel, block = UnitsKernel(packers), packed_block(name.split()[0], scheme, packers)
    for packed in block:
        kernel.prepare(packed)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    started = time.perf_counter()
    kept = [kernel.prepare(packed) for _ in range(BLOCKS) for packed in block]
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    units = sum(buffer.nbytes for prepared in kept for buffer in prepared.buffers.values())
    extra = torch.cuda.max_memory_allocated() - held - units
    weights = BLOCKS * sum(rows * columns for rows, columns in BLOCK)
    return {
        "seconds": round(seconds, 3),
        "weights": weights,
        "GB of units": round(units / 1e9, 3),
        "GB of scratch": round(extra / 1e9, 3),
    }


def compile_times() -> dict[str, float]:
    """Return the seconds of one kernel: compiled, and from the cache, in a folder of its own."""
    shape = GemvShape(UnitFormat(AFFINE[4], 128), 4096, 4096)
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    program, found = shape.program(capability), {}
    kept = os.environ.get("LOWBIT_CACHE_DIR")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LOWBIT_CACHE_DIR"] = folder
        for name in ("cold, with the import of the compiler", "from the cache"):
            started = time.perf_counter()
            program.compile(architecture(capability))
            found[name] = round(time.perf_counter() - started, 4)
    if kept is None:
        del os.environ["LOWBIT_CACHE_DIR"]
    else:
        os.environ["LOWBIT_CACHE_DIR"] = kept
    return found


def main() -> None:
    """Measure, print, and write."""
    figures: dict[str, dict[str, float]] = {"compile one GEMV": compile_times()}
    print(figures, flush=True)
    if torch.cuda.is_available():
        for name, scheme in LAYOUTS.items():
            figures[f"prepare 8 B {name}"] = prepare_model(name, scheme)
            print(name, figures[f"prepare 8 B {name}"], flush=True)
            torch.cuda.empty_cache()
    if len(sys.argv) > 1:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
        document = {"date": time.strftime("%Y-%m-%d"), "device": device, "figures": figures}
        Path(sys.argv[1]).write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
