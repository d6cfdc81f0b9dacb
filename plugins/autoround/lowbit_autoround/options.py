"""``AutoRoundOptions``: what ``--set key=value`` can say to the quantizer ``autoround``."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from lowbit.errors import OptionError
from lowbit.scheme import Scheme
from lowbit_autoround.kquants import K_SCHEMES
from lowbit_autoround.recipes import RECIPES, RecipeName, Tuning

ZeroKind = Literal["integer", "minimum"]
ScaleRule = Literal["minmax", "search"]
ScaleDtype = Literal["float16", "bfloat16", "float32"]
Fallback = Literal["error", "rtn"]
LARGEST_TRIM = 0.1
COUNTED_SHARES, COUNTED_TOKENS = (0.6, 0.5), 4096
"""The share of a step's tokens that the loss counts by default: the second where at least so many are left, else the first."""


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
    scale: ScaleRule | None = field(
        default=None,
        metadata={
            "help": "a group's scale before tuning: minmax (from its extremes), search (least error over many candidates); "
            "none is what the recipe says"
        },
    )
    two_level: bool = field(
        default=False,
        metadata={"help": "integer scales under a float one, as GGUF's K-quants store them (2 to 6 bits)"},
    )
    recipe: RecipeName = field(
        default="rtn", metadata={"help": "values for iters, lr, batch_size, scale and the amount of calibration data"}
    )
    iters: int | None = field(
        default=None, metadata={"help": "tuning steps; 0 rounds to nearest; none is what the recipe says"}
    )
    lr: float | None = field(
        default=None, metadata={"help": "first step size, falling to 0; none is the recipe's, 1/iters if it has none"}
    )
    batch_size: int | None = field(default=None, metadata={"help": "sequences of a tuning step; none is the recipe's"})
    accumulate: int = field(default=1, metadata={"help": "batches whose gradients are added before a step"})
    tune_scales: bool = field(default=True, metadata={"help": "tune the ranges of groups too, not only the rounding"})
    tokens: float | None = field(
        default=None,
        metadata={
            "help": "share of the tokens of a batch, drawn anew for each step, whose output errors the loss counts; "
            f"none is {COUNTED_SHARES[1]} where that leaves {COUNTED_TOKENS} tokens, else {COUNTED_SHARES[0]}"
        },
    )
    trim: float = field(
        default=0.0,
        metadata={
            "help": "share of the largest output errors that the loss leaves out (SignRoundV2: 0.001 under 4 bits)"
        },
    )
    fallback: Fallback = field(
        default="error",
        metadata={"help": "when the loss of a block is not finite: stop with an error, or rtn for this block"},
    )
    seed: int = field(default=42, metadata={"help": "which sequences each tuning step sees"})

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
        _check_choice("scale", self.scale, (*get_args(ScaleRule), None))
        _check_choice("recipe", self.recipe, get_args(RecipeName))
        _check_choice("fallback", self.fallback, get_args(Fallback))
        _check_tuning(self)
        if self.two_level:
            _check_two_level(self)

    def counted_share(self, tokens: int) -> float:
        """Return the share of a step's ``tokens`` that the loss counts."""
        if self.tokens is not None:
            return self.tokens
        usual, large = COUNTED_SHARES
        return large if tokens * large >= COUNTED_TOKENS else usual

    @property
    def tuning(self) -> Tuning:
        """The recipe's settings, with the options that were given in their place."""
        recipe = RECIPES[self.recipe]
        iters = recipe.iters if self.iters is None else self.iters
        lr = recipe.lr if self.lr is None else self.lr
        batch_size = recipe.batch_size if self.batch_size is None else self.batch_size
        search = recipe.search if self.scale is None else self.scale == "search"
        return replace(recipe, iters=iters, lr=lr, batch_size=batch_size, search=search)

    def for_scheme(self, scheme: Scheme) -> AutoRoundOptions | None:
        """Return these options changed so that they give the two-level ``scheme``, or None when it is none of GGUF's."""
        if scheme not in K_SCHEMES.values():
            return None
        zero: ZeroKind = self.zero if scheme.symmetric else "minimum"
        return replace(
            self,
            bits=scheme.bits,
            group_size=scheme.group_size,
            symmetric=scheme.symmetric,
            zero=zero,
            scale_dtype="float16",
            two_level=True,
        )


def _check_tuning(options: AutoRoundOptions) -> None:
    positive = {"batch_size": options.batch_size, "accumulate": options.accumulate, "lr": options.lr}
    for name, value in positive.items():
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise OptionError(f"autoround option {name} must be positive, got {value}")
    if options.iters is not None and options.iters < 0:
        raise OptionError(f"autoround option iters must be 0 (round to nearest) or more, got {options.iters}")
    if options.tokens is not None and not 0 < options.tokens <= 1:
        raise OptionError(
            f"autoround option tokens must be above 0 and at most 1, a share of a batch, got {options.tokens}"
        )
    if not 0 <= options.trim <= LARGEST_TRIM:
        raise OptionError(
            f"autoround option trim must be 0 to {LARGEST_TRIM}, a share of the outputs, got {options.trim}"
        )


def _check_two_level(options: AutoRoundOptions) -> None:
    scheme = K_SCHEMES.get(options.bits)
    if scheme is None:
        raise OptionError(
            f"autoround option two_level goes with {min(K_SCHEMES)} to {max(K_SCHEMES)} bits, got {options.bits}"
        )
    zero = None if options.symmetric else options.zero
    wanted = (scheme.group_size, scheme.symmetric, None if scheme.symmetric else "minimum", "float16")
    if (options.group_size, options.symmetric, zero, options.scale_dtype) != wanted:
        kind = "symmetric=true" if scheme.symmetric else "symmetric=false zero=minimum"
        raise OptionError(
            f"autoround option two_level at {options.bits} bits means group_size={scheme.group_size} {kind} "
            "scale_dtype=float16, as GGUF stores it; set these, or name the GGUF type in --format"
        )


def _check_choice(name: str, value: str | None, choices: tuple[str | None, ...]) -> None:
    if value not in choices:
        known = ", ".join(choice for choice in choices if choice)
        raise OptionError(f"autoround option {name} must be one of {known}, got {value!r}")
