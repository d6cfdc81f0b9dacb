"""Packing and unpacking: dense k-bit streams of uint8 codes. Rates count 2 bytes for each weight, as bf16 weights have."""

import pytest
import torch

from lowbit.bits import pack_bits, unpack_bits

ROWS, COLUMNS = 2048, 4096


@pytest.fixture(scope="module", params=[2, 3, 4, 5, 8], ids="{}bit".format)
def codes(request):
    generator = torch.Generator().manual_seed(request.param)
    return request.param, torch.randint(2**request.param, (ROWS, COLUMNS), dtype=torch.uint8, generator=generator)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.benchmark(group="pack")
def test_pack(benchmark, codes):
    bits, values = codes
    packed = benchmark(pack_bits, values, bits)
    benchmark.extra_info["bf16_bytes"] = 2 * values.numel()
    assert torch.equal(unpack_bits(packed, bits, COLUMNS), values)


@pytest.mark.benchmark(group="unpack")
def test_unpack(benchmark, codes):
    bits, values = codes
    packed = pack_bits(values, bits)
    unpacked = benchmark(unpack_bits, packed, bits, COLUMNS)
    assert torch.equal(unpacked, values)
