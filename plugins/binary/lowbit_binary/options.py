"""``BinaryOptions``: what ``--set key=value`` can say to the quantizer ``binary``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from lowbit.errors import OptionError

Form = Literal["sum", "product"]
ScaleDtype = Literal["float16", "bfloat16", "float32"]

MOST_PLANES = 4
MOST_RATE = 8.0
GROUP_SIZE = (16, 4096)


@dataclass(frozen=True, slots=True)
class BinaryOptions:
    """Options of ``binary``. Raises OptionError for values that make no sense, alone or together."""

    bits: float = field(
        default=2.0,
        metadata={
            "help": "sign planes that are added, 1 to 4; in the product form any number of bits a weight up to 8"
        },
    )
    group_size: int | None = field(
        default=128,
        metadata={"help": "weights that share a scale of a plane, 16 to 4096, or none for the whole row; sums only"},
    )
    form: Form = field(
        default="sum",
        metadata={"help": "sum (planes with scales, added) or product (diag(a) B1 diag(m) B2 diag(b), no groups)"},
    )
    column_scales: bool = field(
        default=False, metadata={"help": "give every column a scale besides the groups' scales; sums only"}
    )
    scale_dtype: ScaleDtype = field(default="float16", metadata={"help": "how scales are stored"})
    steps: int = field(
        default=100, metadata={"help": "alternating steps of the product form; more lower the error a little"}
    )
    seed: int = field(default=0, metadata={"help": "start of the product form; a sum draws nothing at random"})

    def __post_init__(self) -> None:
        _check_choice("form", self.form, get_args(Form))
        _check_choice("scale_dtype", self.scale_dtype, get_args(ScaleDtype))
        if self.form == "sum" and self.bits not in range(1, MOST_PLANES + 1):
            raise OptionError(f"binary option bits counts planes of a sum: 1, 2, 3 or 4, got {self.bits:g}")
        if not 0 < self.bits <= MOST_RATE:
            raise OptionError(f"binary option bits must be above 0 and at most {MOST_RATE:g}, got {self.bits:g}")
        if self.group_size is not None and not GROUP_SIZE[0] <= self.group_size <= GROUP_SIZE[1]:
            raise OptionError(
                f"binary option group_size must be {GROUP_SIZE[0]} to {GROUP_SIZE[1]}, or none for the whole row, "
                f"got {self.group_size}"
            )
        if self.form == "product" and self.column_scales:
            raise OptionError("binary option column_scales goes with form=sum: a product always has them")
        if self.steps < 1:
            raise OptionError(f"binary option steps must be at least 1, got {self.steps}")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise OptionError(f"binary option {name} must be one of {', '.join(choices)}, got {value!r}")
