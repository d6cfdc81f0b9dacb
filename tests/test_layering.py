"""The house rules that a machine can check: who may import whom, who may name whom, and how long things may be."""

import ast
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import pytest

from lowbit.plugins import installed
from lowbit.scheme import Grid

ROOT = Path(__file__).parents[1]
PLUGINS = sorted(path.name for folder in (ROOT / "plugins").iterdir() for path in folder.glob("lowbit_*"))
PACKAGES = {
    "lowbit": ROOT / "core" / "lowbit",
    "lowbit_cuda": ROOT / "cuda" / "lowbit_cuda",
    "lowbit_formats": ROOT / "formats" / "lowbit_formats",
    **{name: ROOT / "plugins" / name.removeprefix("lowbit_") / name for name in PLUGINS},
}
MAY_IMPORT = {
    "lowbit": {"lowbit"},
    "lowbit_cuda": {"lowbit_cuda"},
    "lowbit_formats": {"lowbit_formats", "lowbit"},
    **{name: {name, "lowbit", "lowbit_cuda"} for name in PLUGINS},
}
BRIDGE = PACKAGES["lowbit_cuda"] / "plugin.py"
"""Where the kernels of the CUDA package become kernels of core: the one module of it that may import core."""
SOURCES = {name: sorted(folder.rglob("*.py")) for name, folder in PACKAGES.items()}
PRODUCT = sorted(itertools.chain(*SOURCES.values()))
TESTS = sorted(path for folder in ("tests", "bench", "plugins") for path in (ROOT / folder).rglob("*.py"))
EVERYTHING = sorted({*PRODUCT, *TESTS})
HINTS, DEFAULT_FORMAT = "INSTALL_HINTS", "native"


def tree(path):
    return ast.parse(path.read_text())


def imported(path) -> Iterator[str]:
    """Yield the top-level name of every import, also inside functions and ``if TYPE_CHECKING``."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            yield (node.module or "").partition(".")[0]


def strings(path) -> Iterator[tuple[int, str]]:
    """Yield the string constants of a module that are no docstrings, and not in the table of install hints."""
    skipped = set()
    for node in ast.walk(tree(path)):
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        if documented and node.body and isinstance(node.body[0], ast.Expr):
            skipped.add(id(node.body[0].value))
        if isinstance(node, ast.Assign) and any(getattr(target, "id", "") == HINTS for target in node.targets):
            skipped.update(id(child) for child in ast.walk(node))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
            yield node.lineno, node.value


def functions(path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.name, node.end_lineno - node.lineno + 1


def lines(path):
    return len(path.read_text().splitlines())


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_inward(package):
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in SOURCES[package]
        for name in imported(path)
        if name in PACKAGES and name not in MAY_IMPORT[package] and not (path == BRIDGE and name == "lowbit")
    ]
    assert SOURCES[package]
    assert wrong == []


@pytest.mark.parametrize("package", ["lowbit", "lowbit_cuda"])
def test_nothing_inward_names_a_package_further_out(package):
    """Not as a string either: modules of formats and plugins are found through entry points."""
    outer = re.compile(rf"\b({'|'.join(name for name in PACKAGES if name not in {*MAY_IMPORT[package], 'lowbit'})})\b")
    named = [
        f"{path.relative_to(ROOT)}:{line} names {value!r}"
        for path in SOURCES[package]
        for line, value in strings(path)
        if outer.search(value)
    ]
    assert named == []


def test_core_names_no_algorithm_layout_or_format():
    """Decisions in core are made on schemes; one table knows the names of plugins that may not be installed.

    Three exceptions: the default format has a name, ``doctor`` looks up distributions, one of which is called gguf, and a
    plugin may be named as the grid that it chooses codes for (binary).
    """
    registry = installed()
    tables = (registry.quantizers, registry.packers, registry.importers, registry.exporters)
    names = {name for table in tables for name in table} - {DEFAULT_FORMAT} - set(Grid)
    assert len(names) > 10
    named = [
        f"{path.relative_to(ROOT)}:{line} names {value!r}"
        for path in SOURCES["lowbit"]
        for line, value in strings(path)
        if value in names and path.name != "doctor.py"
    ]
    assert named == []


def test_no_file_is_long():
    long = {str(path.relative_to(ROOT)): lines(path) for path in EVERYTHING if lines(path) > 400}
    assert long == {}


def test_no_function_is_long():
    long = {f"{path.relative_to(ROOT)}:{name}": n for path in EVERYTHING for name, n in functions(path) if n > 80}
    assert long == {}


def test_most_files_and_functions_are_short():
    """The budget of the design: half of the files at about a hundred lines, half of the functions at about ten."""
    assert median(lines(path) for path in PRODUCT) <= 130
    assert median(n for path in PRODUCT for _, n in functions(path)) <= 10


def test_device_headers_are_short_and_know_no_torch():
    headers = [path for pattern in ("*.cuh", "*.cu") for path in ROOT.rglob(pattern) if ".venv" not in path.parts]
    for path in headers:
        text = path.read_text()
        assert lines(path) <= 300, path
        assert "torch/" not in text, path
        assert "ATen/" not in text, path


def test_test_files_have_unique_names_and_no_packages():
    """A failure that is reported by file name is found at once, and no import mode stumbles."""
    names = [path.name for path in TESTS if path.name.startswith("test_") and "bench" not in path.parts]
    assert sorted(names) == sorted(set(names))
    assert [path for path in TESTS if path.name == "__init__.py" and "tests" in path.parts] == []
