"""Format ``exl3``, to read: folders that exllamav3 writes.

The tensors of a module ``P``: ``P.trellis``, ``P.suh``, ``P.svh`` (``exl3_layout``), ``P.bias`` where it has one, and at most one
of two flags, int32 scalars whose value is the multiplier of the code:

    P.mcg    0xCBAC1FED: code mcg      P.mul1    0x83DCD12D: code mul1      neither: code 3inst

Old files have ``P.su`` and ``P.sv`` in place of suh and svh: int16, where bit b of word j is the sign of element 16 j + b, set
for -1. exllamav3 pads features to multiples of 128 and the files do not say by how much; where the config tells that they are
padded they are refused. Source: exllamav3 1.5 (modules/quant/exl3.py, modules/linear.py, conversion/compile.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import CheckpointError
from lowbit.hookspecs import hookimpl
from lowbit.interfaces import Importer, Kernel, Packer
from lowbit.kernels import ReferenceKernel
from lowbit.parts import TensorSpec
from lowbit_formats.exl3_layout import BLOCK, TILE, Exl3Packer, exl3_scheme
from lowbit_formats.quantized_folder import (
    FolderImporter,
    ModuleReader,
    PackedModule,
    QuantizedCheckpoint,
    StoredModule,
    packed_spec,
)

PACKER = Exl3Packer()
MULTIPLIERS = {"mcg": 0xCBAC1FED, "mul1": 0x83DCD12D}
SIGNS_OF_SCALES = {"suh": "su", "svh": "sv"}
PADDED_SIZES = ("hidden_size", "intermediate_size")
"""Sizes of a config that exllamav3 would have padded; vocab_size shows in the rows of lm_head."""
HEAD = "lm_head.weight"


class Exl3Reader(ModuleReader):
    """Reads modules of EXL3."""

    suffixes = ("trellis", "suh", "svh", "su", "sv", *MULTIPLIERS)
    telltale = ("suh", "svh")

    def open(self, stored: StoredModule) -> PackedModule:
        """Return the module; raise CheckpointError when its tensors are none that EXL3 has."""
        trellis = stored.spec("trellis")
        if trellis.dtype is not torch.int16 or len(trellis.shape) != 3:
            raise CheckpointError(
                f"{stored.tensor('trellis')} must be a 3-D int16 tensor, got {trellis.dtype} {[*trellis.shape]}"
            )
        tiles_in, tiles_out, words = trellis.shape
        half_bits, rest = divmod(words, TILE // 2)
        if rest or not 2 <= half_bits <= 16:
            raise CheckpointError(
                f"{stored.tensor('trellis')} has {words} words in a tile; EXL3 has 16 for each bit, 1 to 8 bits, in halves"
            )
        shape = TILE * tiles_out, TILE * tiles_in
        spec = packed_spec(PACKER, exl3_scheme(half_bits, _code(stored)), shape, stored.name)
        for buffer, signs in SIGNS_OF_SCALES.items():
            wanted = spec.buffers[buffer]
            if buffer not in stored and signs in stored:
                packed = TensorSpec(torch.int16, (wanted.shape[0] // 16,))
                stored.expect(signs, packed, f"the trellis of {stored.name}")
            else:
                stored.expect(buffer, wanted, f"the trellis of {stored.name}")

        def buffers() -> Mapping[str, Tensor]:
            return {"trellis": stored.read("trellis"), **{name: _scales(stored, name) for name in SIGNS_OF_SCALES}}

        return PackedModule(spec, buffers)


class Exl3Importer(FolderImporter):
    """Reads folders with quant_method ``exl3``."""

    format = "exl3"
    methods = ("exl3",)

    def reader(self, config: Mapping[str, Any], where: str) -> Exl3Reader:
        """Return a reader."""
        return Exl3Reader()

    def open(self, path: Path) -> QuantizedCheckpoint:
        """Open a folder; raises CheckpointError, with a sentence, for anything malformed, and for padded features.

        A head of its own is not tied to the embedding, whatever the config says: exllamav3 always writes one.
        """
        checkpoint = super().open(path)
        try:
            config = dict(checkpoint.metadata.config)
            _check_padding(checkpoint, config)
        except BaseException:
            checkpoint.close()
            raise
        if HEAD in checkpoint.entries and config.get("tie_word_embeddings"):
            config["tie_word_embeddings"] = False
            checkpoint.metadata = replace(checkpoint.metadata, config=config)
        return checkpoint


def _code(stored: StoredModule) -> str:
    """Return the trellis code that the flags say."""
    flags = [code for code in MULTIPLIERS if code in stored]
    if len(flags) > 1:
        raise CheckpointError(f"{stored.name} is flagged as mcg and as mul1; remove the flag that is wrong")
    for code in flags:
        value = stored.read(code)
        if value.dtype is not torch.int32 or value.numel() != 1 or int(value) & 0xFFFFFFFF != MULTIPLIERS[code]:
            raise CheckpointError(
                f"{stored.tensor(code)} is {value.flatten().tolist()}, and lowbit knows the multiplier "
                f"{MULTIPLIERS[code]:#x} of the code {code} only"
            )
    return flags[0] if flags else "3inst"


def _scales(stored: StoredModule, buffer: str) -> Tensor:
    """Return suh or svh, from packed signs where there is nothing else."""
    if buffer in stored:
        return stored.scales(buffer)
    words = stored.read(SIGNS_OF_SCALES[buffer]).int()
    bits = words[:, None] >> torch.arange(16, dtype=torch.int32) & 1
    return (1 - 2 * bits).flatten().half()


def _check_padding(checkpoint: QuantizedCheckpoint, config: Mapping[str, Any]) -> None:
    """Raise CheckpointError when the config tells that matrices have rows or columns of padding."""
    text = config.get("text_config")
    sizes = {**(text if isinstance(text, dict) else {}), **config}
    for key in PADDED_SIZES:
        size = sizes.get(key)
        if isinstance(size, int) and size % BLOCK:
            raise CheckpointError(
                f"{checkpoint.path}: {key} is {size}, so EXL3 padded its matrices to {BLOCK}; lowbit reads no padded matrices"
            )
    rows, vocabulary = (
        checkpoint.entries[HEAD].shape[0] if HEAD in checkpoint.entries else None,
        sizes.get("vocab_size"),
    )
    if rows is not None and isinstance(vocabulary, int) and rows != vocabulary:
        raise CheckpointError(
            f"{checkpoint.path}: lm_head has {rows} rows and vocab_size is {vocabulary}; lowbit reads no padded matrices"
        )


@hookimpl
def lowbit_register_packers(register: Callable[[Packer], None]) -> None:
    """Register the layout ``exl3``."""
    register(PACKER)


@hookimpl
def lowbit_register_kernels(register: Callable[[Kernel], None]) -> None:
    """Register its plain-torch kernel."""
    register(ReferenceKernel(PACKER))


@hookimpl
def lowbit_register_importers(register: Callable[[Importer], None]) -> None:
    """Register the importer."""
    register(Exl3Importer())
