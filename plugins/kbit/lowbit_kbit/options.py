"""``KbitOptions``: what ``--set key=value`` can say to the quantizer ``kbit``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from lowbit.errors import OptionError

Codebook = Literal["int", "nf", "fp", "learned", "user"]
ScaleRule = Literal["absmax", "signed", "search"]
ScaleDtype = Literal["float16", "bfloat16", "float32"]
Rounding = Literal["nearest", "stochastic"]

BITS = (2, 8)
GROUP_SIZE = (16, 4096)
CANDIDATES = (2, 256)
SCALE_BITS = (4, 8)


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
            "help": "the entries: int (uniform), nf (quantiles of a Gaussian), fp (a small float), learned (fitted to the tensor), "
            "user (given as entries)"
        },
    )
    scale: ScaleRule = field(
        default="signed",
        metadata={
            "help": "a group's scale: absmax, signed (the absmax with its sign), search (least error over many candidates)"
        },
    )
    scale_dtype: ScaleDtype = field(default="float16", metadata={"help": "how scales are stored"})
    scale_bits: int | None = field(
        default=None,
        metadata={
            "help": "4 to 8: integer scales of so many bits, and a float scale_dtype for each row; none: a float each"
        },
    )
    candidates: int = field(
        default=17, metadata={"help": "scales that search tries for each group and sign, 2 to 256, before it refines"}
    )
    rounding: Rounding = field(
        default="nearest",
        metadata={
            "help": "nearest entry, or stochastic: one of the two around a weight, so that their mean is the weight"
        },
    )
    entries: str | None = field(
        default=None, metadata={"help": "with codebook=user its 2**bits numbers, such as -1/-0.3/0.3/1, none above 1"}
    )
    flat: bool = field(
        default=False,
        metadata={"help": "groups run over the weight row after row and may cross rows, as those of bitsandbytes do"},
    )
    nested: bool = field(
        default=False,
        metadata={
            "help": "scales become bytes of a table, a float32 for every 256 and one offset: double quantization as in bitsandbytes; "
            "goes with flat and scale_dtype=float32"
        },
    )
    seed: int = field(
        default=0, metadata={"help": "chooses the groups that a learned codebook is fitted to, and stochastic codes"}
    )

    def __post_init__(self) -> None:
        _check_range("bits", self.bits, *BITS)
        if self.group_size is not None:
            _check_range("group_size", self.group_size, *GROUP_SIZE, also=", or none for the whole row")
        _check_choice("codebook", self.codebook, get_args(Codebook))
        _check_choice("scale", self.scale, get_args(ScaleRule))
        _check_choice("scale_dtype", self.scale_dtype, get_args(ScaleDtype))
        _check_range("candidates", self.candidates, *CANDIDATES)
        _check_choice("rounding", self.rounding, get_args(Rounding))
        if self.scale_bits is not None:
            _check_range("scale_bits", self.scale_bits, *SCALE_BITS, also=", or none for a float each")
        if self.flat and (self.scale_bits is not None or self.group_size is None):
            raise OptionError("kbit option flat goes with a group_size and a float for each scale (scale_bits=none)")
        if self.nested and not (self.flat and self.scale_dtype == "float32"):
            raise OptionError(
                f"kbit option nested goes with flat=true and scale_dtype=float32, got flat={str(self.flat).lower()} and "
                f"scale_dtype={self.scale_dtype}"
            )
        if (self.codebook == "user") != (self.entries is not None):
            raise OptionError(
                f"kbit option entries goes with codebook=user, got codebook={self.codebook} and entries={self.entries}"
            )
        if self.entries is not None:
            user_entries(self.entries, self.bits)

    @property
    def signed_scales(self) -> bool:
        """Whether a scale may be negative; known before any data, and all that ``scale_bits`` must know of the data."""
        return self.scale == "signed" or (self.scale == "search" and self.codebook in ("learned", "user"))


def user_entries(text: str, bits: int) -> list[float]:
    """Return the entries that ``text`` lists, separated by ``/``, commas or spaces; raise OptionError for other text."""
    try:
        found = [float(word) for word in text.replace("/", " ").replace(",", " ").split()]
    except ValueError:
        found = []
    if len(found) != 2**bits or not all(abs(entry) <= 1 for entry in found) or not any(found):
        raise OptionError(
            f"kbit option entries must be {2**bits} numbers for {bits} bits, from -1 to 1 and not all 0, got {text!r}"
        )
    return found


def _check_range(name: str, value: int, low: int, high: int, also: str = "") -> None:
    if not low <= value <= high:
        raise OptionError(f"kbit option {name} must be {low} to {high}{also}, got {value}")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise OptionError(f"kbit option {name} must be one of {', '.join(choices)}, got {value!r}")
