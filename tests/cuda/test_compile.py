"""Every kernel compiles for every architecture, on a machine without a GPU."""

import pytest

pytest.importorskip("cuda.core", reason='cuda-core is not installed (pip install "lowbit[gpu]")')

import torch

from lowbit_cuda.arch import ARCHITECTURES, architecture, capability_of
from lowbit_cuda.decoder import AFFINE, CODEBOOK
from lowbit_cuda.errors import KernelBuildError
from lowbit_cuda.gemm import Dequantizer, GemmShape
from lowbit_cuda.gemv import SOURCE, GemvShape
from lowbit_cuda.outliers import outlier_program
from lowbit_cuda.program import KernelProgram, compile_text
from lowbit_cuda.scatter import scatter_program
from lowbit_cuda.units import UnitFormat

HALF, BF16, FLOAT = torch.float16, torch.bfloat16, torch.float32
PLAIN = [UnitFormat(decoder, 128) for decoder in (*AFFINE.values(), *CODEBOOK.values())]
OTHERS = [UnitFormat(AFFINE[4], 32, FLOAT, "MINIMUMS"), UnitFormat(AFFINE[3], 64, HALF, "ZEROS")]
SHAPES = [
    *(GemvShape(format, 4096, 4096) for format in PLAIN),
    *(GemvShape(format, 4096, 4096, 8, BF16, dependent=True) for format in OTHERS),
    GemvShape(PLAIN[0], 4096, 4096, 16),
    *(GemmShape(format, 4096, 4096, tokens) for tokens, format in zip((16, 32, 64), (PLAIN[1], *OTHERS), strict=True)),
    GemmShape(UnitFormat(CODEBOOK[4], 64), 4096, 4096, 32, BF16),
    *(shape(UnitFormat(AFFINE[4], 16, HALF, "ZEROS"), 4096, 4096, 8) for shape in (GemvShape, GemmShape)),
]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("LOWBIT_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "kernels"))


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    "shape", SHAPES, ids=lambda shape: f"{type(shape).__name__}-{shape.format.decoder.name}-{shape.width}"
)
def test_products_compile(shape, arch):
    capability = capability_of(arch)
    if shape.why_not(capability) is None:
        assert len(shape.program(capability).compile(arch).code) > 1000
    else:
        assert capability not in {(9, 0), (10, 0)}  # the others have too little shared memory for some


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [HALF, BF16, FLOAT])
@pytest.mark.parametrize("format", [*PLAIN[:2], *OTHERS, PLAIN[-1]], ids=lambda format: format.decoder.name)
def test_dequantize_compiles(format, dtype, arch):
    assert len(Dequantizer.program(format, dtype).compile(arch).code) > 1000


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_scattered_weights_and_outliers_compile(arch):
    programs = [
        scatter_program(UnitFormat(AFFINE[6], 16, FLOAT, "MINIMUMS"), BF16),
        scatter_program(UnitFormat(CODEBOOK[5], 64), FLOAT),
        outlier_program("lowbit_outlier_product", BF16, torch.int16, HALF),
        outlier_program("lowbit_outlier_add", FLOAT, torch.int32, FLOAT),
    ]
    for program in programs:
        assert len(program.compile(arch).code) > 1000


def test_the_cache_serves_the_same_bytes_and_notices_another_define(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWBIT_CACHE_DIR", str(tmp_path))
    program = SHAPES[0].program((9, 0))
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
