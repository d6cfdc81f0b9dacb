"""Importance matrices of llama.cpp: the mean square of every input column of every matrix, as ``llama-imatrix`` collects it.

A GGUF file with ``general.type`` ``imatrix`` holds for each matrix, by ggml's name N, two float32 tensors::

    N.in_sum2 (matrices, columns)   sums of x^2 over tokens; more than one matrix for stacked experts
    N.counts  (matrices, 1)         how many tokens were summed

and the keys ``imatrix.datasets`` (strings), ``imatrix.chunk_count`` and ``imatrix.chunk_size`` (u32). The older ``.dat`` format
is a sequence of little-endian numbers (common/imatrix-loader.cpp)::

    i32 entries | per entry: i32 name bytes, name, i32 calls, i32 values, float32 values | i32 chunks | i32 bytes, dataset

whose values are means times calls.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lowbit.errors import CheckpointError
from lowbit.interfaces import Calibration, Checkpoint
from lowbit.metadata import Metadata
from lowbit.recipe import is_matrix
from lowbit.staging import staged
from lowbit_formats.gguf.architectures import BY_MODEL_TYPE, Architecture
from lowbit_formats.gguf.block_types import TYPES
from lowbit_formats.gguf.header import MAGIC, Header, TensorInfo, read_header
from lowbit_formats.gguf.keys import text, texts, u32
from lowbit_formats.gguf.writer import Slot, TensorFile

SUMS, COUNTS = ".in_sum2", ".counts"
DATASETS, CHUNKS, CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
_MOST_NAME_BYTES = 255


@dataclass(frozen=True, slots=True)
class Imatrix:
    """What an importance matrix file holds.

    Attributes:
        importance: By ggml's tensor name, the mean of x squared for each column, float32 (columns,).
        tokens: How many tokens the means are over, the most of any matrix; for a ``.dat`` file, its calls.
        datasets: The texts that were run.
        chunk_size: Tokens of a chunk; 0 when the file does not say.
    """

    importance: Mapping[str, Tensor]
    tokens: int
    datasets: tuple[str, ...] = ()
    chunk_size: int = 0


def is_imatrix(path: Path) -> bool:
    """Whether the file is an importance matrix: by its GGUF keys, or as a ``.dat`` file by its first entry."""
    with path.open("rb") as file:
        start = file.read(16)
    if start.startswith(MAGIC):
        return bool(read_header(path).keys.get("general.type") == "imatrix")
    if len(start) < 16:
        return False
    entries, name_bytes, *_ = struct.unpack("<iiii", start)
    return bool(0 < entries < 1 << 20 and 0 < name_bytes <= _MOST_NAME_BYTES) and path.stat().st_size > name_bytes + 16


def read_imatrix(path: Path) -> Imatrix:
    """Read an importance matrix, GGUF or ``.dat``.

    Raises CheckpointError for a damaged file, sums without counts, stacked experts, and values that are no mean squares.
    """
    with path.open("rb") as file:
        legacy = file.read(4) != MAGIC
    found = _read_legacy(path) if legacy else _read_gguf(read_header(path))
    for name, importance in found.importance.items():
        if not bool(((importance >= 0) & torch.isfinite(importance)).all()):
            raise CheckpointError(
                f"{path}: {name} holds a mean square that is negative, NaN or infinite; make it again"
            )
    return found


def calibration(path: Path, checkpoint: Checkpoint) -> dict[str, Calibration] | None:
    """Return the importance of a checkpoint's matrices by Hugging Face name; None when the file is no importance matrix.

    Matrices that the file does not know are left out, as llama.cpp does. Raises CheckpointError for a file that fits no tensor
    of the model, or has another number of columns for one.
    """
    if not is_imatrix(path):
        return None
    found, architecture = read_imatrix(path), _architecture(path, checkpoint.metadata)
    blocks = checkpoint.metadata.config["num_hidden_layers"]
    measured = {}
    for name, entry in checkpoint.entries.items():
        ggml_name = architecture.ggml_name(name, blocks)
        if not is_matrix(entry) or ggml_name is None or ggml_name not in found.importance:
            continue
        importance = found.importance[ggml_name]
        if len(importance) != entry.shape[1]:
            raise CheckpointError(
                f"{path} has {len(importance)} columns for {ggml_name}, and {name} has {entry.shape[1]}; it was made with "
                f"another model"
            )
        measured[name] = Calibration(importance=importance)
    if not measured:
        raise CheckpointError(f"{path} names no matrix of {checkpoint.path.name}; it was made with another model")
    return measured


def write_calibration(
    path: Path, measured: Mapping[str, Calibration], checkpoint: Checkpoint, tokens: int, source: str = ""
) -> None:
    """Write the importances among what was measured for the matrices of a checkpoint; see ``write_imatrix``.

    Raises CheckpointError when nothing has an importance, for one of another length than its matrix has columns, and for a
    tensor that the checkpoint does not have.
    """
    importance = {name: found.importance for name, found in measured.items() if found.importance is not None}
    if not importance:
        raise CheckpointError(f"nothing was measured that {path} could hold: no weight has an importance")
    for name, values in importance.items():
        entry = checkpoint.entries.get(name)
        if entry is None or not is_matrix(entry):
            raise CheckpointError(f"{path} cannot hold {name}: {checkpoint.path.name} has no such matrix")
        if values.shape != (entry.shape[1],):
            raise CheckpointError(
                f"the importance of {name} is of shape {tuple(values.shape)}, and the matrix has {entry.shape[1]} columns"
            )
    write_imatrix(path, importance, checkpoint.metadata, tokens, (source,) if source else ())


def write_imatrix(
    path: Path,
    importance: Mapping[str, Tensor],
    metadata: Metadata,
    tokens: int,
    datasets: Sequence[str] = (),
    chunk_size: int = 512,
) -> None:
    """Write an importance matrix that llama.cpp reads.

    Args:
        path: The file, which must not exist.
        importance: By Hugging Face name, the mean of x squared for each column.
        metadata: The model's, whose ``model_type`` tells ggml's names.
        tokens: How many tokens were measured, at least one.
        datasets: Names of the texts that were run.
        chunk_size: Tokens of a chunk.

    llama.cpp divides the sums by the counts again, so a mean comes back within a rounding of float32. Raises CheckpointError
    for a tensor without a name in ggml and for values that are no mean squares, OutputError when the file cannot be written.
    """
    if not 1 <= tokens < 1 << 24:
        raise CheckpointError(f"an importance matrix counts 1 to {(1 << 24) - 1:,} tokens in float32, got {tokens:,}")
    architecture, blocks = _architecture(path, metadata), metadata.config["num_hidden_layers"]
    named = {}
    for name, values in importance.items():
        ggml_name = architecture.ggml_name(name, blocks)
        if ggml_name is None:
            raise CheckpointError(f"{path} cannot hold {name}: a {architecture.name} model has no such tensor in ggml")
        if not bool(((values >= 0) & torch.isfinite(values)).all()):
            raise CheckpointError(
                f"{path} cannot hold the importance of {name}: one is {_worst(values):g}, which is no mean square"
            )
        named[ggml_name] = values
    tensors: dict[str, Tensor] = {}
    for ggml_name, values in sorted(named.items()):
        tensors[ggml_name + SUMS] = values.float().view(1, -1) * tokens
        tensors[ggml_name + COUNTS] = torch.full((1, 1), float(tokens))
    keys = [
        text("general.type", "imatrix"),
        texts(DATASETS, list(datasets)),
        u32(CHUNKS, -(-tokens // chunk_size)),
        u32(CHUNK_SIZE, chunk_size),
    ]
    with staged(path) as temporary:
        target = TensorFile(temporary, keys, [Slot(name, TYPES["F32"], tuple(t.shape)) for name, t in tensors.items()])
        for name, values in tensors.items():
            target.put(name, values)


def _worst(values: Tensor) -> float:
    """Return the first value that is negative, NaN or infinite."""
    return float(values[~((values >= 0) & torch.isfinite(values))][0])


def _architecture(path: Path, metadata: Metadata) -> Architecture:
    kind = metadata.config.get("model_type")
    if kind not in BY_MODEL_TYPE:
        raise CheckpointError(
            f"{path} names tensors as llama.cpp does, and a {kind!r} model has no such names here; known are "
            f"{', '.join(BY_MODEL_TYPE)}"
        )
    return BY_MODEL_TYPE[kind]


def _read_gguf(header: Header) -> Imatrix:
    path, tensors = header.path, {info.name: info for info in header.tensors}
    importance, most = {}, 0
    with path.open("rb") as file:

        def values(info: TensorInfo) -> Tensor:
            if info.type.name != "F32":
                raise CheckpointError(f"{path}: {info.name} is {info.type.name}; an importance matrix is float32")
            file.seek(info.start)
            return torch.frombuffer(bytearray(file.read(info.nbytes)), dtype=torch.float32)

        for name, info in tensors.items():
            stem = name.removesuffix(SUMS).removesuffix(COUNTS)
            if stem == name or stem + SUMS not in tensors or stem + COUNTS not in tensors:
                raise CheckpointError(
                    f"{path}: {name} does not come with both {SUMS[1:]} and {COUNTS[1:]}; it is damaged"
                )
            if name.endswith(COUNTS):
                continue
            counts = values(tensors[stem + COUNTS])
            if len(counts) != 1:
                raise CheckpointError(
                    f"{path}: {stem} stacks {len(counts)} experts; this lowbit reads dense models only"
                )
            count = float(counts)
            if not 0 <= count < 2.0**53:
                raise CheckpointError(f"{path}: {name} is a sum over {count:g} tokens; the file is damaged")
            sums = values(info)
            importance[stem] = sums / count if count else torch.ones_like(sums)  # unseen: all columns alike
            most = max(most, int(count))
    if not importance:
        raise CheckpointError(f"{path} is an importance matrix without entries; make it again")
    datasets, chunk_size = header.keys.get(DATASETS, []), header.keys.get(CHUNK_SIZE, 0)
    return Imatrix(importance, most, tuple(map(str, datasets)), chunk_size if isinstance(chunk_size, int) else 0)


def _read_legacy(path: Path) -> Imatrix:
    data = path.read_bytes()
    position = 0

    def take(count: int, what: str) -> bytes:
        nonlocal position
        if not 0 <= count <= len(data) - position:
            raise CheckpointError(
                f"{path} is no importance matrix, or truncated: {what} at byte {position:,} does not fit"
            )
        position += count
        return data[position - count : position]

    def number(what: str) -> int:
        return int(struct.unpack("<i", take(4, what))[0])

    importance, most = {}, 0
    for index in range(number("the number of entries")):
        name = take(number("the length of a name"), f"the name of entry {index}").decode(errors="replace")
        calls, length = number(f"the calls of {name}"), number(f"the length of {name}")
        raw = take(4 * length, f"the values of {name}")
        if not raw or name in importance:
            raise CheckpointError(f"{path}: {name} is {'there twice' if raw else 'empty'}; the file is damaged")
        values = torch.frombuffer(bytearray(raw), dtype=torch.float32)
        importance[name] = values / calls if calls > 0 else values
        most = max(most, calls)
    if not importance:
        raise CheckpointError(f"{path} is an importance matrix without entries; make it again")
    if len(data) - position < 8:
        return Imatrix(importance, most)
    number("the number of chunks")
    dataset = take(number("the length of a dataset's name"), "the dataset's name").decode(errors="replace")
    return Imatrix(importance, most, (dataset,) if dataset else ())
