"""Exporters of the toy format: a correct one, and some that each lose, reorder, keep or leave something."""

import pytest
from toy_format import ToyExporter, ToyImporter

from lowbit import Grid, Scheme
from lowbit.testing import ExporterContract
from lowbit_formats.plain import PlainPacker


class _Contract(ExporterContract):
    kind = ToyExporter
    must_fail: frozenset[str] = frozenset()

    @pytest.fixture
    def exporter(self):
        return self.kind()

    @pytest.fixture
    def importer(self):
        return ToyImporter()

    @pytest.fixture
    def packers(self):
        return [PlainPacker()]


class CorrectExporter(_Contract):
    pass


class LeavesAPartialFile(ToyExporter):
    """Writes the stream to a file of its own first, and forgets it when the stream breaks."""

    def write(self, path, entries, stream, metadata, shard_size=0):
        spool = path.with_suffix(".spool")

        def spooled():
            with spool.open("wb") as file:
                for name, value in stream:
                    file.write(name.encode())
                    yield name, value
            spool.unlink()

        super().write(path, entries, spooled(), metadata)


class BrokenLeavesAPartialFile(_Contract):
    kind = LeavesAPartialFile
    must_fail = frozenset({"test_a_broken_stream_leaves_nothing"})


class LosesATensor(ToyExporter):
    def header(self, entries, metadata):
        return super().header(dict(list(entries.items())[:-1]), metadata)


class BrokenLosesATensor(_Contract):
    kind = LosesATensor
    must_fail = frozenset({"test_reading_back_gives_what_was_written", "test_small_shards_read_back"})


class ReordersBytes(ToyExporter):
    """Big-endian, where the header says nothing of it."""

    def data(self, buffer):
        raw, size = super().data(buffer), buffer.dtype.itemsize
        return b"".join(raw[start : start + size][::-1] for start in range(0, len(raw), size))


class BrokenReordersBytes(_Contract):
    kind = ReordersBytes
    must_fail = frozenset({"test_reading_back_gives_what_was_written"})


class LosesSideFiles(ToyExporter):
    def header(self, entries, metadata):
        return {**super().header(entries, metadata), "side_files": {}}


class BrokenLosesSideFiles(_Contract):
    kind = LosesSideFiles
    must_fail = frozenset({"test_reading_back_gives_what_was_written"})


class Collects(ToyExporter):
    """Needs the memory of the whole model."""

    def ordered(self, stream):
        return list(stream)


class BrokenCollects(_Contract):
    kind = Collects
    must_fail = frozenset({"test_values_are_not_collected"})


class Overwrites(ToyExporter):
    def write(self, path, entries, stream, metadata, shard_size=0):
        if path.is_file():
            path.unlink()
        super().write(path, entries, stream, metadata)


class BrokenOverwrites(_Contract):
    kind = Overwrites
    must_fail = frozenset({"test_an_existing_destination_is_refused"})


class BelievesTheStream(ToyExporter):
    def check(self, name, value, entries, position):
        pass

    def finish(self, written, entries):
        pass


class BrokenBelievesTheStream(_Contract):
    kind = BelievesTheStream
    must_fail = frozenset({"test_a_stream_that_contradicts_its_entries_is_refused"})


class Scribbles(ToyExporter):
    def data(self, buffer):
        data = super().data(buffer)
        if buffer.is_floating_point():
            buffer.zero_()
        return data


class BrokenScribbles(_Contract):
    kind = Scribbles
    must_fail = frozenset({"test_inputs_are_left_alone"})


class RefusesItsVariant(ToyExporter):
    def why_not(self, scheme, shape):
        return "no"

    def variants(self):
        return {"q4": Scheme(Grid.AFFINE, 4, 32)}


class BrokenRefusesItsVariant(_Contract):
    kind = RefusesItsVariant
    must_fail = frozenset({"test_refusals_are_sentences"})


class LeavesAFileBeside(ToyExporter):
    def write(self, path, entries, stream, metadata, shard_size=0):
        super().write(path, entries, stream, metadata)
        path.with_suffix(".log").write_text("done")


class BrokenLeavesAFileBeside(_Contract):
    kind = LeavesAFileBeside
    must_fail = frozenset({"test_reading_back_gives_what_was_written"})
