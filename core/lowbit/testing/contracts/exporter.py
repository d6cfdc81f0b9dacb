"""``ExporterContract``: reading back gives what was written, and what cannot be finished leaves nothing behind."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lowbit.errors import LowbitError, OutputError
from lowbit.interfaces import Entry, Exporter, Importer, Packer, Value
from lowbit.metadata import Metadata, SideFile
from lowbit.parts import TensorSpec
from lowbit.tensors import PackedTensor
from lowbit.testing import samples, weights
from lowbit.testing.contracts.checks import (
    assert_metadata,
    assert_same_value,
    assert_sentence,
    entry_of,
    override,
)


class ExporterContract:
    """Subclass it, and override ``exporter`` and ``importer``, and ``packers`` when the format stores packed weights.

    An exporter promises: reading back gives the same names in the same order, the same schemes, layouts and bytes, config
    and side files; the destination is complete, or does not exist and nothing lies beside it, whatever the stream raises; an
    existing destination is refused with OutputError, untouched; a stream that contradicts ``entries`` is refused; and no
    more than two values are alive at a time.
    """

    @pytest.fixture
    def exporter(self) -> Exporter:
        """Override: an instance of the exporter."""
        override("ExporterContract", "exporter", "an instance of your Exporter")

    @pytest.fixture
    def importer(self) -> Importer:
        """Override: the importer that reads what the exporter writes."""
        override("ExporterContract", "importer", "the Importer that reads what your Exporter writes")

    @pytest.fixture
    def packers(self) -> Sequence[Packer]:
        """Packers of layouts that the format stores; needed unless ``layouts`` is ()."""
        return ()

    @pytest.fixture
    def metadata(self) -> Metadata:
        """What travels with the weights, and must come back."""
        config = {"model_type": "llama", "hidden_size": 64, "rope_theta": 10000.0, "tie_word_embeddings": False}
        side_files = (
            SideFile("tokenizer.json", content=b'{"version": "1.0"}'),
            SideFile("notes.txt", content=b"\0\xff"),
        )
        return Metadata(config, side_files, {"source": "a test"})

    @pytest.fixture
    def values(self, exporter: Exporter, packers: Sequence[Packer]) -> Mapping[str, Value]:
        """At least four tensors in file order: plain ones of several dtypes, and every packed scheme that the format holds."""
        plain: dict[str, Value] = {
            "model.embed_tokens.weight": weights.gaussian((40, 64), 0, torch.bfloat16),
            "model.layers.0.input_layernorm.weight": weights.gaussian((1, 64), 1)[0],
            "model.layers.0.self_attn.q_proj.weight": weights.gaussian((64, 64), 2, torch.float16),
            "model.norm.weight": torch.ones(64),
        }
        stored = {name: stored_as(exporter, name, value) for name, value in plain.items()}
        return {**stored, **packed_values(exporter, packers)}

    def test_the_format_has_a_name_and_perhaps_a_suffix(self, exporter: Exporter) -> None:
        """The name is typed on command lines; a suffix starts with a dot."""
        assert exporter.format == exporter.format.strip().lower() != ""
        assert exporter.suffix == "" or exporter.suffix.startswith(".")

    def test_reading_back_gives_what_was_written(
        self, exporter: Exporter, importer: Importer, values: Mapping[str, Value], metadata: Metadata, tmp_path: Path
    ) -> None:
        """Names, order, schemes, layouts and bytes, config and side files."""
        path = tmp_path / f"out{exporter.suffix}"
        _write(exporter, path, values, metadata)
        assert importer.why_not(path) is None
        with importer.open(path) as checkpoint:
            assert list(checkpoint.entries) == list(values)
            assert dict(checkpoint.entries) == _entries(values)
            for name, value in values.items():
                assert_same_value(checkpoint.read(name), value, name)
            assert_metadata(checkpoint.metadata, metadata)
        assert [found.name for found in tmp_path.iterdir()] == [path.name], "something was left beside the destination"

    def test_small_shards_read_back(
        self, exporter: Exporter, importer: Importer, values: Mapping[str, Value], metadata: Metadata, tmp_path: Path
    ) -> None:
        """A shard size below most tensors splits a format that can be split, and changes nothing that is read."""
        path = tmp_path / f"out{exporter.suffix}"
        exporter.write(path, _entries(values), iter(values.items()), metadata, 5000)
        with importer.open(path) as checkpoint:
            assert dict(checkpoint.entries) == _entries(values)
            for name, value in values.items():
                assert_same_value(checkpoint.read(name), value, name)

    def test_values_are_not_collected(
        self, exporter: Exporter, values: Mapping[str, Value], metadata: Metadata, tmp_path: Path
    ) -> None:
        """When the stream is asked for the next value, at most one earlier one is still alive."""
        alive: list[weakref.ref[torch.Tensor]] = []

        def stream() -> Iterator[tuple[str, Value]]:
            for name, value in values.items():
                assert _count(alive) <= 1, "the exporter keeps values"
                copy = _copy(value)
                alive.append(weakref.ref(_first_tensor(copy)))
                yield name, copy
                del copy

        exporter.write(tmp_path / f"out{exporter.suffix}", _entries(values), stream(), metadata)

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
    @pytest.mark.parametrize("after", ["nothing", "one", "all"])
    def test_a_broken_stream_leaves_nothing(
        self,
        exporter: Exporter,
        values: Mapping[str, Value],
        metadata: Metadata,
        tmp_path: Path,
        error: type[BaseException],
        after: str,
    ) -> None:
        """Whatever the stream raises, and whenever: no destination, no temporary file."""
        count = {"nothing": 0, "one": 1, "all": len(values)}[after]

        def stream() -> Iterator[tuple[str, Value]]:
            yield from list(values.items())[:count]
            raise error("stop")

        raised = (OSError, OutputError) if error is OSError else error  # an OSError may become a sentence
        with pytest.raises(raised):
            exporter.write(tmp_path / f"out{exporter.suffix}", _entries(values), stream(), metadata)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("existing", ["file", "folder"])
    def test_an_existing_destination_is_refused(
        self, exporter: Exporter, values: Mapping[str, Value], metadata: Metadata, tmp_path: Path, existing: str
    ) -> None:
        """OutputError with a sentence, and what was there stays as it was."""
        path = tmp_path / f"out{exporter.suffix}"
        precious = path if existing == "file" else path / "precious"
        precious.parent.mkdir(exist_ok=True)
        precious.write_text("mine")
        with pytest.raises(OutputError) as raised:
            _write(exporter, path, values, metadata)
        assert_sentence(str(raised.value))
        assert precious.read_text() == "mine"
        assert [found.name for found in tmp_path.iterdir()] == [path.name]

    @pytest.mark.parametrize("fault", ["dtype", "shape", "missing", "unknown", "swapped"])
    def test_a_stream_that_contradicts_its_entries_is_refused(
        self, exporter: Exporter, values: Mapping[str, Value], metadata: Metadata, tmp_path: Path, fault: str
    ) -> None:
        """A value of another dtype or shape, one too few, an unknown name, two in the wrong order: nothing is written."""
        stream = FAULTS[fault](list(values.items()))
        with pytest.raises(LowbitError) as raised:
            exporter.write(tmp_path / f"out{exporter.suffix}", _entries(values), iter(stream), metadata)
        assert_sentence(str(raised.value))
        assert list(tmp_path.iterdir()) == []

    def test_inputs_are_left_alone(
        self, exporter: Exporter, values: Mapping[str, Value], metadata: Metadata, tmp_path: Path
    ) -> None:
        """Neither values nor entries change while they are written."""
        kept, entries = {name: _copy(value) for name, value in values.items()}, _entries(values)
        exporter.write(tmp_path / f"out{exporter.suffix}", entries, iter(values.items()), metadata)
        assert entries == _entries(kept)
        for name, value in values.items():
            assert_same_value(value, kept[name], name)

    def test_refusals_are_sentences(self, exporter: Exporter) -> None:
        """``why_not`` answers for the whole vocabulary; the format's own variants are accepted for a friendly shape."""
        for scheme, shape in samples.REPRESENTATIVES:
            if (reason := exporter.why_not(scheme, shape)) is not None:
                assert_sentence(reason)
        for name, scheme in exporter.variants().items():
            assert exporter.why_not(scheme, (256, 4096)) is None, f"the variant {name} is refused"


def stored_as(exporter: Exporter, name: str, value: Value) -> Value:
    """Return an unquantized tensor as the format stores it, which ``Exporter.plain`` announces."""
    assert isinstance(value, torch.Tensor)
    return value.to(exporter.plain(name, TensorSpec.of(value)).dtype)


def packed_values(exporter: Exporter, packers: Sequence[Packer]) -> dict[str, Value]:
    """Return packed weights of every variant and every representative scheme that a packer and the format accept."""
    wanted = [(scheme, (16, 256)) for scheme in exporter.variants().values()] + list(samples.REPRESENTATIVES)
    found: list[PackedTensor] = []
    for packer in packers:
        accepted = [
            (scheme, shape)
            for scheme, shape in wanted
            if exporter.why_not(scheme, shape) is None and packer.why_not(scheme, shape) is None
        ]
        found += [packer.pack(samples.quantized(scheme, shape, len(found))) for scheme, shape in accepted]
    return {f"model.layers.{layer}.mlp.up_proj.weight": value for layer, value in enumerate(found)}


Stream = list[tuple[str, Value]]


def _wrong_dtype(stream: Stream) -> Stream:
    (name, value), *rest = stream
    return [(name, _plain(value).double()), *rest]


def _wrong_shape(stream: Stream) -> Stream:
    (name, value), *rest = stream
    return [(name, _plain(value)[..., :-1].contiguous()), *rest]


FAULTS: Mapping[str, Callable[[Stream], Iterable[tuple[str, Value]]]] = {
    "dtype": _wrong_dtype,
    "shape": _wrong_shape,
    "missing": lambda stream: stream[:-1],
    "unknown": lambda stream: [*stream, ("model.extra.weight", torch.ones(3))],
    "swapped": lambda stream: [stream[1], stream[0], *stream[2:]],
}


def _plain(value: Value) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else _first_tensor(value)


def _count(references: Sequence[weakref.ref[torch.Tensor]]) -> int:
    """Return how many are alive; cycles are collected only where that could matter, because it is slow."""
    if sum(reference() is not None for reference in references) > 1:
        gc.collect()
    return sum(reference() is not None for reference in references)


def _entries(values: Mapping[str, Value]) -> dict[str, Entry]:
    return {name: entry_of(value) for name, value in values.items()}


def _write(exporter: Exporter, path: Path, values: Mapping[str, Value], metadata: Metadata) -> None:
    exporter.write(path, _entries(values), iter(values.items()), metadata)


def _copy(value: Value) -> Value:
    if isinstance(value, torch.Tensor):
        return value.clone()
    return replace(value, buffers={name: buffer.clone() for name, buffer in value.buffers.items()})


def _first_tensor(value: Value) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else next(iter(value.buffers.values()))
