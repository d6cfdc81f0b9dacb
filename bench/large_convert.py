"""Speed and peak memory of converting a large checkpoint, against a plain read-and-write of the same bytes.

    python bench/large_convert.py [--gigabytes 6] [--rounds 3] [--folder DIR]

Each round runs the copy and every conversion once, in turn, so that all see the same machine; medians are printed and written to
``bench/baselines/large_convert.json``. Peak memory is ``ru_maxrss`` of a process that does one conversion and nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import checkpoints

import lowbit

CASES = {
    "kbit int 4-bit g64": ["-q", "kbit", "--bits", "4", "--group-size", "64", "--set", "codebook=int"],
    "autoround iters=0 4-bit g128": ["-q", "autoround", "--bits", "4", "--group-size", "128", "--set", "iters=0"],
    "copy to native": [],
}
LARGEST_FP32 = 4 * checkpoints.HIDDEN * checkpoints.INTERMEDIATE
MEMORY_LIMIT = 4 * LARGEST_FP32 + 600_000_000
BASELINE = Path(__file__).parent / "baselines" / "large_convert.json"


def main() -> None:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--gigabytes", type=float, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--child", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        child(arguments.child)
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        checkpoints.write(folder / "source", int(arguments.gigabytes * 1e9), shards=3)
        facts = checkpoints.describe(folder / "source")
        print(f"{facts['bytes'] / 1e9:.2f} GB in {facts['shards']} shards; memory limit {MEMORY_LIMIT / 1e6:.0f} MB")
        seconds: dict[str, list[float]] = {}
        memory: dict[str, int] = {}
        for _ in range(arguments.rounds):
            seconds.setdefault("read and write", []).append(copy(folder))
            for case, flags in CASES.items():
                elapsed, peak = convert(folder, flags)
                seconds.setdefault(case, []).append(elapsed)
                memory[case] = max(memory.get(case, 0), peak)
        report(facts, seconds, memory)


def copy(folder: Path) -> float:
    """Read every shard and write it again, 16 MB at a time; return seconds."""
    (folder / "copy").mkdir()
    os.sync()
    started = time.perf_counter()
    buffer = bytearray(16 << 20)
    for shard in sorted((folder / "source").glob("*.safetensors")):
        with shard.open("rb", buffering=0) as source, (folder / "copy" / shard.name).open("wb", buffering=0) as target:
            while count := source.readinto(buffer):
                target.write(memoryview(buffer)[:count])
    elapsed = time.perf_counter() - started
    shutil.rmtree(folder / "copy")
    return elapsed


def convert(folder: Path, flags: list[str]) -> tuple[float, int]:
    """Convert in a process of its own; return the seconds of the conversion (torch loaded before) and peak resident bytes."""
    os.sync()
    command = [sys.executable, __file__, "--child", str(folder / "source"), str(folder / "out"), "--quiet", *flags]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    shutil.rmtree(folder / "out")
    seconds, peak = output.strip().splitlines()[-1].split()
    return float(seconds), int(peak)


def child(arguments: list[str]) -> None:
    """Run ``lowbit convert`` here; print its seconds, plugins and torch loaded before, and this process's peak resident bytes."""
    from lowbit.cli import cli
    from lowbit.plugins import installed

    installed()
    started = time.perf_counter()
    cli.main(["convert", *arguments], standalone_mode=False)
    print(time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def report(facts: dict[str, float], seconds: dict[str, list[float]], memory: dict[str, int]) -> None:
    """Print medians and ratios, and write the baseline."""
    plain = statistics.median(seconds["read and write"])
    figures = {}
    for case, values in seconds.items():
        median = statistics.median(values)
        ratio = statistics.median(copied / own for copied, own in zip(seconds["read and write"], values, strict=True))
        figures[case] = {
            "seconds": round(median, 2),
            "GB/s": round(facts["bytes"] / median / 1e9, 3),
            "rate_of_copy": round(ratio, 3),
        }
        if case in memory:
            figures[case]["peak_MB"] = round(memory[case] / 1e6)
        print(f"{case:32s} {figures[case]}")
    document = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, lowbit {lowbit.__version__}",
        "method": "medians over rounds of copy and conversions in turn; warm page cache, no fsync; without the 2 to 3 seconds that "
        "Python and torch take to start; ru_maxrss of one process",
        "source": facts,
        "copy_seconds": round(plain, 2),
        "memory_limit_MB": round(MEMORY_LIMIT / 1e6),
        "figures": figures,
    }
    BASELINE.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
