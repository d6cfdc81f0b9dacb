"""One version everywhere, and an installation that is the one that pyproject.toml describes."""

import re
import sys
from importlib.metadata import distribution, entry_points
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import lowbit

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # comes with pytest and mypy on Python 3.10

ROOT = Path(__file__).parents[1]
DOCUMENT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = DOCUMENT["project"]
MEMBERS = {path.parent.name: path for path in sorted((ROOT / "plugins").glob("*/pyproject.toml"))}


def member(name):
    return tomllib.loads(MEMBERS[name].read_text())["project"]


def test_the_package_has_the_project_s_version():
    assert lowbit.__version__ == PROJECT["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", PROJECT["version"])


@pytest.mark.parametrize("name", MEMBERS)
def test_members_have_the_same_version_python_licence_and_group(name):
    project = member(name)
    assert project["name"] == f"lowbit-{name}"
    for key in ("version", "requires-python", "license"):
        assert project[key] == PROJECT[key]
    assert project["entry-points"]["lowbit"] == {name: f"lowbit_{name}"}


@pytest.mark.parametrize("name", MEMBERS)
def test_members_accept_this_minor_version_of_lowbit_and_no_other(name):
    major, minor, _ = PROJECT["version"].split(".")
    assert f"lowbit>={major}.{minor},<{major}.{int(minor) + 1}" in member(name)["dependencies"]


@pytest.mark.parametrize("name", MEMBERS)
def test_extras_pin_members_to_this_version(name):
    assert PROJECT["optional-dependencies"][name] == [f"lowbit-{name}=={PROJECT['version']}"]


def test_the_extra_all_is_all():
    (everything,) = PROJECT["optional-dependencies"]["all"]
    assert set(everything.removeprefix("lowbit[").removesuffix("]").split(",")) == set(MEMBERS)


def test_the_workspace_knows_every_member():
    assert set(DOCUMENT["tool"]["uv"]["sources"]) == {"lowbit", *(f"lowbit-{name}" for name in MEMBERS)}


@pytest.mark.parametrize("name", ["lowbit", *(f"lowbit-{name}" for name in MEMBERS)])
def test_the_installed_distributions_have_this_version(name):
    assert distribution(name).version == PROJECT["version"], "reinstall: make dev"


def test_installed_entry_points_are_those_of_pyproject():
    """Entry points are frozen at installation: a new one is invisible until then."""
    expected = dict(PROJECT["entry-points"]["lowbit"])
    for name in MEMBERS:
        expected |= member(name)["entry-points"]["lowbit"]
    ours = {"lowbit", *(f"lowbit-{name}" for name in MEMBERS)}
    found = {
        entry.name: entry.value for entry in entry_points(group="lowbit") if entry.dist and entry.dist.name in ours
    }
    assert found == expected, "reinstall: make dev"


def test_the_constraints_satisfy_the_requirements():
    """Every dependency that constraints.txt pins is pinned within its range."""
    lines = (line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    pinned = [Requirement(line) for line in lines if line]
    pins = {
        pin.name: str(pin.specifier).removeprefix("==") for pin in pinned if pin.marker is None or pin.marker.evaluate()
    }
    extras = (item for items in PROJECT["optional-dependencies"].values() for item in items)
    requirements = [Requirement(text) for text in (*PROJECT["dependencies"], *extras)]
    outside = [
        f"{requirement} but {pins[requirement.name]}"
        for requirement in requirements
        if requirement.name in pins and not requirement.specifier.contains(pins[requirement.name])
    ]
    assert {"torch", "numpy", "pytest"} <= pins.keys()
    assert outside == []
