"""Loops in C: compiled once, kept, done without; and each that core has beside the torch expression that it stands in for."""

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.checksum import LANES, checksum
from lowbit.compiled import FLAGS, CLoops, cache_folder, compile_loops, why_not_compiled
from lowbit.proof import alike
from lowbit.repeated import repeated

ROOT = Path(__file__).parents[2]
SOURCE = "#include <stdint.h>\nint64_t add(const int32_t *of, int64_t count, double start) {\n    double sum = start;\n    for (int64_t i = 0; i < count; i++) sum += of[i];\n    return (int64_t)sum;\n}\n"
LOOPS = sorted(path for folder in ("core", "formats", "plugins") for path in (ROOT / folder).rglob("*.c"))
needs_compiler = pytest.mark.skipif(why_not_compiled() is not None, reason=str(why_not_compiled()))


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWBIT_CACHE_DIR", str(tmp_path / "cache"))
    path = tmp_path / "sum.c"
    path.write_text(SOURCE)
    return path


@needs_compiler
@pytest.mark.parametrize("path", LOOPS, ids=lambda path: path.stem)
def test_every_loop_compiles_without_a_warning(path, tmp_path):
    """With all warnings, and for a processor without vectors beyond the least."""
    compiler = next(name for name in ("cc", "gcc", "clang") if shutil.which(name))
    strict = ("-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-Wno-unknown-warning-option")
    for native in (("-march=native",), ()):
        command = [compiler, *FLAGS, *strict, *native, "-o", str(tmp_path / "loops.so"), str(path), "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


@needs_compiler
def test_a_loop_takes_addresses_integers_and_floats(source):
    loop = CLoops(source).find("add")
    assert loop(torch.arange(5, dtype=torch.int32), 5, 0.5) == 10
    assert loop(None, 0, 7.0) == 7


@needs_compiler
def test_a_library_is_compiled_once_and_again_when_its_source_changes(source):
    first = compile_loops(source, cache_folder())
    stamp = first.stat().st_mtime_ns
    assert compile_loops(source, cache_folder()) == first
    assert first.stat().st_mtime_ns == stamp
    source.write_text(SOURCE + "\n")
    assert compile_loops(source, cache_folder()) != first
    (source.parent / "included.h").write_text("")
    assert len({compile_loops(source, cache_folder()), first}) == 2
    assert {path.suffix for path in cache_folder().iterdir()} == {".so"}


def test_an_empty_compiler_means_none(source, monkeypatch):
    loops = CLoops(source)
    monkeypatch.setenv("LOWBIT_CC", "")
    assert loops.find("add") is None
    assert "LOWBIT_CC" in why_not_compiled()
    monkeypatch.setenv("LOWBIT_CC", "no-such-compiler")
    assert loops.find("add") is None
    assert "no-such-compiler" in why_not_compiled()


@needs_compiler
def test_loops_come_back_with_the_compiler(source, monkeypatch):
    loops = CLoops(source)
    monkeypatch.setenv("LOWBIT_CC", "")
    assert loops.find("add") is None
    monkeypatch.delenv("LOWBIT_CC")
    assert loops.find("add") is not None


def test_what_does_not_compile_is_done_without(source):
    source.write_text("this is no C\n")
    assert CLoops(source).find("add") is None


def test_a_folder_that_cannot_be_made_is_done_without(source, monkeypatch):
    (source.parent / "file").write_text("")
    monkeypatch.setenv("LOWBIT_CACHE_DIR", str(source.parent / "file"))
    assert CLoops(source).find("add") is None


@needs_compiler
def test_processes_that_compile_at_once_do_not_meet(source):
    code = f"""
        from pathlib import Path
        from lowbit.compiled import CLoops
        import torch
        print(CLoops(Path({str(source)!r})).find("add")(torch.ones(3, dtype=torch.int32), 3, 0.0))
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ, text=True) for _ in range(3)]
    assert [process.communicate()[0] for process in running] == ["3\n"] * 3


def both(monkeypatch, work):
    """Return what ``work`` gives with compiled loops and without."""
    compiled = work()
    monkeypatch.setenv("LOWBIT_CC", "")
    plain = work()
    monkeypatch.delenv("LOWBIT_CC")
    return compiled, plain


@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 5),
    st.integers(0, 9),
    st.integers(1, 9),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.int64]),
)
def test_values_are_repeated_as_torch_does(rows, groups, times, dtype):
    values = torch.randint(-99, 99, (rows, groups), generator=torch.Generator().manual_seed(7)).to(dtype)
    for given_values in (values, values.T.contiguous().T):
        assert torch.equal(repeated(given_values, times), values.repeat_interleave(times, dim=1))


@pytest.mark.parametrize("words", [0, 5, LANES, 3 * LANES + 17])
def test_a_checksum_is_the_same_with_and_without_loops(words, monkeypatch):
    value = torch.randint(-(2**31), 2**31, (words,), generator=torch.Generator().manual_seed(words)).int()
    compiled, plain = both(monkeypatch, lambda: checksum(value))
    assert compiled == plain
    if words:
        value[words // 2] ^= 1 << 30
        assert checksum(value) != plain


def test_alike_sees_every_byte():
    first = torch.arange(1000, dtype=torch.int32)
    for at in (0, 501, 999):
        second = first.clone()
        assert alike(first, second)
        second[at] ^= 1 << 24
        assert not alike(first, second)
        assert not alike(first.view(10, 100).T, second.view(10, 100).T)
    assert alike(first[:0], first[:0])
