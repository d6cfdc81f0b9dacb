"""Importers of the toy format: a correct one, and some that are each careless once."""

import json
import pickle

import pytest
import torch
from toy_format import ToyCheckpoint, ToyExporter, ToyImporter

from lowbit import Checkpoint, Metadata, SideFile
from lowbit.errors import LowbitError
from lowbit.testing import ImporterContract, Written, samples
from lowbit.testing.contracts.checks import entry_of
from lowbit_formats.plain import PlainPacker


class _Contract(ImporterContract):
    kind: type[ToyCheckpoint] = ToyCheckpoint
    must_fail: frozenset[str] = frozenset()

    @pytest.fixture
    def importer(self):
        return ToyImporter(self.kind)

    @pytest.fixture
    def written(self, tmp_path):
        values = {
            "model.norm.weight": torch.linspace(-1, 1, 40),
            "model.embed_tokens.weight": torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).bfloat16(),
            "model.layers.0.mlp.up_proj.weight": PlainPacker().pack(samples.quantized(*samples.REPRESENTATIVES[0])),
        }
        metadata = Metadata({"model_type": "toy"}, (SideFile("notes.txt", content=b"\1\2"),))
        path = tmp_path / "model.toy"
        entries = {name: entry_of(value) for name, value in values.items()}
        ToyExporter().write(path, entries, values.items(), metadata)
        return Written(path, values, metadata)


class CorrectImporter(_Contract):
    pass


class ReadsFloat32(ToyCheckpoint):
    def tensor(self, offset, spec):
        value = super().tensor(offset, spec)
        return value.float() if value.dtype is torch.bfloat16 else value


class BrokenReadsFloat32(_Contract):
    kind = ReadsFloat32
    must_fail = frozenset({"test_values_come_back_exactly"})


class ReadsOnce(ToyCheckpoint):
    """Gives its buffer away: the second reader finds zeros."""

    def tensor(self, offset, spec):
        value = super().tensor(offset, spec)
        self.data = self.data[:offset] + bytes(spec.nbytes) + self.data[offset + spec.nbytes :]
        return value


class BrokenReadsOnce(_Contract):
    kind = ReadsOnce
    must_fail = frozenset({"test_values_come_back_exactly"})


class SortsEntries(ToyCheckpoint):
    """Entries in the order of the alphabet, not of the file."""

    def __init__(self, path):
        super().__init__(path)
        self.by_file, self.entries = self.entries, dict(sorted(self.entries.items()))

    def read(self, name):
        shown, self.entries = self.entries, self.by_file
        value = super().read(name)
        self.entries = shown
        return value


class BrokenSortsEntries(_Contract):
    kind = SortsEntries
    must_fail = frozenset({"test_entries_are_known_before_data"})


class PadsWithZeros(ToyCheckpoint):
    """A truncated file reads as if zeros followed."""

    def check_size(self):
        self.data += bytes(sum(entry.nbytes for entry in self.entries.values()))


class BrokenPadsWithZeros(_Contract):
    kind = PadsWithZeros
    must_fail = frozenset({"test_truncated_files_are_refused"})


class TrustsItsHeader(ToyCheckpoint):
    """No checksum, and errors of its own arithmetic escape."""

    def header(self, document):
        return json.loads(document["header"])

    def check_size(self):
        assert len(self.data) == self.start + sum(entry.nbytes for entry in self.entries.values())


class BrokenTrustsItsHeader(_Contract):
    kind = TrustsItsHeader
    must_fail = frozenset({"test_truncated_files_are_refused"})


class BrokenCrashesOnDamage(_Contract):
    must_fail = frozenset({"test_corrupt_files_never_crash", "test_other_files_are_refused"})

    @pytest.fixture
    def importer(self):
        class Opens(ToyImporter):
            def open(self, path):
                return ToyCheckpoint(path)

        return Opens()


class AcceptsAnything(ToyCheckpoint):
    """What it cannot read is an empty checkpoint to it."""

    def __init__(self, path):
        try:
            super().__init__(path)
        except (LowbitError, LookupError, TypeError, ValueError):
            self.path, self.entries, self.metadata = path, {}, Metadata()


class BrokenAcceptsAnything(_Contract):
    kind = AcceptsAnything
    must_fail = frozenset({"test_other_files_are_refused"})


class PickledCheckpoint(Checkpoint):
    def __init__(self, path):
        file = path / "pytorch_model.bin" if path.is_dir() else path
        with file.open("rb") as stream:
            self.path, self.entries, self.metadata = path, pickle.load(stream), Metadata()

    def read(self, name):
        return self.entries[name]


class BrokenUnpickles(_Contract):
    must_fail = frozenset({"test_nothing_is_unpickled"})

    @pytest.fixture
    def importer(self):
        class Unpickles(ToyImporter):
            def why_not(self, path):
                return None

        return Unpickles(PickledCheckpoint)


class LosesSideFiles(ToyCheckpoint):
    def __init__(self, path):
        super().__init__(path)
        self.metadata = Metadata(self.metadata.config)


class BrokenLosesSideFiles(_Contract):
    kind = LosesSideFiles
    must_fail = frozenset({"test_metadata_comes_back"})


class Escapes(ToyCheckpoint):
    def __init__(self, path):
        super().__init__(path)
        escaping = SideFile("../../etc/motd", content=b"")
        self.metadata = Metadata(self.metadata.config, (*self.metadata.side_files, escaping))


class BrokenEscapes(_Contract):
    kind = Escapes
    must_fail = frozenset({"test_metadata_comes_back"})
