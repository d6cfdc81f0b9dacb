"""Weights in 8-bit floats with scales beside them, as checkpoints store them: read as bfloat16.

    name                  float8, (..., out, in)
    name_scale_inv        (..., ceil(out / 128), ceil(in / 128)): one for each block of weight_block_size. DeepSeek's name; it
                          multiplies, in spite of it (DeepSeek-V3, inference/kernel.py, weight_dequant)
    name_scale            one, or (out,) or (out, 1): one for each row (fbgemm_fp8 in transformers)

``weight = float32(code) * float32(scale)``, rounded once to bfloat16. Without scales bfloat16 holds every float8 exactly.
Scales of activations (``input_scale``, ``activation_scale``) belong to the float8 matmul alone, and are dropped with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.errors import CheckpointError
from lowbit.parts import TensorSpec
from lowbit.workers import map_ranges

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz)
SCALE_SUFFIXES = ("_scale_inv", "_scale")
ACTIVATION_SCALES = ("input_scale", "activation_scale")
DEFAULT_BLOCK = (128, 128)
"""Used where no config gives weight_block_size: DeepSeek-V3's, the one block size in use."""

# Weights decoded at a time: temporaries of 1 MB are reused by the allocator; of 4 MB they cost page faults in every piece.
_PIECE = 1 << 18


@dataclass(frozen=True, slots=True)
class Fp8Weight:
    """A float8 tensor and its scales: each scale serves ``row_repeat`` rows and ``column_repeat`` columns."""

    spec: TensorSpec
    scale: str | None = None
    row_repeat: int = 1
    column_repeat: int = 1

    @property
    def decoded(self) -> TensorSpec:
        """What ``decode`` returns."""
        return TensorSpec(torch.bfloat16, self.spec.shape)

    def decode(self, codes: Tensor, scale: Tensor | None) -> Tensor:
        """Return bfloat16 of the shape of ``codes``."""
        out = torch.empty(codes.shape, dtype=torch.bfloat16)
        if not out.numel():
            return out
        columns = codes.shape[-1] if codes.dim() else 1
        codes, target = codes.reshape(-1, columns), out.view(-1, columns)
        scales = None if scale is None else self._row_scales(scale.float(), codes.shape[0])

        def decode(start: int, stop: int) -> None:
            values = _to_float32(codes[start:stop])
            if scales is not None:
                self._multiply(values, scales[start:stop])
            target[start:stop] = values

        map_ranges(decode, codes.shape[0], columns, piece=_PIECE)
        return out

    def _multiply(self, values: Tensor, scales: Tensor) -> None:
        """Multiply (rows, columns) in place by (rows, scales in a row); the last scale may serve fewer columns."""
        width = self.column_repeat
        whole = values.shape[1] // width
        values[:, : whole * width].view(-1, whole, width).mul_(scales[:, :whole, None])
        values[:, whole * width :].mul_(scales[:, whole:])

    def _row_scales(self, scale: Tensor, rows: int) -> Tensor:
        """Return the scales of every row, float32 (rows of the flattened weight, scales in a row)."""
        if scale.numel() == 1:
            return scale.reshape(1, 1).expand(rows, 1)
        if scale.dim() == 1:
            return scale[:, None]
        height = self.spec.shape[-2]
        spread = scale.repeat_interleave(self.row_repeat, dim=-2)[..., :height, :]
        return spread.reshape(rows, -1)


def _to_float32(codes: Tensor) -> Tensor:
    """Decode by table: in one thread 0.7 GB of bfloat16/s, allocation included, where torch's own cast reaches 0.3.

    Measured 2026-11-21, torch 2.13, 8192x4096 float8_e4m3fn, in CPU time on a shared 2-core machine.
    """
    table = torch.arange(256).to(torch.uint8).view(codes.dtype).float()
    return table.index_select(0, codes.reshape(-1).view(torch.uint8).int()).view(codes.shape)


def find_fp8(specs: Mapping[str, TensorSpec], block: tuple[int, int] = DEFAULT_BLOCK) -> dict[str, Fp8Weight]:
    """Return the float8 tensors by name, each with its scales.

    Raises CheckpointError for scales whose shape or dtype does not fit, and for a tensor with both kinds.
    """
    found = {}
    for name, spec in specs.items():
        if spec.dtype not in FLOAT8:
            continue
        scales = [name + suffix for suffix in SCALE_SUFFIXES if name + suffix in specs]
        if len(scales) > 1:
            raise CheckpointError(f"tensor {name!r} has two kinds of scales, {' and '.join(scales)}; keep one")
        found[name] = _scaled(name, spec, scales[0], specs[scales[0]], block) if scales else Fp8Weight(spec)
    return found


def scale_names(weights: Mapping[str, Fp8Weight]) -> set[str]:
    """Return the names of all tensors that mean nothing once the weights are decoded."""
    names = {weight.scale for weight in weights.values() if weight.scale}
    owners = {name.removesuffix("weight") for name in weights if name.endswith("weight")}
    return names | {owner + scale for owner in owners for scale in ACTIVATION_SCALES}


def _scaled(name: str, spec: TensorSpec, scale: str, stored: TensorSpec, block: tuple[int, int]) -> Fp8Weight:
    shape, steps = spec.shape, stored.shape
    if not stored.dtype.is_floating_point:
        raise CheckpointError(f"scales {scale!r} are {str(stored.dtype)[6:]}; lowbit reads scales of a float dtype")
    if all(step == 1 for step in steps):
        return Fp8Weight(spec, scale, 1, shape[-1] if shape else 1)
    if len(shape) == 2 and steps in ((shape[0],), (shape[0], 1)):
        return Fp8Weight(spec, scale, 1, shape[1])
    rows = columns = None
    if len(steps) == len(shape) >= 2 and steps[:-2] == shape[:-2]:
        rows, columns = (_repeat(*sizes) for sizes in zip(shape[-2:], steps[-2:], block, strict=True))
    if rows is None or columns is None:
        raise CheckpointError(
            f"scales {scale!r} of shape {list(steps)} do not fit {name!r} of shape {list(shape)}: neither one for the tensor, "
            f"nor one for each row, nor one for each block of {block[0]}x{block[1]}"
        )
    return Fp8Weight(spec, scale, rows, columns)


def _repeat(length: int, steps: int, block: int) -> int | None:
    """Return how many of ``length`` neighbours share each of ``steps`` scales; None when they do not fit."""
    return {1: length, length: 1, -(-length // block): min(block, length)}.get(steps)
