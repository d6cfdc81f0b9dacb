"""Zero points in GPTQ files: what their fields mean, by the label of the file and by what the fields themselves show.

Version 1 (``checkpoint_format: gptq``) stores z - 1, version 2 (``gptq_v2``) stores z. For a symmetric file, whose z is
2**(b-1) everywhere, the label is often wrong and always redundant: the same field of 2**(b-1) - 1 or of 2**(b-1) in every
place is symmetric. For others the label counts, and version 1 has two holes, where writers differ:

    z = 0         GPTQModel and auto-round subtract one from every field of a word at once, so that 0 borrows from its
                  neighbour, and adding one gives it back; AutoGPTQ loses the word's other fields
    3 bits        AutoGPTQ, auto-round and GPTQModel today subtract one from each field; older versions of GPTQModel from whole
                  words, with the constants of words 0 and 2 in each other's place (its utils/model.py,
                  convert_gptq_v2_to_v1_format_module)
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowbit.errors import CheckpointError
from lowbit.scheme import Zero
from lowbit_formats.int_words import constant_words, only_code, pack_words, unpack_words

GPTQMODEL, AUTO_ROUND = "gptqmodel", "auto-round"
WORD_WRITERS = (GPTQMODEL, AUTO_ROUND)
"""Programs that compute version 1 on whole words."""


@dataclass(slots=True)
class ZeroReader:
    """Reads the qzeros of one checkpoint.

    Attributes:
        version: What the label says, 1 or 2.
        writer: The program that wrote the file, if it is one of ``WORD_WRITERS``.
        seen: How many symmetric modules turned out to have each version.
    """

    version: int
    writer: str = ""
    seen: Counter[int] = field(default_factory=Counter)

    def kind(self, words: Tensor, bits: int, columns: int, symmetric: bool | None, name: str) -> Zero:
        """Return which zeros a tensor of qzeros, int32 (groups, columns * bits / 32), holds.

        ``symmetric`` is what the config says; ``name`` is the tensor's. Raises CheckpointError, naming it and the value, when
        the two contradict each other, or writers disagree about what a value means.
        """
        version = symmetric_version(words, bits, columns)
        if version and (symmetric is not False or version == self.version):
            self.seen[version] += 1
            return Zero.SYMMETRIC
        if symmetric:
            only, midpoint = only_code(words, bits, columns), 2 ** (bits - 1)
            got = "several values" if only is None else f"{only} everywhere"
            raise CheckpointError(
                f"{name} holds {got}, but the quantization_config says sym is true, which means {midpoint - 1} or {midpoint}; "
                "correct the config"
            )
        if self.version == 1:
            self._check_version_1(words, bits, columns, name)
        return Zero.INTEGER

    def stored(self, words: Tensor, bits: int, columns: int) -> Tensor:
        """Return qzeros of integer zeros as version 2 stores them."""
        if self.version == 2:
            return words
        if 32 % bits == 0:
            return words + constant_words(1, bits, columns)  # whole words, so that a borrow is given back; int32 wraps
        return pack_words(unpack_words(words, bits, columns) + 1 & 2**bits - 1, bits)

    def found(self) -> str:
        """Say which versions the symmetric modules really have; empty when the label is right, or there are none."""
        other = 3 - self.version
        if not self.seen[other]:
            return ""
        return f"{self.seen[other]} of {sum(self.seen.values())} modules have version {other}"

    def _check_version_1(self, words: Tensor, bits: int, columns: int, name: str) -> None:
        """Raise CheckpointError for fields that writers of version 1 read differently."""
        if bits == 3 and self.writer == GPTQMODEL:
            raise CheckpointError(
                f"{name} holds 3-bit zero points of checkpoint_format 'gptq', which versions of gptqmodel encode differently; "
                "save the model as gptq_v2 with the version that wrote it"
            )
        if bits in (5, 6, 7) or (32 % bits == 0 and self.writer in WORD_WRITERS):
            return  # auto-round alone writes 5 to 7 bits, and masks each field
        highest = int(unpack_words(words, bits, columns).max())
        if highest == 2**bits - 1:
            raise CheckpointError(
                f"{name} holds the field {highest}, a zero point of 0, which writers of checkpoint_format 'gptq' encode in "
                "ways that contradict each other; save the model as gptq_v2 with the program that wrote it"
            )


def symmetric_version(words: Tensor, bits: int, columns: int) -> int | None:
    """Return the version in which qzeros are the midpoint everywhere; None when they are not, in either."""
    midpoint = constant_words(2 ** (bits - 1), bits, columns)
    if _every_row(words, midpoint):
        return 2
    firsts = [constant_words(2 ** (bits - 1) - 1, bits, columns)]
    if bits == 3:  # older versions of GPTQModel; 32 fields are three words
        ones = constant_words(1, bits, columns).view(-1, 3)
        firsts.append(midpoint - ones.flip(1).view(1, -1))
    return 1 if any(_every_row(words, first) for first in firsts) else None


def version_of(label: object, where: str) -> int:
    """Return the version that a ``checkpoint_format`` means; raise CheckpointError for another format."""
    versions = {None: 1, "gptq": 1, "gptq_v2": 2}
    if not isinstance(label, (str, type(None))) or label not in versions:
        raise CheckpointError(f"{where} has checkpoint_format {label!r}; lowbit reads gptq and gptq_v2")
    return versions[label]


def _every_row(words: Tensor, row: Tensor) -> bool:
    return bool(torch.all(words == row))
