"""The whole of ``convert`` on a small synthetic checkpoint: read, quantize, pack, write, reopen, compare."""

import checkpoints
import pytest

from lowbit.convert import convert
from lowbit.plan import Target
from lowbit.plugins import installed
from lowbit.recipe import Recipe, Rule

CASES = {
    "copy": (None, "native"),
    "kbit-int4-g64": (Rule("*", "kbit", {"bits": "4", "group_size": "64", "codebook": "int"}), "native"),
    "autoround-w4g128": (Rule("*", "autoround", {"bits": "4", "group_size": "128"}), "native"),
    "hf": (Rule("*", "autoround", {"bits": "4", "group_size": "128"}), "hf"),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench") / "source"
    checkpoints.write(folder, 60_000_000, shards=2, hidden=1024, intermediate=3072)
    return folder


@pytest.mark.benchmark(group="convert", min_rounds=3)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_convert(benchmark, tmp_path, source, case):
    rule, format = case
    registry = installed()

    def run():
        return convert(source, tmp_path / "out", Target(format), registry, Recipe(rule), overwrite=True)

    report = benchmark(run)
    benchmark.extra_info["source_bytes"] = report.plan.source_nbytes
    assert report.error.exact == (rule is None)
    assert report.error.relative < 0.15
