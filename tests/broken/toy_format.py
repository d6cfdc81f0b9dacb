"""A complete format in one file: 8 bytes of header length, a JSON header with a checksum, and the tensors' bytes.

| length, little-endian | {"sha256": of what follows "header", "header": {...}} | bytes of every buffer, one after another |
"""

import hashlib
import json
import math

import torch

from lowbit import Checkpoint, Exporter, Importer, Metadata, PackedSpec, PackedTensor, Scheme, SideFile, TensorSpec
from lowbit.errors import CheckpointError, OutputError
from lowbit.staging import staged
from lowbit.testing.contracts.checks import entry_of


class ToyExporter(Exporter):
    format = "toy"
    layouts = None
    suffix = ".toy"

    def write(self, path, entries, stream, metadata, shard_size=0):
        with staged(path) as temporary, temporary.open("wb") as file:
            header = json.dumps(self.header(entries, metadata)).encode()
            document = json.dumps({"sha256": hashlib.sha256(header).hexdigest(), "header": header.decode()}).encode()
            file.write(len(document).to_bytes(8, "little") + document)
            written = []
            for name, value in self.ordered(stream):
                self.check(name, value, entries, len(written))
                written.append(name)
                for buffer in value.buffers.values() if isinstance(value, PackedTensor) else [value]:
                    file.write(self.data(buffer))
                del value
            self.finish(written, entries)

    def header(self, entries, metadata):
        return {
            "entries": {name: to_json(entry) for name, entry in entries.items()},
            "config": dict(metadata.config),
            "side_files": {file.name: file.read().hex() for file in metadata.side_files},
        }

    def ordered(self, stream):
        return stream

    def check(self, name, value, entries, position):
        if position >= len(entries) or list(entries)[position] != name:
            raise OutputError(f"{name} is not the tensor that was announced next")
        if entry_of(value) != entries[name]:
            raise OutputError(f"{name} is not what was announced")

    def data(self, buffer):
        return buffer.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

    def finish(self, written, entries):
        if len(written) != len(entries):
            raise OutputError("tensors are missing")


class ToyCheckpoint(Checkpoint):
    def __init__(self, path):
        self.path, self.data = path, path.read_bytes()
        length = int.from_bytes(self.data[:8], "little")
        self.start = 8 + length
        if len(self.data) < self.start:
            raise CheckpointError(f"{path} ends within its header")
        header = self.header(json.loads(self.data[8 : self.start]))
        self.entries = {name: from_json(entry) for name, entry in header["entries"].items()}
        self.check_size()
        files = tuple(SideFile(name, content=bytes.fromhex(text)) for name, text in header["side_files"].items())
        self.metadata = Metadata(header["config"], files)

    def header(self, document):
        if hashlib.sha256(document["header"].encode()).hexdigest() != document["sha256"]:
            raise CheckpointError(f"the header of {self.path} is damaged")
        return json.loads(document["header"])

    def check_size(self):
        if len(self.data) != self.start + sum(entry.nbytes for entry in self.entries.values()):
            raise CheckpointError(f"{self.path} does not have the bytes that its header announces")

    def read(self, name):
        names, entry = list(self.entries), self.entries[name]
        offset = self.start + sum(self.entries[other].nbytes for other in names[: names.index(name)])
        if isinstance(entry, TensorSpec):
            return self.tensor(offset, entry)
        buffers = {}
        for part, spec in entry.buffers.items():
            buffers[part] = self.tensor(offset, spec)
            offset += spec.nbytes
        return PackedTensor(entry, buffers)

    def tensor(self, offset, spec):
        if math.prod(spec.shape) == 0:
            return torch.empty(spec.shape, dtype=spec.dtype)
        raw = bytearray(self.data[offset : offset + spec.nbytes])
        return torch.frombuffer(raw, dtype=torch.uint8).view(spec.dtype).reshape(spec.shape)


class ToyImporter(Importer):
    format = "toy"

    def __init__(self, checkpoint=ToyCheckpoint):
        self.checkpoint = checkpoint

    def why_not(self, path):
        return None if path.is_file() and path.suffix == ".toy" else "is no .toy file"

    def open(self, path):
        try:
            return self.checkpoint(path)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{path} is no toy checkpoint: {type(error).__name__}") from error


def to_json(entry):
    if isinstance(entry, TensorSpec):
        return {"dtype": str(entry.dtype).removeprefix("torch."), "shape": entry.shape}
    buffers = {name: to_json(spec) for name, spec in entry.buffers.items()}
    return {"layout": entry.layout, "scheme": entry.scheme.to_json(), "shape": entry.shape, "buffers": buffers}


def from_json(entry):
    shape = tuple(entry["shape"])
    if "dtype" in entry:
        return TensorSpec(getattr(torch, entry["dtype"]), shape)
    buffers = {name: from_json(spec) for name, spec in entry["buffers"].items()}
    return PackedSpec(entry["layout"], Scheme.from_json(entry["scheme"]), shape, buffers)
