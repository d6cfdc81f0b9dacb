"""The decoder of cuda/README.md, taken from the page: it compiles everywhere, and on a GPU it multiplies."""

import re
from pathlib import Path

import pytest

pytest.importorskip("cuda.core", reason='cuda-core is not installed (pip install "lowbit[gpu]")')

import torch

from lowbit_cuda.arch import ARCHITECTURES, capability_of
from lowbit_cuda.gemm import Dequantizer, GemmShape
from lowbit_cuda.gemv import Gemv, GemvShape
from lowbit_cuda.units import pack_units

PAGE = (Path(__file__).parents[2] / "cuda" / "README.md").read_text()
HEADER, DECODER, PRODUCT = (text for _, text in re.findall(r"```(cpp|python)\n(.*?)```", PAGE, re.DOTALL))
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
ENTRIES = torch.tensor([*E2M1, *(-value for value in E2M1)])


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decoder")
    (folder / "fp4.cuh").write_text(HEADER)
    found = {"FOLDER": folder, "torch": torch}
    exec(DECODER, found)  # noqa: S102  # our own page
    return found


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_decoder_of_the_page_compiles(names, arch, tmp_path, monkeypatch):
    monkeypatch.setenv("LOWBIT_CACHE_DIR", str(tmp_path))
    format, capability = names["FORMAT"], capability_of(arch)
    shapes = [GemvShape(format, 512, 96, 3), GemmShape(format, 512, 96, 32)]
    built = [shape.program(capability) for shape in shapes if shape.why_not(capability) is None]
    assert built
    for program in (*built, Dequantizer.program(format, torch.float16)):
        assert len(program.compile(arch).code) > 1000


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_the_decoder_of_the_page_multiplies(names):
    codes = torch.randint(16, (96, 512), dtype=torch.uint8, device="cuda")
    scales = torch.rand(96, 16, device="cuda")
    x, out = torch.randn(3, 512, device="cuda").half(), torch.empty(3, 96, device="cuda").half()
    exec(PRODUCT, {**names, **globals(), "codes": codes, "scales": scales, "x": x, "out": out, "Gemv": Gemv})  # noqa: S102
    entries = ENTRIES.cuda()
    weight = entries[codes.long()] * scales.repeat_interleave(32, 1)
    expected = x.double() @ weight.double().T
    assert float((out - expected).norm() / expected.norm()) < 2.0**-10
    dense = torch.empty(96, 512, device="cuda")
    Dequantizer(names["FORMAT"], torch.float32)(pack_units(names["FORMAT"], codes, scales), dense, codebook=entries)
    assert torch.equal(dense, weight)
