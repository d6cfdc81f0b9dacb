"""``GgmlOptions``: what ``--set key=value`` can say to the quantizer ``ggml``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from lowbit.errors import OptionError

TypeName = Literal[
    "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k",
    "iq4_nl", "mxfp4", "tq1_0", "tq2_0", "q2_0", "q1_0",
]  # fmt: skip
TYPES: tuple[str, ...] = get_args(TypeName)


@dataclass(frozen=True, slots=True)
class GgmlOptions:
    """Options of ``ggml``. Raises OptionError for a type that it does not know."""

    type: TypeName = field(
        default="q4_k",
        metadata={
            "help": "the ggml type, as llama.cpp names it; a format's variant such as gguf:q4_k_m chooses it for each tensor"
        },
    )

    def __post_init__(self) -> None:
        if self.type not in TYPES:
            raise OptionError(f"ggml option type must be one of {', '.join(TYPES)}, got {self.type!r}")
