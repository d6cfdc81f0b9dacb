"""The kit is tested, too: every broken component in ``broken/`` must fail the named tests, every correct one none."""

from collections import defaultdict
from pathlib import Path

import pytest
from hypothesis import Phase, settings

from lowbit.testing.contracts import packer

BROKEN = Path(__file__).parent / "broken"
FILES = sorted(path for path in BROKEN.glob("*.py") if path.name != "toy_format.py")


class Outcomes:
    """A pytest plugin: remembers which tests of which class failed; of broken classes it runs only those that must."""

    def __init__(self):
        self.failed, self.passed, self.must_fail = defaultdict(dict), defaultdict(set), {}

    def pytest_collection_modifyitems(self, items):
        for item in items:
            self.must_fail[self._key(item.nodeid)] = item.cls.must_fail
        items[:] = [item for item in items if not item.cls.must_fail or item.originalname in item.cls.must_fail]

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.failed:
            name = report.nodeid.rpartition("::")[2].partition("[")[0]
            if report.failed:
                self.failed[self._key(report.nodeid)][name] = report.longreprtext
            else:
                self.passed[self._key(report.nodeid)].add(name)

    def _key(self, nodeid):
        path, name, *_ = nodeid.split("::")
        return f"{Path(path).stem}::{name}"


@pytest.fixture(scope="module")
def outcomes():
    found, steady = Outcomes(), packer.STEADY
    arguments = [*map(str, FILES), "-q", "--tb=no", "-p", "no:cacheprovider", "-o", "python_classes=Broken* Correct*"]
    with pytest.MonkeyPatch.context() as patch:
        # Shrinking the failures that are wanted here would take most of the time.
        patch.setattr(packer, "STEADY", settings(steady, phases=(Phase.generate,)))
        code = pytest.main([*arguments, "-o", f"pythonpath={BROKEN}"], plugins=[found])
    assert code == pytest.ExitCode.TESTS_FAILED
    return found


def classes(prefix):
    """Return ``file::Class`` for every contract class, read from the source so that collection stays cheap."""
    lines = ((path.stem, line) for path in FILES for line in path.read_text().splitlines())
    return [f"{stem}::{line[6:].partition('(')[0]}" for stem, line in lines if line.startswith(f"class {prefix}")]


@pytest.mark.parametrize("name", classes("Broken"))
def test_a_broken_component_fails(outcomes, name):
    assert outcomes.must_fail[name]
    assert outcomes.must_fail[name] <= outcomes.failed[name].keys()


@pytest.mark.parametrize("name", classes("Correct"))
def test_a_correct_component_passes(outcomes, name):
    assert outcomes.failed[name] == {}
    assert len(outcomes.passed[name]) >= 5
