"""Write golden files for layouts that have none: ``python tests/golden/make.py``. README.md here says what is in them.

A file that is there is never written again: it stands for the files that people have.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save

from lowbit import Grid, MatmulProblem, PackedSpec, PackedTensor, QuantizedTensor, Registry, Scheme, Zero, installed
from lowbit.errors import SchemeError
from lowbit.scheme import Across, ScaleFormat
from lowbit.tensors import raw_bytes
from lowbit.testing import samples
from lowbit_formats.bitsandbytes_layout import DOUBLE, SINGLE
from lowbit_formats.exl3_layout import exl3_scheme

FOLDER = Path(__file__).parent
HEAD = 16
"""Dequantized values that a file holds besides the hash of all of them, so that a difference can be looked at."""


def affine(bits: int, group_size: int | None, zero: Zero = Zero.SYMMETRIC, **fields: object) -> Scheme:
    """Return an affine scheme."""
    return Scheme(Grid.AFFINE, bits, group_size, zero, **fields)  # type: ignore[arg-type]  # fields are Scheme's


BF16, ASYM, MIN = ScaleFormat("bfloat16"), Zero.INTEGER, Zero.MINIMUM
EXAMPLES: dict[str, list[tuple[Scheme, tuple[int, int]]]] = {
    "gptq": [
        (affine(2, 32), (16, 64)),
        (affine(3, None), (32, 32)),
        (affine(4, 32, permutation=True), (8, 64)),
        (affine(8, 16, scales=BF16), (4, 32)),
    ],
    "gptq_v2": [
        (affine(2, 32, ASYM), (16, 64)),
        (affine(3, 32, ASYM), (32, 32)),
        (affine(4, 32, ASYM, permutation=True), (8, 64)),
        (affine(8, None, ASYM), (4, 32)),
    ],
    "awq-gemm": [(affine(4, 32), (8, 64)), (affine(4, None, ASYM, scales=BF16), (16, 32))],
    "ct-pack": [(affine(bits, 32, zero), (8, 64)) for bits in range(2, 9) for zero in (Zero.SYMMETRIC, ASYM)],
    "mlx-affine": [(affine(bits, 32, MIN), (4, 64)) for bits in (2, 3, 4, 5, 6, 8)],
    **{
        layout: [(Scheme(Grid.CODEBOOK, 4, 64, scales=scales, flat=True), (3, 65)) for scales in (SINGLE, DOUBLE)]
        for layout in ("bnb-nf4", "bnb-fp4")
    },
    "exl3": [(exl3_scheme(*which), (128, 128)) for which in ((4, "3inst"), (6, "mcg"), (4, "mul1"), (5, "mul1"))],
    "hqq": [(affine(bits, 16, Zero.FLOAT), (10, 32)) for bits in (1, 2, 3, 4, 8)],
}
"""What a layout's file shows; layouts that are not here get every scheme of ``samples.REPRESENTATIVES`` that they hold."""


def main() -> None:
    """Write what is missing, one line each; layouts given as arguments are the only ones considered."""
    registry = installed()
    for layout in sys.argv[1:] or registry.packers:
        path = FOLDER / f"{layout}.safetensors"
        if not path.exists():
            path.write_bytes(golden(registry, layout))
            sys.stdout.write(f"{path.name}: {path.stat().st_size:,} bytes\n")


def golden(registry: Registry, layout: str) -> bytes:
    """Return a golden file: buffers of every example, with scheme, shape and the hash of the weight in the metadata."""
    tensors, records = {}, []
    for index, (scheme, shape) in enumerate(examples(registry, layout)):
        packed = registry.packers[layout].pack(example(registry, layout, scheme, shape, index))
        weight = dequantized(registry, packed)
        tensors |= {f"{index}.{name}": buffer.clone() for name, buffer in packed.buffers.items()}
        tensors[f"{index}:head"] = weight.flatten()[:HEAD].clone()
        records.append({"scheme": scheme.to_json(), "shape": list(shape), "sha256": digest(weight)})
    return save(tensors, {"layout": layout, "examples": json.dumps(records)})


def examples(registry: Registry, layout: str) -> list[tuple[Scheme, tuple[int, int]]]:
    """Return schemes and shapes for a layout; raise SchemeError when none is known."""
    packer = registry.packers[layout]
    own = [(packer.scheme, (2, 256))] if hasattr(packer, "scheme") else []  # a GGUF type holds one scheme
    others = [(_short(scheme), _few(scheme, shape)) for scheme, shape in samples.REPRESENTATIVES]
    known = EXAMPLES.get(layout) or own or others
    held = [(scheme, shape) for scheme, shape in known if packer.why_not(scheme, shape) is None]
    if not held:
        raise SchemeError(f"no example is known for layout {layout}; add a scheme and a shape to EXAMPLES")
    return held


def _short(scheme: Scheme) -> Scheme:
    """Return the scheme with a codebook that does not fill the file."""
    return replace(scheme, bits=9, vector=4) if scheme.vector > 1 else scheme


def _few(scheme: Scheme, shape: tuple[int, int]) -> tuple[int, int]:
    """Return the shape with fewer rows, where rows do not depend on each other."""
    together = scheme.trellis or scheme.binary or scheme.scales.across is Across.ROWS
    return shape if together else (min(shape[0], 4), shape[1])


def example(registry: Registry, layout: str, scheme: Scheme, shape: tuple[int, int], seed: int) -> QuantizedTensor:
    """Return a random weight that the layout can hold: with its own codebook where it has one."""
    packer, quantized = registry.packers[layout], samples.quantized(scheme, shape, seed)
    parts = dict(quantized.parts)
    for table in (getattr(packer, "codebook", None), getattr(packer, "table", None)):
        if table is not None:
            parts["codebook"] = table.reshape(parts["codebook"].shape)
    if scheme.trellis and scheme.rotation and scheme.rotation.dtype != "int8":
        parts["scales"] = torch.ones_like(parts["scales"])  # these layouts have their scales in the signs
    return QuantizedTensor(scheme, shape, parts)


def read(path: Path, registry: Registry) -> list[tuple[PackedTensor, dict[str, object], torch.Tensor]]:
    """Return the packed weights of a golden file, each with its record and its first values."""
    with safe_open(path, "pt") as file:
        said = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # safe_open is no mapping
    found = []
    for index, record in enumerate(json.loads(said["examples"])):
        scheme, shape = Scheme.from_json(record["scheme"]), (record["shape"][0], record["shape"][1])
        specs = registry.packers[said["layout"]].specs(scheme, shape)
        buffers = {name.partition(".")[2]: it for name, it in tensors.items() if name.startswith(f"{index}.")}
        packed = PackedTensor(PackedSpec(said["layout"], scheme, shape, specs), buffers)
        found.append((packed, record, tensors[f"{index}:head"]))
    return found


def dequantized(registry: Registry, packed: PackedTensor) -> torch.Tensor:
    """Return the weight in float32, by the layout's plain-torch kernel."""
    problem = MatmulProblem(packed.layout, packed.scheme, packed.shape)
    return registry.reference_kernel(problem).dequantize(packed)


def digest(weight: torch.Tensor) -> str:
    """Return the SHA-256 of a weight's bytes; -0 counts as 0, because no product with a scale cares."""
    return hashlib.sha256(raw_bytes(weight + 0.0).numpy().data).hexdigest()


if __name__ == "__main__":
    main()
