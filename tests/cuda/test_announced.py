"""What plugins announce to ``lowbit kernels`` compiles for every architecture, on a machine without a GPU.

``test_compile.py`` does the same, and more, for the kernels of ``lowbit_cuda`` itself.
"""

import pytest

pytest.importorskip("cuda.core", reason='cuda-core is not installed (pip install "lowbit[gpu]")')

from importlib.metadata import entry_points

from lowbit.compilers import programs
from lowbit_cuda.arch import ARCHITECTURES
from lowbit_cuda.program import INCLUDE


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_announced_program_compiles(arch, tmp_path_factory, monkeypatch):
    monkeypatch.setenv("LOWBIT_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "kernels"))
    announced = [program for program in programs(arch) if INCLUDE.parent not in program.source.parents]
    assert announced
    for program in announced:
        assert len(program.compile(arch).code) > 1000, program.name


def test_every_package_with_device_code_announces_it():
    sources = {program.source.name for program in programs("sm_90a")}
    folders = {program.source.parent for program in programs("sm_90a")}
    assert {path.name for folder in folders for path in folder.glob("*.cu")} == sources
    assert {"cuda", "kbit"} <= {entry.name for entry in entry_points(group="lowbit.programs")}


def test_names_tell_programs_apart():
    names = [program.name for program in programs("sm_90a")]
    assert len(names) == len(set(names))
