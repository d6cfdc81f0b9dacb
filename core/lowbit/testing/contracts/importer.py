"""``ImporterContract``: headers first, exact values, and a clear refusal of everything malformed."""

from __future__ import annotations

import os
import pickle
import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from lowbit.errors import CheckpointError
from lowbit.interfaces import Checkpoint, Importer, Value
from lowbit.metadata import Metadata
from lowbit.testing.contracts.checks import assert_metadata, assert_same_value, assert_sentence, entry_of, override


@dataclass(frozen=True, slots=True)
class Written:
    """A checkpoint that a test wrote: where it is, and what must come back in this order.

    ``metadata`` None leaves the metadata unchecked.
    """

    path: Path
    values: Mapping[str, Value]
    metadata: Metadata | None = field(default=None)


class ImporterContract:
    """Subclass it, and override ``importer`` and ``written``.

    An importer promises: names, shapes and dtypes are known when ``open`` returns, in the order of the file; ``read`` gives
    exactly the bytes, in any order, as often as asked; ``why_not`` never raises; anything truncated or malformed raises
    CheckpointError with a sentence, when it is opened or read, and never returns a value that does not fit its entry; and
    nothing is ever unpickled.
    """

    @pytest.fixture
    def importer(self) -> Importer:
        """Override: an instance of the importer."""
        override("ImporterContract", "importer", "an instance of your Importer")

    @pytest.fixture
    def written(self, tmp_path: Path) -> Written:
        """Override: write a small checkpoint below ``tmp_path`` and say what must come back."""
        override("ImporterContract", "written", "a lowbit.testing.Written")

    def test_its_own_files_are_recognised(self, importer: Importer, written: Written) -> None:
        """``why_not`` says None."""
        assert importer.why_not(written.path) is None

    def test_entries_are_known_before_data(self, importer: Importer, written: Written) -> None:
        """Every name, in the order of the file, with the dtype and shape or the packed spec of its value."""
        with importer.open(written.path) as checkpoint:
            assert dict(checkpoint.entries) == {name: entry_of(value) for name, value in written.values.items()}
            assert list(checkpoint.entries) == list(written.values)

    def test_values_come_back_exactly(self, importer: Importer, written: Written) -> None:
        """In file order, in reverse order and twice: the same bits."""
        with importer.open(written.path) as checkpoint:
            streamed = dict(checkpoint.stream())
            assert list(streamed) == list(written.values)
            for name in reversed(list(written.values)):
                assert_same_value(streamed[name], written.values[name], name)
                assert_same_value(checkpoint.read(name), written.values[name], f"{name}, read again")

    def test_metadata_comes_back(self, importer: Importer, written: Written) -> None:
        """The config and the side files; their names stay inside the checkpoint."""
        with importer.open(written.path) as checkpoint:
            for file in checkpoint.metadata.side_files:
                assert not Path(file.name).is_absolute()
                assert ".." not in Path(file.name).parts
            if written.metadata is not None:
                assert_metadata(checkpoint.metadata, written.metadata)

    def test_truncated_files_are_refused(self, importer: Importer, written: Written, tmp_path: Path) -> None:
        """Cut anywhere, a file raises CheckpointError; only bytes that carry nothing, such as padding, may be missing."""
        for file in _weight_files(written):
            size = len(_read(written, file))
            for length in sorted({0, 1, 7, 8, 9, size // 16, size // 4, size // 2, size - 65, size - 9, size - 1}):
                if 0 <= length < size:
                    damaged = _damaged(written, tmp_path, file, lambda data, end=length: data[:end])  # type: ignore[misc]
                    values = _read_all(importer, damaged, f"{file.name} cut to {length} of {size} bytes")
                    if values is not None:
                        assert values.keys() == written.values.keys()
                        for name, value in written.values.items():
                            assert_same_value(values[name], value, f"{name} of {file.name} cut to {length} bytes")

    def test_corrupt_files_never_crash(self, importer: Importer, written: Written, tmp_path: Path) -> None:
        """Random damage to the first bytes raises CheckpointError, or leaves a checkpoint whose values fit its entries."""
        source = random.Random(0)
        for file in _weight_files(written):
            for _ in range(24):
                start, patch = source.randrange(256), source.randbytes(source.choice((1, 2, 8)))
                damaged = _damaged(written, tmp_path, file, lambda data: _patched(data, start, patch))  # noqa: B023
                _read_all(importer, damaged, f"{file.name} with {patch!r} at {start}")

    def test_other_files_are_refused(self, importer: Importer, tmp_path: Path, written: Written) -> None:
        """Under the name of the real thing: nothing, text, JSON, a length and JSON, random bytes, and an empty folder."""
        prefixed = b'{"a": 1}'
        prefixed = len(prefixed).to_bytes(8, "little") + prefixed
        contents = (b"", b"hello\n", b"{}", prefixed, random.Random(0).randbytes(4096))
        paths = [tmp_path / "strange" / str(number) / written.path.name for number in range(len(contents) + 1)]
        for path, content in zip(paths, contents, strict=False):
            path.parent.mkdir(parents=True)
            path.write_bytes(content)
        paths[-1].mkdir(parents=True)
        for path in paths:
            assert _read_all(importer, path, f"{path} with foreign content") is None, f"{path} was read"

    def test_nothing_is_unpickled(self, importer: Importer, tmp_path: Path) -> None:
        """A folder with only a ``.bin``, and pickles under other names: refused, and their code does not run."""
        canary = tmp_path / "canary"
        folder = tmp_path / "pickled"
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        names = ("pytorch_model.bin", "model.safetensors", "model.gguf")
        for name in names:
            (folder / name).write_bytes(pickle.dumps(_Touch(str(canary))))
        assert _read_all(importer, folder, "a folder of pickles") is None
        for name in names:
            assert _read_all(importer, folder / name, f"a pickle named {name}") is None
        for name in names[1:]:
            (folder / name).unlink()
        assert _read_all(importer, folder, "a folder with only a .bin") is None
        assert not canary.exists(), "the importer executed a pickle"


class _Touch:
    """Unpickling it creates a folder: proof that code from a checkpoint ran."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (self.path,)


def _read_all(importer: Importer, path: Path, what: str) -> dict[str, Value] | None:
    """Return every value, or None when the importer refuses the path properly; each value must fit its entry."""
    if (reason := importer.why_not(path)) is not None:
        assert_sentence(reason)
        return None
    try:
        with importer.open(path) as checkpoint:
            return _fitting(checkpoint)
    except CheckpointError as error:
        assert_sentence(str(error))
        return None
    except (AssertionError, MemoryError):
        raise
    except Exception as error:
        raise AssertionError(f"{what} raised {type(error).__name__}: {error}; it must be a CheckpointError") from error


def _fitting(checkpoint: Checkpoint) -> dict[str, Value]:
    values = dict(checkpoint.stream())
    for name, value in values.items():
        assert entry_of(value) == checkpoint.entries[name], f"{name} does not fit its entry"
    return values


def _weight_files(written: Written) -> list[Path]:
    """Return every file but the side files, which carry no weights, relative to the checkpoint."""
    if written.path.is_file():
        return [Path(written.path.name)]
    known = {file.name for file in written.metadata.side_files} if written.metadata else set()
    files = (path.relative_to(written.path) for path in sorted(written.path.rglob("*")) if path.is_file())
    return [file for file in files if file.as_posix() not in known]


def _read(written: Written, file: Path) -> bytes:
    return (written.path if written.path.is_file() else written.path / file).read_bytes()


def _damaged(written: Written, tmp_path: Path, file: Path, change: Callable[[bytes], bytes]) -> Path:
    """Return the path of a copy of the checkpoint with one file changed."""
    folder = tmp_path / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    copy = folder / written.path.name
    if written.path.is_file():
        folder.mkdir()
        target = copy
    else:
        shutil.copytree(written.path, copy)
        target = copy / file
    target.write_bytes(change(_read(written, file)))
    return copy


def _patched(data: bytes, start: int, patch: bytes) -> bytes:
    return data[:start] + patch + data[start + len(patch) :] if start + len(patch) <= len(data) else data
