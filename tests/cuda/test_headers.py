"""The shared headers on which plugins build: each through a small kernel, compiled everywhere and compared with plain torch on a GPU."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("cuda.core", reason='cuda-core is not installed (pip install "lowbit[gpu]")')

import torch

from lowbit.grids import hadamard
from lowbit_cuda.arch import ARCHITECTURES, capability_of
from lowbit_cuda.loaded import load
from lowbit_cuda.program import KernelProgram

SOURCE = Path(__file__).parent / "headers.cu"
USUAL = {"WIDE": 1, "SIGNED_A": "true", "SIGNED_B": "true", "VALUES": 4, "WARPS": 4, "LANES": 8}
ENTRIES = ("product_f16", "matrices", "hadamard", "reductions")
WIDE_ENTRIES = ("product_bf16", "product_int8")
gpu = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


def on_gpu(function):
    for mark in gpu:
        function = mark(function)
    return function


def kernel(entry, **defines):
    names = {f"TEST_{name}": value for name, value in {**USUAL, **defines}.items()}
    return load(KernelProgram(SOURCE, entry, names), torch.cuda.current_device())


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_headers_compile(arch, tmp_path_factory, monkeypatch):
    monkeypatch.setenv("LOWBIT_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "kernels"))
    wide = capability_of(arch) >= (8, 0)
    names = {f"TEST_{name}": value for name, value in {**USUAL, "WIDE": int(wide)}.items()}
    program = KernelProgram(SOURCE, ENTRIES[0], names)
    code = bytes(program.compile(arch).code)
    for entry in (*ENTRIES, *(WIDE_ENTRIES if wide else ())):
        assert entry.encode() in code


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_of_16_bits(dtype):
    if dtype is torch.bfloat16 and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("bf16 tensor cores need sm_80")
    a, b = torch.randn(16, 16, device="cuda").to(dtype), torch.randn(8, 16, device="cuda").to(dtype)
    c = torch.empty(16, 8, device="cuda")
    kernel("product_f16" if dtype is torch.float16 else "product_bf16")(1, 32, a, b, c)
    torch.testing.assert_close(c.double(), a.double() @ b.double().T, rtol=0, atol=2.0**-18)


@on_gpu
@pytest.mark.parametrize("a_dtype", [torch.int8, torch.uint8])
@pytest.mark.parametrize("b_dtype", [torch.int8, torch.uint8])
def test_products_of_8_bits_are_exact(a_dtype, b_dtype):
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("m16n8k32 needs sm_80")
    a, b = (
        torch.randint(-128 if dtype is torch.int8 else 0, 128 if dtype is torch.int8 else 256, (rows, 32))
        .to(dtype)
        .cuda()
        for rows, dtype in ((16, a_dtype), (8, b_dtype))
    )
    c = torch.empty(16, 8, device="cuda", dtype=torch.int32)
    signs = {"SIGNED_A": str(a_dtype is torch.int8).lower(), "SIGNED_B": str(b_dtype is torch.int8).lower()}
    kernel("product_int8", **signs)(1, 32, a, b, c)
    assert torch.equal(c.cpu().long(), a.cpu().long() @ b.cpu().long().T)


@on_gpu
def test_matrices_come_in_the_order_of_fragments():
    tile = torch.randn(16, 16, device="cuda").half()
    plain, transposed = torch.empty(2, 32, 8, device="cuda", dtype=torch.float16)
    kernel("matrices")(1, 32, tile, plain, transposed)
    lane = torch.arange(32, device="cuda")
    row, column = lane // 4, 2 * (lane % 4)
    for register, (down, right) in enumerate(((0, 0), (8, 0), (0, 8), (8, 8))):
        for half in range(2):
            assert torch.equal(plain[:, 2 * register + half], tile[row + down, column + half + right])
            assert torch.equal(transposed[:, 2 * register + half], tile[column + half + down, row + right])


@on_gpu
@pytest.mark.parametrize(("values", "warps"), [(1, 1), (4, 1), (2, 2), (4, 8), (1, 32)])
def test_hadamard(values, warps):
    size = 32 * values * warps
    x = torch.randn(5, size, device="cuda")
    y = torch.empty_like(x)
    kernel("hadamard", VALUES=values, WARPS=warps)(5, 32 * warps, x, y)
    torch.testing.assert_close(y / size**0.5, hadamard(x, size), rtol=1e-5, atol=1e-5)
    whole = torch.randint(-8, 9, x.shape, device="cuda").float()  # sums of integers are exact
    kernel("hadamard", VALUES=values, WARPS=warps)(5, 32 * warps, whole, y)
    assert torch.equal(y, (hadamard(whole, size) * size**0.5).round())


@on_gpu
@pytest.mark.parametrize(("warps", "lanes"), [(1, 2), (4, 8), (32, 32)])
def test_reductions(warps, lanes):
    x = torch.randint(-99, 99, (7, 32 * warps), device="cuda").float()
    x[3, 5] = float("nan")
    sums, largest, parts = torch.empty(7, device="cuda"), torch.empty(7, device="cuda"), torch.empty_like(x)
    kernel("reductions", WARPS=warps, LANES=lanes)(7, 32 * warps, x, sums, largest, parts)
    np.testing.assert_array_equal(sums.cpu(), x.sum(1).cpu())
    np.testing.assert_array_equal(largest.cpu(), x.amax(1).cpu())
    shares = x.view(7, -1, lanes).sum(2, keepdim=True).expand(-1, -1, lanes)
    np.testing.assert_array_equal(parts.cpu(), shares.reshape(x.shape).cpu())
