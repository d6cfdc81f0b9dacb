"""``KbitOptions``: what ``--set key=value`` can say to the quantizer ``kbit``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from lowbit.errors import OptionError

Codebook = Literal["int", "nf", "fp", "learned"]
ScaleRule = Literal["absmax", "signed", "search"]
ScaleDtype = Literal["float16", "bfloat16", "float32"]

BITS = (2, 8)
GROUP_SIZE = (16, 4096)
CANDIDATES = (2, 256)


@dataclass(frozen=True, slots=True)
class KbitOptions:
    """Options of ``kbit``; the defaults were chosen by measured error and speed (README). Raises OptionError."""

    bits: int = field(default=4, metadata={"help": "bits of a code, 2 to 8: the codebook has 2**bits entries"})
    group_size: int | None = field(
        default=64, metadata={"help": "weights that share a scale, 16 to 4096, or none for the whole row"}
    )
    codebook: Codebook = field(
        default="learned",
        metadata={
            "help": "the entries: int (uniform), nf (quantiles of a Gaussian), fp (a small float), learned (fitted to the tensor)"
        },
    )
    scale: ScaleRule = field(
        default="signed",
        metadata={
            "help": "a group's scale: absmax, signed (the absmax with its sign), search (least error over many candidates)"
        },
    )
    scale_dtype: ScaleDtype = field(default="float16", metadata={"help": "how scales are stored"})
    candidates: int = field(
        default=17, metadata={"help": "scales that search tries for each group and sign, 2 to 256, before it refines"}
    )
    seed: int = field(default=0, metadata={"help": "chooses the groups that a learned codebook is fitted to"})

    def __post_init__(self) -> None:
        _check_range("bits", self.bits, *BITS)
        if self.group_size is not None:
            _check_range("group_size", self.group_size, *GROUP_SIZE, also=", or none for the whole row")
        _check_choice("codebook", self.codebook, get_args(Codebook))
        _check_choice("scale", self.scale, get_args(ScaleRule))
        _check_choice("scale_dtype", self.scale_dtype, get_args(ScaleDtype))
        _check_range("candidates", self.candidates, *CANDIDATES)


def _check_range(name: str, value: int, low: int, high: int, also: str = "") -> None:
    if not low <= value <= high:
        raise OptionError(f"kbit option {name} must be {low} to {high}{also}, got {value}")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise OptionError(f"kbit option {name} must be one of {', '.join(choices)}, got {value!r}")
