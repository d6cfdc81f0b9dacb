"""Rates of the k-bit CUDA kernels against the copy rate, measured in the same run: ``PYTHONPATH=core:cuda:formats:plugins/kbit
python3 bench/kbit_cuda.py [OUT.json]`` on a machine with an NVIDIA GPU.

Each call is captured in a CUDA graph that walks through copies of the buffers of at least 256 MB together, so that L2 is cold. The
rate is bytes read and written over the median time of a launch in the graph; ``share`` is its part of the rate of the best copy.
"""

import json
import sys
import time
from pathlib import Path
from statistics import median

import torch

from lowbit_kbit import launches
from lowbit_kbit.codebooks import fixed_codebook
from lowbit_kbit.streams import pack_stream, word_count

COLD = 256 << 20
ROWS, COLUMNS, GROUP = 14336, 4096, 64


def seconds(calls):
    """Return the median seconds of one of ``calls``, captured together in one graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    times = []
    for _ in range(12):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(calls))
    return median(times[2:])


def copies(nbytes):
    return max(2, -(-COLD // nbytes))


def copy_rate():
    """Return the bytes a second, read and written, of the best of torch's copies of 512 MB: memcpy, and two elementwise kernels."""
    source = torch.empty(128 << 20, dtype=torch.float32, device="cuda").normal_()
    target = torch.empty_like(source)
    ways = (
        lambda: target.copy_(source),
        lambda: torch.neg(source, out=target),
        lambda: torch.neg(source.view(torch.int64), out=target.view(torch.int64)),
    )
    return 8 * source.numel() / min(seconds([way] * 4) for way in ways)


def dequantize(layout, bits, dtype, scale_dtype=torch.float16, second=False):
    count = ROWS * COLUMNS
    codes = torch.randint(2**bits, (count,), dtype=torch.uint8, device="cuda")
    words = pack_stream(layout, codes, bits)
    scales = torch.rand(ROWS, COLUMNS // GROUP, device="cuda").to(scale_dtype)
    supers = (torch.rand(ROWS, 1, device="cuda"), COLUMNS // GROUP, 1) if second else None
    if second:
        scales = torch.randint(256, scales.shape, dtype=torch.uint8, device="cuda")
    book = fixed_codebook("nf", bits).cuda() if bits > 1 else torch.tensor([-1.0, 1.0], device="cuda")
    out = torch.empty(ROWS, COLUMNS, dtype=dtype, device="cuda")
    nbytes = words.numel() * 4 + scales.numel() * scales.element_size() + out.numel() * out.element_size()
    sets = [(words.clone(), scales.clone(), torch.empty_like(out)) for _ in range(copies(nbytes))]
    grid = (COLUMNS, GROUP, COLUMNS // GROUP)
    calls = [
        lambda w=w, s=s, o=o: launches.dequantize(layout.capitalize(), bits, w, book, s, o, grid, supers)
        for w, s, o in sets
    ]
    return nbytes, seconds(calls)


def quantize(bits, dtype, rule="absmax", codebook="nf", group=GROUP, stochastic=False):
    weight = torch.randn(ROWS, COLUMNS, device="cuda").to(dtype)
    book = fixed_codebook(codebook, bits)  # on the CPU: nothing is read back during capture
    codes = torch.empty(ROWS, COLUMNS, dtype=torch.uint8, device="cuda")
    scales = torch.empty(ROWS, COLUMNS // group, dtype=torch.float16, device="cuda")
    nbytes = weight.numel() * weight.element_size() + codes.numel() + 2 * scales.numel()
    sets = [(weight.clone(), torch.empty_like(codes), torch.empty_like(scales)) for _ in range(copies(nbytes))]
    seed = 1 if stochastic else None
    calls = [lambda w=w, c=c, s=s: launches.quantize(w, group, rule, book, c, s, seed, check=False) for w, c, s in sets]
    return nbytes, seconds(calls)


def repack(source, target, bits):
    count = ROWS * COLUMNS
    codes = torch.randint(2**bits, (count,), dtype=torch.uint8, device="cuda")
    start = codes if source == "codes" else pack_stream(source, codes, bits)
    size = count if target == "codes" else word_count(target, bits, count)
    out = torch.empty(size, dtype=torch.uint8 if target == "codes" else torch.int32, device="cuda")
    nbytes = start.numel() * start.element_size() + out.numel() * out.element_size()
    sets = [(start.clone(), torch.empty_like(out)) for _ in range(copies(nbytes))]
    names = source.capitalize(), target.capitalize()
    calls = [lambda a=a, b=b: launches.repack(*names, bits, a, count, b, check=False) for a, b in sets]
    return nbytes, seconds(calls)


def warm_up():
    """Bring the clocks up before anything is timed."""
    square = torch.randn(8192, 8192, device="cuda")
    for _ in range(100):
        square @ square
    torch.cuda.synchronize()


def main():
    warm_up()
    copy = copy_rate()
    print(f"copy {copy / 1e12:.3f} TB/s")
    half, single = torch.float16, torch.float32
    cases = {}
    for layout in ("words", "dense"):
        for bits in range(2, 9):
            cases[f"dequantize {layout} {bits} fp16"] = lambda layout=layout, bits=bits: dequantize(layout, bits, half)
    cases["dequantize dense 4 bf16"] = lambda: dequantize("dense", 4, torch.bfloat16)
    cases["dequantize dense 4 fp32"] = lambda: dequantize("dense", 4, single)
    cases["dequantize dense 4 fp16, fp32 scales"] = lambda: dequantize("dense", 4, half, single)
    cases["dequantize dense 4 fp16, 8-bit scales"] = lambda: dequantize("dense", 4, half, second=True)
    for bits in range(2, 9):
        cases[f"quantize {bits} nf absmax fp16"] = lambda bits=bits: quantize(bits, half)
    cases["quantize 4 nf signed bf16"] = lambda: quantize(4, torch.bfloat16, "signed")
    cases["quantize 4 nf absmax fp32"] = lambda: quantize(4, single)
    cases["quantize 4 nf absmax fp16 g16"] = lambda: quantize(4, half, group=16)
    cases["quantize 4 nf absmax fp16 g4096"] = lambda: quantize(4, half, group=4096)
    cases["quantize 4 nf absmax fp16 stochastic"] = lambda: quantize(4, half, stochastic=True)
    for source, target in (
        ("codes", "words"),
        ("codes", "dense"),
        ("words", "dense"),
        ("dense", "words"),
        ("dense", "codes"),
    ):
        for bits in (3, 4):
            cases[f"repack {source} to {target} {bits}"] = lambda s=source, t=target, b=bits: repack(s, t, b)
    results = {}
    for name, case in cases.items():
        nbytes, taken = case()
        rate = nbytes / taken
        results[name] = {
            "microseconds": round(taken * 1e6, 2),
            "TB/s": round(rate / 1e12, 3),
            "share": round(rate / copy, 3),
        }
        print(f"{name:40s} {taken * 1e6:8.1f} us  {rate / 1e12:.3f} TB/s  {rate / copy:6.1%}", flush=True)
    if len(sys.argv) > 1:
        document = {
            "date": time.strftime("%Y-%m-%d"),
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "shape": [ROWS, COLUMNS],
            "group_size": GROUP,
            "copy TB/s": round(copy / 1e12, 3),
            "results": results,
        }
        Path(sys.argv[1]).write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
