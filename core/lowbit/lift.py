"""Exact re-expression: the same real numbers under another scheme, so that codes move to a format that lacks their own.

With v = q - z an integer, ``w = s * v`` keeps its float32 bits when s keeps its value and v is written with another zero. So

    narrow groups    every target group lies inside one source group; its scale is repeated
    wider codes      symmetric b bits fits symmetric b' >= b; an integer zero needs b + 1 (v in -(2^b - 1) .. 2^b - 1)
    another zero     symmetric is an integer zero at the midpoint, and a minimum of -midpoint * s (a power of two times s)
    two levels       d = s, sub-scale 1; minimum = -s, sub-minimum z: when every super-group lies inside one source group

What depends on the values (a bfloat16 scale outside float16's range, say) is checked on every element, never assumed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from lowbit.errors import SchemeError
from lowbit.grids import decode_scales
from lowbit.parts import torch_dtype
from lowbit.repeated import repeated
from lowbit.scheme import Across, Grid, ScaleCoding, ScaleFormat, Scheme, Zero
from lowbit.tensors import QuantizedTensor, bit_equal
from lowbit.workers import map_ranges

_WIDER = {"float16": ("float16", "float32"), "bfloat16": ("bfloat16", "float32", "float16"), "float32": ("float32",)}
"""Scale dtypes that hold a dtype's values; bfloat16 fits float16 unless its exponent is extreme, which the data decides."""
SIGNIFICAND = {"float16": 11, "bfloat16": 8, "float32": 24, "float8_e4m3fn": 4, "float8_e8m0fnu": 1}
"""Bits of a dtype's significand, the implied one counted: s * q is exact in float32 while the sum of their bits is at most 24."""
_GROUPS = (16, 32, 64, 128, 256, 512, 1024)


def why_not(source: Scheme, target: Scheme, shape: tuple[int, int]) -> str | None:
    """Return None when weights of ``source`` can be re-expressed in ``target``, values permitting, else the reason."""
    if source == target:
        return None
    if source.grid is not Grid.AFFINE:
        return f"only affine grids are re-expressed, not {source.grid.value}"
    if target.grid is not Grid.AFFINE:
        return f"affine codes are not re-expressed as {target.grid.value}"
    if source.permutation and not target.permutation:
        return "it has no place for a permutation (act-order)"
    for name in ("flat", "vector", "outliers", "rotation", "permutation", "levels"):
        same = getattr(source, name) == getattr(target, name)
        if not same and not (name == "levels" and target.levels is None):  # three levels are three of the four codes
            return f"{name} differs: {getattr(source, name)} and {getattr(target, name)}"
    return _why_not_groups(source, target, shape) or _why_not_scales(source, target) or _why_not_codes(source, target)


def lift(quantized: QuantizedTensor, target: Scheme) -> QuantizedTensor:
    """Return the same weight under ``target``; call when ``why_not`` is None.

    Raises SchemeError, naming the value, when the target cannot hold a scale, a minimum or a code of this weight.
    """
    source = quantized.scheme
    if source == target:
        return quantized
    parts = {"codes": _symmetric_codes(quantized, target) if target.symmetric else quantized.parts["codes"]}
    if _same_groups(source, target):
        return QuantizedTensor(target, quantized.shape, {**quantized.parts, **parts})
    if source.permutation:
        parts["group_index"] = quantized.parts["group_index"]
    if source.scales == target.scales and not source.scales.two_level and target.zero in (Zero.SYMMETRIC, Zero.INTEGER):
        parts["scales"] = _regroup(quantized.parts["scales"], quantized, target).contiguous()
    else:
        parts |= _scales(scales := decode_scales(quantized), quantized, target)
    if target.zero is Zero.INTEGER:
        parts["zeros"] = _regroup(_zeros(quantized), quantized, target).to(torch.int16)
    elif target.zero is Zero.MINIMUM and target.scales.two_level:
        parts |= _two_level_minimums(scales, _zeros(quantized), quantized, target)
    elif target.zero is Zero.MINIMUM:
        minimums = decode_scales(quantized, "minimums") if source.zero is Zero.MINIMUM else _minimums(scales, quantized)
        stored = _exactly(minimums, target.scales.dtype, "minimum")
        parts["minimums"] = _regroup(stored, quantized, target).contiguous()
    elif target.zero is Zero.FLOAT:
        parts["zeros"] = _exactly(
            _regroup(decode_scales(quantized, "zeros"), quantized, target), target.scales.dtype, "zero"
        )
    return QuantizedTensor(target, quantized.shape, parts)


def candidates(source: Scheme, shape: tuple[int, int]) -> Iterator[Scheme]:
    """Yield schemes with one level of scales in which weights of ``source`` can be re-expressed, nearest first."""
    if source.grid is not Grid.AFFINE or source.scales.dtype not in _WIDER:
        return
    own = source.group_size or shape[1]
    groups = [source.group_size] + [size for size in reversed(_GROUPS) if size < own and own % size == 0]
    dtypes = ("float32",) if source.scales.two_level else _WIDER[source.scales.dtype]
    for group_size in groups:
        for dtype in dtypes:
            for bits in range(source.bits, 9):
                for zero in (source.zero, *(zero for zero in Zero if zero is not source.zero)):
                    coded = replace(source, bits=bits, zero=zero, levels=None)
                    scheme = replace(coded, group_size=group_size, scales=ScaleFormat(dtype))
                    if scheme != source and why_not(source, scheme, shape) is None:
                        yield scheme


def _why_not_groups(source: Scheme, target: Scheme, shape: tuple[int, int]) -> str | None:
    own, other = source.group_size or shape[1], target.group_size or shape[1]
    if source.permutation and (own != other or (target.symmetric and not source.symmetric)):
        return "a permutation spreads each group over the row: groups and codes stay as they are"
    if own % other and other != own:
        return f"groups of {other} do not lie inside groups of {own}"
    if not target.scales.two_level or target.scales == source.scales:
        return None
    super_size = other * (target.scales.super_group or 1)
    if own % super_size:
        return f"super-groups of {super_size} weights do not lie inside groups of {own}"
    return None


def _why_not_scales(source: Scheme, target: Scheme) -> str | None:
    old, new = source.scales, target.scales
    if _same_groups(source, target):
        return None
    if new.two_level and source.zero in (Zero.MINIMUM, Zero.FLOAT):
        return f"{source.zero.value} zeros are not re-expressed with two levels"
    if new.two_level and (old.two_level or new.coding is not ScaleCoding.LINEAR or new.across is not Across.GROUPS):
        return "two-level scales are made from one-level scales, with linear coding across groups"
    if old.two_level and new.dtype != "float32":
        return f"the product of two levels needs float32 scales, not {new.dtype}"
    if not old.two_level and new.dtype not in _WIDER.get(old.dtype, ()):
        return f"{new.dtype} scales do not hold {old.dtype} scales"
    return None


def _why_not_codes(source: Scheme, target: Scheme) -> str | None:
    if target.bits < source.bits:
        return f"{source.bits}-bit codes do not fit {target.bits} bits"
    if source.zero is target.zero:
        return None
    if source.zero in (Zero.MINIMUM, Zero.FLOAT):
        return f"a {source.zero.value} zero is no {target.zero.value} zero"
    if target.zero is Zero.FLOAT:
        return "a float zero is not made from an integer one"
    if target.zero is Zero.MINIMUM and SIGNIFICAND[source.scales.dtype] + (source.scales.bits or 0) + source.bits > 24:
        return f"{source.scales.dtype} scales times {source.bits}-bit codes are rounded before a minimum is added"
    if target.zero is Zero.SYMMETRIC and target.bits < source.bits + 1:
        return f"{source.bits}-bit codes with a zero of their own need {source.bits + 1} symmetric bits"
    two_level = target.scales.two_level
    if (
        target.zero is Zero.MINIMUM
        and source.zero is Zero.INTEGER
        and not two_level
        and target.scales.dtype != "float32"
    ):
        return f"-zero * scale is not a {target.scales.dtype} number in general"
    if target.zero is Zero.MINIMUM and two_level and 2 ** (target.scales.bits or 0) <= 2**source.bits - 1:
        return f"zero points of {source.bits} bits do not fit sub-minimums of {target.scales.bits}"
    return None


def _same_groups(source: Scheme, target: Scheme) -> bool:
    """Whether every part but the codes stays as it is."""
    return (source.scales, source.zero, source.group_size) == (target.scales, target.zero, target.group_size)


def _symmetric_codes(quantized: QuantizedTensor, target: Scheme) -> Tensor:
    """Return codes whose zero is the target's midpoint.

    The static conditions say that every value fits while codes and zeros are what the scheme says: only that is checked here.
    """
    codes, highest = quantized.parts["codes"], quantized.scheme.code_count - 1
    if quantized.scheme.symmetric:
        offset = target.midpoint - quantized.scheme.midpoint
        return codes + offset if offset else codes
    offsets = target.midpoint - _zeros(quantized)  # (rows, groups)
    if int(offsets.max()) > target.midpoint or int(offsets.min()) < target.midpoint - 2**quantized.scheme.bits + 1:
        raise SchemeError(f"a zero point is outside 0 to {2**quantized.scheme.bits - 1}")
    if bool((offsets == offsets[0, 0]).all()):
        return codes + int(offsets[0, 0]) if int(offsets[0, 0]) else codes
    columns, size = quantized.shape[1], quantized.scheme.group_size or quantized.shape[1]
    result, small = torch.empty_like(codes), offsets.to(torch.uint8)  # below 0 it wraps, and the sum wraps back

    def work(start: int, stop: int) -> None:
        if int(codes[start:stop].max()) > highest:
            raise SchemeError(f"a code is above {highest}, the highest of {quantized.scheme.summary()}")
        spread = small[start:stop].repeat_interleave(size, dim=1)[:, :columns] if columns % size else None
        if spread is None:
            groups = codes[start:stop].view(stop - start, -1, size) + small[start:stop, :, None]
            result[start:stop] = groups.view(stop - start, columns)
        else:
            result[start:stop] = codes[start:stop] + spread

    map_ranges(work, len(codes), columns)
    return result


def _zeros(quantized: QuantizedTensor) -> Tensor:
    """Return integer zeros (rows, groups) of a symmetric or integer grid; a placeholder for the others, which do not ask."""
    if quantized.scheme.zero is Zero.INTEGER:
        return quantized.parts["zeros"]
    return torch.full_like(quantized.parts["scales"], quantized.scheme.midpoint, dtype=torch.int16)


def _minimums(scales: Tensor, quantized: QuantizedTensor) -> Tensor:
    """Return what an integer zero adds to every weight of its group."""
    symmetric = quantized.scheme.symmetric
    return scales * -float(quantized.scheme.midpoint) if symmetric else -_zeros(quantized).float() * scales


def _scales(scales: Tensor, quantized: QuantizedTensor, target: Scheme) -> dict[str, Tensor]:
    if not target.scales.two_level:
        stored = _exactly(scales, target.scales.dtype, "scale")  # before they are repeated: fewer to look at
        return {"scales": _regroup(stored, quantized, target).contiguous()}
    units = torch.ones(quantized.shape[0], target.groups(quantized.shape))
    dtype = torch.int8 if target.scales.signed else torch.uint8
    supers = _exactly(_per_super(scales, quantized, target), target.scales.dtype, "scale")
    return {"scales": units.to(dtype), "super_scales": supers}


def _two_level_minimums(scales: Tensor, zeros: Tensor, quantized: QuantizedTensor, target: Scheme) -> dict[str, Tensor]:
    supers = _exactly(_per_super(-scales, quantized, target), target.scales.dtype, "minimum")
    return {"minimums": _regroup(zeros, quantized, target).to(torch.uint8), "super_minimums": supers}


def _per_super(values: Tensor, quantized: QuantizedTensor, target: Scheme) -> Tensor:
    """Give each super-group of the target the value of the source group that it lies in."""
    groups = _regroup(values, quantized, target)
    return groups[:, :: target.scales.super_group or groups.shape[1]]


def _regroup(values: Tensor, quantized: QuantizedTensor, target: Scheme) -> Tensor:
    """Repeat (rows, source groups) to (rows, target groups); every target group lies inside one source group."""
    columns = quantized.shape[1]
    own, other = quantized.scheme.group_size or columns, target.group_size or columns
    return repeated(values, max(1, own // other))[:, : math.ceil(columns / other)]


def _exactly(values: Tensor, dtype: str, what: str) -> Tensor:
    """Convert float32 values to a dtype that must hold every one of them."""
    converted = values.to(torch_dtype(dtype))
    if not bit_equal(converted.float(), values.float()):
        wrong = values[converted.float() != values.float()]
        raise SchemeError(
            f"{what} {float(wrong.flatten()[0]):.6g} is no {dtype} number, and an exact conversion needs it to be; --quantizer with "
            "--allow-requantize chooses new codes"
        )
    return converted.contiguous()
