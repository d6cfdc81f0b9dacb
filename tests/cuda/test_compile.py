"""Every kernel compiles for every architecture, on a machine without a GPU."""

import pytest

pytest.importorskip("cuda.core", reason='cuda-core is not installed (pip install "lowbit[gpu]")')

import torch

from lowbit_cuda.arch import ARCHITECTURES, architecture, capability_of
from lowbit_cuda.errors import KernelBuildError
from lowbit_cuda.gemv import SOURCE, GemvShape
from lowbit_cuda.program import KernelProgram, compile_text
from lowbit_cuda.units import BITS

SHAPES = [GemvShape(bits, 128, False, 4096, 4096) for bits in BITS] + [
    GemvShape(4, 32, True, 4096, 4096, tokens=8, dtype=torch.bfloat16),
    GemvShape(3, 64, True, 8192, 1024, dependent=True),
]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("LOWBIT_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "kernels"))


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape.bits}bit-g{shape.group_size}-{shape.tokens}")
def test_gemv_compiles(shape, arch):
    assert len(shape.program().compile(arch).code) > 1000


def test_the_cache_serves_the_same_bytes_and_notices_another_define(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWBIT_CACHE_DIR", str(tmp_path))
    program = SHAPES[0].program()
    first = bytes(program.compile("sm_90a").code)
    (cached,) = [path for path in tmp_path.rglob("*") if path.is_file() and path.read_bytes() == first]
    assert bytes(program.compile("sm_90a").code) == first
    assert cached.exists()
    other = KernelProgram(SOURCE, program.entry, {**program.defines, "LOWBIT_STAGES": 2})
    assert bytes(other.compile("sm_90a").code) != first


def test_a_kernel_that_does_not_compile_says_why():
    with pytest.raises(KernelBuildError, match=r"gemv.cu:broken does not compile for sm_80(?s:.*)identifier"):
        compile_text("__global__ void broken() { undefined(); }", KernelProgram(SOURCE, "broken"), "sm_80")


def test_architecture_names():
    assert [architecture(capability_of(arch)) for arch in ARCHITECTURES] == list(ARCHITECTURES)
    assert architecture((8, 7)) == "sm_87"
