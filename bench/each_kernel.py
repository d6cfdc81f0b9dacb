"""Every kernel a few times, for tools that watch kernels: small odd shapes for compute-sanitizer, one large shape for ncu.

    export PYTHONPATH=core:cuda:formats:plugins/kbit PYTORCH_NO_CUDA_MEMORY_CACHING=1
    python3 bench/each_kernel.py                   # compile first: tools need not watch that
    for tool in memcheck racecheck synccheck initcheck; do
      compute-sanitizer --tool $tool --error-exitcode 1 python3 bench/each_kernel.py || exit
    done
    ncu --clock-control none --metrics $(python3 bench/each_kernel.py --metrics) -k regex:lowbit_ --csv python3 bench/each_kernel.py --large

Without caching each tensor is an allocation of its own, so that a read past its end is seen. ``--only gemv gemm`` chooses.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from unit_problems import BF16, FLOAT, HALF, problem

from lowbit_cuda.columns import column_order, gather
from lowbit_cuda.decoder import AFFINE, CODEBOOK
from lowbit_cuda.gemm import Dequantizer, Gemm, GemmShape
from lowbit_cuda.gemv import Gemv, GemvShape
from lowbit_cuda.outliers import OutlierMatrix
from lowbit_cuda.scatter import write_scattered
from lowbit_cuda.units import UnitFormat, pack_units

SMALL = [  # decoder, group, scales, offsets, columns, rows: ragged units, ragged rows, a cluster, a table, each kind of offset
    (AFFINE[4], 128, HALF, "CONSTANT", 520, 37),
    (AFFINE[3], 64, HALF, "ZEROS", 1088, 21),
    (AFFINE[2], 32, FLOAT, "MINIMUMS", 264, 130),
    (AFFINE[1], 128, HALF, "CONSTANT", 520, 37),
    (AFFINE[8], 64, HALF, "ZEROS", 328, 18),
    (AFFINE[6], 128, HALF, "CONSTANT", 520, 17),
    (AFFINE[4], 128, HALF, "CONSTANT", 14336, 40),
    (CODEBOOK[4], 64, HALF, "CONSTANT", 576, 33),
    (CODEBOOK[3], 64, FLOAT, "CONSTANT", 520, 19),
    (CODEBOOK[2], 128, HALF, "CONSTANT", 264, 50),
    (CODEBOOK[5], 64, HALF, "CONSTANT", 520, 37),
    (CODEBOOK[8], 32, HALF, "CONSTANT", 264, 18),
]
LARGE = [
    *((AFFINE[bits], 128, HALF, "CONSTANT", 4096, 14336) for bits in (4, 3, 2, 8)),
    *((CODEBOOK[bits], 64, HALF, "CONSTANT", 4096, 14336) for bits in (4, 2, 5, 8)),
]
METRICS = (
    "gpu__time_duration.sum",
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "launch__registers_per_thread",
    "launch__grid_size",
    "smsp__inst_executed.sum",
    "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "sm__inst_executed_pipe_alu.avg.pct_of_peak_sustained_active",
    "sm__inst_executed_pipe_lsu.avg.pct_of_peak_sustained_active",
    "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active",
    "l1tex__data_bank_conflicts_pipe_lsu.sum",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "smsp__inst_executed_op_local_ld.sum",
)


def gemv(weights: list[tuple]) -> None:
    """Run one, three and sixteen rows, without and with dependent launch."""
    for number, weight in enumerate(weights):
        given, (columns, rows) = problem(*weight), weight[-2:]
        for tokens, dtype in ((1, HALF), (3, BF16), (16, HALF)):
            shape = GemvShape(given.format, columns, rows, tokens, dtype, dependent=number % 2 == 1)
            if shape.why_not(torch.cuda.get_device_capability()):
                continue
            x, out = (torch.randn(tokens, size, device="cuda").to(dtype) for size in (columns, rows))
            Gemv(shape)(given.units, x, out, out[0].clone(), **given.options())


def gemm(weights: list[tuple]) -> None:
    """Run 17, 33 and 64 rows."""
    for weight in weights:
        given, (columns, rows) = problem(*weight), weight[-2:]
        for tokens, dtype in ((17, BF16), (33, HALF), (64, HALF)):
            shape = GemmShape(given.format, columns, rows, tokens, dtype)
            if shape.why_not(torch.cuda.get_device_capability()):
                continue
            x, out = (torch.randn(tokens, size, device="cuda").to(dtype) for size in (columns, rows))
            arrived = torch.zeros(shape.row_blocks, dtype=torch.int32, device="cuda")
            Gemm(shape)(given.units, x, out, arrived, out[0].clone(), **given.options())


def dequantize(weights: list[tuple]) -> None:
    """Write each weight in three dtypes."""
    for weight in weights:
        given = problem(*weight)
        for dtype in (HALF, BF16, FLOAT):
            out = torch.empty(given.weight.shape, dtype=dtype, device="cuda")
            Dequantizer(given.format, dtype)(given.units, out, **given.options())


def scatter(weights: list[tuple]) -> None:
    """Groups of 16, and act-order, multiplied and written in the weight's own order."""
    rows, columns = weights[0][-1], weights[0][-2]
    for group, permuted in ((16, False), (24, False), (64, True)):
        generator = torch.Generator("cuda").manual_seed(group)
        index = torch.arange(columns, device="cuda") // group
        if permuted:
            index = index[torch.randperm(columns, device="cuda", generator=generator)]
        order = column_order(group, columns, index if permuted else None, torch.device("cuda"))
        assert order.source is not None
        codes = torch.randint(16, (rows, columns), dtype=torch.uint8, device="cuda", generator=generator)
        scales = torch.rand(rows, int(index.max()) + 1, device="cuda", generator=generator).half()
        format = UnitFormat(AFFINE[4], {16: 16, 24: 32, 64: 64}[group])
        units = pack_units(format, gather(codes, order.source), scales[:, order.groups])
        out = torch.empty(rows, columns, device="cuda", dtype=HALF)
        write_scattered(format, units, order.source.int(), out, 8.0)
        expected = ((codes.float() - 8) * scales[:, index].float()).half()
        assert torch.equal(out, expected)
        x, y = torch.randn(1, columns, device="cuda").half(), torch.empty(1, rows, device="cuda").half()
        Gemv(GemvShape(format, len(order.source), rows))(units, gather(x, order.source), y, None, 8.0)
        torch.testing.assert_close(y, x @ expected.T, rtol=2e-2, atol=0.5)


def outliers(weights: list[tuple]) -> None:
    """A sparse matrix added to a product and to a weight."""
    rows, columns = weights[0][-1], weights[0][-2]
    dense = torch.randn(rows, columns, device="cuda")
    kept = torch.where(torch.rand_like(dense) < 0.01, dense, 0).half().cpu().to_sparse_csr()
    matrix = OutlierMatrix(
        *(part.cuda() for part in (kept.crow_indices().int(), kept.col_indices().short(), kept.values()))
    )
    for tokens in (1, 9):
        x, y = torch.randn(tokens, columns, device="cuda").half(), torch.zeros(tokens, rows, device="cuda").half()
        matrix.add_product(x, y)
        torch.testing.assert_close(y, x @ kept.to_dense().cuda().T, rtol=1e-2, atol=1e-2)
    weight = torch.zeros(rows, columns, device="cuda")
    matrix.add_to(weight)
    assert torch.equal(weight, kept.to_dense().cuda().float())


def kbit(weights: list[tuple]) -> None:
    """Quantize, convert streams and dequantize."""
    from lowbit.kernels import ReferenceKernel
    from lowbit.tensors import PackedTensor, bit_equal
    from lowbit_kbit.kernels import StreamKernel
    from lowbit_kbit.options import KbitOptions
    from lowbit_kbit.packers import PACKERS
    from lowbit_kbit.quantizer import KbitQuantizer
    from lowbit_kbit.streams import convert_stream

    rows, columns = weights[0][-1], weights[0][-2]
    for bits, group, rounding in ((4, 64, "nearest"), (3, 17, "nearest"), (5, 24, "stochastic"), (8, 128, "nearest")):
        options = KbitOptions(bits, group, "nf", rounding=rounding)
        quantized = KbitQuantizer().quantize(torch.randn(rows, columns, device="cuda").half(), options)
        for packer in PACKERS:
            packed = packer.pack(quantized)
            found = StreamKernel(packer).dequantize(packed, HALF).cpu()
            there = PackedTensor(packed.spec, {name: buffer.cpu() for name, buffer in packed.buffers.items()})
            assert bit_equal(found, ReferenceKernel(packer).dequantize(there, HALF))
        convert_stream("words", "dense", PACKERS[0].pack(quantized).buffers["qweight"].view(-1), bits, rows * columns)


KERNELS: dict[str, Callable[[list[tuple]], None]] = {
    function.__name__: function for function in (gemv, gemm, dequantize, scatter, outliers, kbit)
}


def main() -> None:
    """Run what was chosen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--large", action="store_true", help="one shape of a model, for ncu")
    parser.add_argument("--metrics", action="store_true", help="print the counters to ask ncu for, and end")
    options = parser.parse_args()
    if options.metrics:
        print(",".join(METRICS))
        return
    for name in options.only:
        KERNELS[name](LARGE if options.large else SMALL)
        torch.cuda.synchronize()
        print(name, "ran", flush=True)


if __name__ == "__main__":
    main()
