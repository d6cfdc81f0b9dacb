"""Importing is free: no torch for help texts, no work, and a clear sentence where the test kit lacks its tools."""

import subprocess
import sys

import pytest

import lowbit


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("module", ["lowbit", "lowbit.cli", "lowbit.scheme", "lowbit.errors", "lowbit.hookspecs"])
def test_light_modules_import_no_torch(module):
    found = run(f"import sys, {module}; print([m for m in ('torch', 'numpy', 'transformers') if m in sys.modules])")
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == "[]"


def test_every_public_name_exists():
    assert sorted(lowbit.__all__) == lowbit.__all__
    for name in lowbit.__all__:
        assert getattr(lowbit, name) is not None
    with pytest.raises(AttributeError, match="module 'lowbit' has no attribute 'nothing'"):
        lowbit.nothing  # noqa: B018  # the access is the test


@pytest.mark.parametrize("missing", ["pytest", "hypothesis"])
def test_the_kit_says_what_it_needs(missing):
    found = run(f"import sys; sys.modules[{missing!r}] = None; import lowbit.testing")
    assert found.returncode == 1
    last = found.stderr.strip().splitlines()[-1]
    assert f"lowbit.testing needs pytest and hypothesis, and {missing} is missing: pip install 'lowbit[test]'" in last
