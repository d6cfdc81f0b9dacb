"""``AutoRoundOptions``: what ``--set key=value`` can say to the quantizer ``autoround``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from lowbit.errors import OptionError

ZeroKind = Literal["integer", "minimum"]
ScaleRule = Literal["minmax", "search"]
ScaleDtype = Literal["float16", "bfloat16", "float32"]


@dataclass(frozen=True, slots=True)
class AutoRoundOptions:
    """Options of ``autoround``. Raises OptionError for values that make no sense, alone or together."""

    bits: int = field(
        default=4,
        metadata={"help": "bits of a code: 2 to 8, or 1 when not symmetric (a symmetric bit means 0 or -scale)"},
    )
    group_size: int | None = field(
        default=128, metadata={"help": "weights that share a scale, or none for the whole row"}
    )
    symmetric: bool = field(
        default=True, metadata={"help": "no zero point: the midpoint code means 0, and the scale has a sign"}
    )
    zero: ZeroKind = field(
        default="integer",
        metadata={
            "help": "when not symmetric: an integer zero point, or a float minimum (GGUF Q4_1 and Q5_1 store one)"
        },
    )
    scale_dtype: ScaleDtype = field(default="float16", metadata={"help": "how scales (and minimums) are stored"})
    scale: ScaleRule = field(
        default="minmax",
        metadata={"help": "a group's scale: minmax (from its extremes), search (least error over many candidates)"},
    )
    iters: int = field(default=0, metadata={"help": "tuning steps of AutoRound; this version rounds to nearest, so 0"})
    seed: int = field(default=0, metadata={"help": "for tuning; rounding to nearest draws nothing at random"})

    def __post_init__(self) -> None:
        lowest = 2 if self.symmetric else 1
        if not lowest <= self.bits <= 8:
            kind = "symmetric" if self.symmetric else "asymmetric"
            raise OptionError(f"autoround option bits must be {lowest} to 8 for {kind} weights, got {self.bits}")
        if self.group_size is not None and self.group_size < 1:
            raise OptionError(
                f"autoround option group_size must be positive, or none for the whole row, got {self.group_size}"
            )
        _check_choice("zero", self.zero, get_args(ZeroKind))
        _check_choice("scale_dtype", self.scale_dtype, get_args(ScaleDtype))
        _check_choice("scale", self.scale, get_args(ScaleRule))
        if self.iters != 0:
            raise OptionError(f"this version of autoround cannot tune: set iters=0, got {self.iters}")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise OptionError(f"autoround option {name} must be one of {', '.join(choices)}, got {value!r}")
