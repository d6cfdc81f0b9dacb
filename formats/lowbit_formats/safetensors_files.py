"""Safetensors files without a memory map: tensors are read and written one at a time, with one copy at most.

A mapped shard counts as resident memory as far as it was touched, so a conversion that maps its source seems to need the
whole of it. ``preadv`` into a fresh tensor and ``pwrite`` from one need nothing beside the tensor, and may run in several
threads on one file.
"""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path

import torch
from torch import Tensor

from lowbit import memory
from lowbit.errors import CheckpointError, OutputError
from lowbit.interfaces import DEFAULT_SHARD_SIZE
from lowbit.parts import TensorSpec
from lowbit.tensors import raw_bytes
from lowbit_formats.safetensors_header import (
    LENGTH_BYTES,
    MAX_HEADER,
    StoredTensor,
    build_header,
    parse_header,
)
from lowbit_formats.strict_json import dump

_LEAST_MAPPED = 1 << 16  # below, a mapping costs more than a copy
_WRITABLE = mmap.PROT_READ | mmap.PROT_WRITE
_POPULATE_READ = 22  # MADV_POPULATE_READ of Linux 5.14 and newer: read everything now
_CALL_BYTES = 1 << 30  # Linux moves at most 2 GiB less a page in one call


class SafetensorsReader(AbstractContextManager["SafetensorsReader"]):
    """An open file: ``tensors`` from its header, in the order of their bytes; ``read`` fetches one.

    Raises CheckpointError, naming the file and the tensor, for a file that is not a regular safetensors file to the byte.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = _open_regular(path)
        try:
            self._data_start, self.tensors = self._read_header()
        except BaseException:
            self.close()
            raise

    def read(self, name: str) -> Tensor:
        """Return one tensor. Raises CheckpointError when the file has become shorter since it was opened."""
        tensor = self.tensors[name]
        buffer = memory.empty((tensor.spec.nbytes,), torch.uint8)
        if self._fill(buffer.numpy().data, self._data_start + tensor.begin) < tensor.spec.nbytes:
            raise CheckpointError(f"{self.path} ends inside tensor {name!r}; it became shorter since it was opened")
        return buffer.view(tensor.spec.dtype).reshape(tensor.spec.shape)

    def map(self, name: str) -> Tensor:
        """Return what ``read`` returns, in pages of the file, private to this process: no copy until something writes to it.

        Small tensors, and those that the file or the system does not let be mapped, are read.
        """
        tensor = self.tensors[name]
        begin, size = self._data_start + tensor.begin, tensor.spec.nbytes
        inside = begin % mmap.ALLOCATIONGRANULARITY
        if size < _LEAST_MAPPED or inside % tensor.spec.dtype.itemsize or os.fstat(self._file).st_size < begin + size:
            return self.read(name)
        try:
            pages = mmap.mmap(self._file, inside + size, mmap.MAP_PRIVATE, _WRITABLE, offset=begin - inside)
        except (OSError, ValueError):  # no more mappings, a file system without them
            return self.read(name)
        with suppress(OSError):  # Linux before 5.14, macOS: pages come when they are touched
            pages.madvise(_POPULATE_READ)
        return (
            torch.frombuffer(pages, dtype=torch.uint8, offset=inside).view(tensor.spec.dtype).reshape(tensor.spec.shape)
        )

    def close(self) -> None:
        """Close the file; closing twice is allowed."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _read_header(self) -> tuple[int, dict[str, StoredTensor]]:
        file_bytes = os.fstat(self._file).st_size
        length = int.from_bytes(os.pread(self._file, LENGTH_BYTES, 0), "little")
        start = LENGTH_BYTES + length
        if file_bytes < LENGTH_BYTES:
            raise CheckpointError(f"{self.path} is truncated: it has {file_bytes} bytes, not even a header's length")
        if start > file_bytes:
            raise CheckpointError(
                f"{self.path} is truncated or no safetensors file: its header should take {length} bytes, the file has "
                f"{file_bytes}"
            )
        if length > MAX_HEADER:
            raise CheckpointError(f"{self.path} has a header of {length} bytes; at most {MAX_HEADER} are allowed")
        text = bytearray(length)
        self._fill(memoryview(text), LENGTH_BYTES)
        return start, parse_header(bytes(text), file_bytes - start, str(self.path))

    def _fill(self, target: memoryview, offset: int) -> int:
        """Read into ``target`` from ``offset`` of the file; return the bytes read, fewer only at the end of the file."""
        done = 0
        while done < len(target):
            try:
                count = os.preadv(self._file, [target[done : done + _CALL_BYTES]], offset + done)
            except OSError as error:
                raise CheckpointError(f"cannot read {self.path}: {error.strerror or error}") from error
            if count == 0:
                break
            done += count
        return done


class SafetensorsWriter:
    """A file whose header is written first, then its tensors in any order, each at its place."""

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec]) -> None:
        header, self._tensors = build_header(specs)
        if len(header) - LENGTH_BYTES > MAX_HEADER:
            raise OutputError(
                f"{path.name} would hold {len(specs)} tensors, too many for one header; use smaller shards"
            )
        self._data_start = len(header)
        self.pending = set(specs)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            self._put(memoryview(header), 0)
        except BaseException:
            self.close()
            raise

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one of the tensors; raises OutputError when it was written before, or is not what the header says."""
        if name not in self.pending:
            raise OutputError(f"tensor {name!r} came twice or was not announced")
        if (found := TensorSpec.of(tensor)) != (spec := self._tensors[name].spec):
            raise OutputError(
                f"tensor {name!r} was announced as {spec.dtype} {spec.shape}, but came as {found.dtype} {found.shape}"
            )
        self._put(raw_bytes(tensor.detach().cpu()).numpy().data, self._data_start + self._tensors[name].begin)
        self.pending.remove(name)

    def close(self) -> None:
        """Close the file; closing twice is allowed."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _put(self, source: memoryview, offset: int) -> None:
        done = 0
        while done < len(source):
            done += os.pwrite(self._file, source[done : done + _CALL_BYTES], offset + done)


class ShardedWriter(AbstractContextManager["ShardedWriter"]):
    """Writes ``stem.safetensors``, or ``stem-00001-of-0000N.safetensors`` with an index, as Hugging Face names them.

    Args:
        folder: Where the files go; it exists, and holds none of them.
        stem: What the names of the files begin with, such as ``model``.
        groups: The tensors in the order in which they will come; those of a group stay in one file.
        shard_size: Bytes of tensors in a file, exceeded only by a single group that is larger.

    A file is open from its first tensor to its last. ``finish`` raises OutputError when tensors are missing.
    """

    def __init__(
        self,
        folder: Path,
        stem: str,
        groups: Iterable[Mapping[str, TensorSpec]],
        shard_size: int = DEFAULT_SHARD_SIZE,
    ) -> None:
        self._folder, self._stem = folder, stem
        self._shards = plan_shards(groups, shard_size)
        count = len(self._shards)
        self._files = shard_names(stem, count)
        self._shard_of = {name: number for number, shard in enumerate(self._shards) for name in shard}
        self._writers: dict[int, SafetensorsWriter] = {}

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor; raises OutputError as ``SafetensorsWriter.write`` does."""
        if name not in self._shard_of:
            raise OutputError(f"tensor {name!r} was not announced")
        writer = self._writer(self._shard_of[name])
        writer.write(name, tensor)
        if not writer.pending:
            writer.close()

    def finish(self) -> None:
        """Check that every tensor came, and write the index when there is more than one file."""
        for number in range(len(self._shards)):
            if pending := self._writer(number).pending:
                missing = next(name for name in self._shards[number] if name in pending)
                raise OutputError(f"{len(pending)} announced tensors never came, the first is {missing!r}")
        if len(self._files) > 1:
            total = sum(spec.nbytes for shard in self._shards for spec in shard.values())
            weight_map = {name: self._files[number] for name, number in self._shard_of.items()}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (self._folder / f"{self._stem}.safetensors.index.json").write_bytes(dump(index))

    def __exit__(self, *exc_info: object) -> None:
        for writer in self._writers.values():
            writer.close()

    def _writer(self, number: int) -> SafetensorsWriter:
        if number not in self._writers:
            path = self._folder / self._files[number]
            self._writers[number] = SafetensorsWriter(path, self._shards[number])
        return self._writers[number]


def plan_shards(groups: Iterable[Mapping[str, TensorSpec]], shard_size: int) -> list[dict[str, TensorSpec]]:
    """Fill one file after the other with whole groups; there is at least one file, if an empty one."""
    shards: list[dict[str, TensorSpec]] = [{}]
    used = 0
    for group in groups:
        size = sum(spec.nbytes for spec in group.values())
        if shards[-1] and used + size > shard_size:
            shards.append({})
            used = 0
        shards[-1].update(group)
        used += size
    return shards


def shard_names(stem: str, count: int) -> list[str]:
    """Return the names of ``count`` files."""
    if count == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _open_regular(path: Path) -> int:
    """Open a regular file for reading; a pipe or a device would block or never end."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError(f"{path} is not a regular file; give a .safetensors file")
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
