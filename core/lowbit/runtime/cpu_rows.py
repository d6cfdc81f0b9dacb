"""``cpu-rows``: any weight whose rows can be decoded alone, unpacked once to a byte a code."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lowbit.grids import decode_scales, dequantize
from lowbit.interfaces import MatmulProblem
from lowbit.parts import TensorSpec, part_specs
from lowbit.runtime.unpacked import UnpackedKernel
from lowbit.scheme import Across, Grid, ScaleFormat, Scheme, Zero
from lowbit.tensors import PackedTensor, QuantizedTensor, row_parts


class RowsKernel(UnpackedKernel):
    """Keeps the parts as they are: half the memory of a bfloat16 weight, and no unpacking at every product."""

    name = "cpu-rows"
    priority = 10
    prepared_layout = "cpu-rows"

    def why_not_unpacked(self, problem: MatmulProblem) -> str | None:
        """Refuse grids and add-ons that mix rows."""
        scheme = problem.scheme
        if scheme.grid not in (Grid.AFFINE, Grid.CODEBOOK) or scheme.bits > 8:
            return f"keeps a byte for each code of an affine or codebook grid, not {scheme.summary()}"
        mixes = {
            "flat groups": scheme.flat and not _ends_with_rows(scheme, problem.shape),
            "a rotation of the output": scheme.rotation and scheme.rotation.out_block,
            "scales shared across rows": scheme.scales.two_level and scheme.scales.across is Across.ROWS,
        }
        if found := [what for what, present in mixes.items() if present]:
            return f"decodes rows alone, but {found[0]} mix them ({scheme.summary()})"
        return None

    def served(self, quantized: QuantizedTensor) -> QuantizedTensor:
        """Return flat groups that end with rows, as those of bitsandbytes mostly do, as groups of rows, their scales decoded."""
        scheme, shape = quantized.scheme, quantized.shape
        if not scheme.flat:
            return quantized
        apart = replace(scheme, flat=False, scales=ScaleFormat("float32"))
        scales = decode_scales(quantized).reshape(shape[0], -1)
        parts = {name: quantized.parts[name] for name in part_specs(apart, shape) if name != "scales"}
        return QuantizedTensor(apart, shape, {**parts, "scales": scales})

    def code_specs(self, scheme: Scheme, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        """One buffer, as the parts table has it."""
        return {"codes": part_specs(scheme, shape)["codes"]}

    def arrange(self, quantized: QuantizedTensor) -> dict[str, Tensor]:
        """Keep the codes."""
        return {"codes": quantized.parts["codes"].contiguous()}

    def codes(self, prepared: PackedTensor) -> Tensor:
        """Return the buffer."""
        return prepared.buffers["codes"]

    def why_no_rows(self, problem: MatmulProblem) -> str | None:
        """Refuse what has parts that mix rows."""
        if row_parts(problem.scheme, part_specs(problem.scheme, problem.shape)):
            return None
        return f"reads rows alone, and the parts of {problem.scheme.summary()} mix them"

    def rows(self, packed: PackedTensor, numbers: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Take these rows of every part, and decode them."""
        quantized = self.unpacked(self.prepare(packed))
        apart = row_parts(quantized.scheme, quantized.parts)
        cut = {name: part[numbers] if name in apart else part for name, part in quantized.parts.items()}
        shape = (len(numbers), quantized.shape[1])
        return dequantize(QuantizedTensor(quantized.scheme, shape, cut)).to(dtype)


def _ends_with_rows(scheme: Scheme, shape: tuple[int, int]) -> bool:
    """Whether no flat group crosses from one row into the next, and a scale is all that it has."""
    return bool(scheme.group_size) and shape[1] % (scheme.group_size or 1) == 0 and scheme.zero is Zero.SYMMETRIC
