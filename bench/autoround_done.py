"""What 2-bit AutoRound reaches by the command line on a CPU, and whether a conversion survives being killed.

    python bench/autoround_done.py MODEL TEXT [--dataset default] [--nsamples 32 --seqlen 256] [--windows 12] [--json FILE]

Runs ``lowbit convert MODEL OUT --quantizer autoround --bits 2 --group-size 64 --recipe light --format native,gptq`` three times: to its
end; with SIGKILL twice in the middle of a block and ``--resume``; and with ``iters=0``. The files of the first two must be the same to
the last byte, then ``lowbit eval`` scores all results on TEXT against MODEL, in windows of 1024 tokens.
"""

import argparse
import hashlib
import json
import platform
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import lowbit

COMMAND = ("-q", "autoround", "-b", "2", "-g", "64", "--format", "native,gptq", "--allow-requantize", "--quiet")


def start(model, destination, words):
    command = [sys.executable, "-m", "lowbit", "convert", str(model), str(destination), *COMMAND, *words]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def convert(model, destination, words):
    """Convert to the end; return seconds."""
    began = time.perf_counter()
    if code := start(model, destination, words).wait():
        raise SystemExit(f"lowbit convert ended with {code}")
    return time.perf_counter() - began


def kill_behind(process, work, blocks, delay):
    """Kill ``process`` so long after it has finished ``blocks`` blocks; return how many blocks the state names then."""
    last = work / f"block-{blocks - 1:05d}.safetensors"
    while not last.exists():
        if process.poll() is not None:
            raise SystemExit(f"lowbit convert ended with {process.returncode} before it could be killed")
        time.sleep(0.05)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    if process.wait() != -signal.SIGKILL:
        raise SystemExit("lowbit convert ended before it could be killed; give fewer --kill-behind")
    return json.loads((work / "state.json").read_text())["done"]


def interrupted(model, destination, words, moments, delay):
    """Convert in pieces that end in SIGKILL; return how many blocks were finished at each of them."""
    work, finished = destination.with_name(destination.name + ".lowbit-work"), []
    for blocks in moments:
        process = start(model, destination, [*words, *(["--resume"] if finished else [])])
        finished.append(kill_behind(process, work, blocks, delay))
        print(f"killed: {finished[-1]} blocks were finished", file=sys.stderr, flush=True)
    convert(model, destination, [*words, "--resume"])
    return finished


def digests(folder):
    """Return the SHA-256 of every file below ``folder``."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def scores(model, results, flags):
    command = [
        sys.executable,
        "-m",
        "lowbit",
        "eval",
        *map(str, results),
        "--against",
        str(model),
        "--text",
        str(flags.text),
    ]
    command += ["--context", "1024", "--windows", str(flags.windows), "--json"]
    document = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return [result["perplexity"] for result in document["results"]]


def measure(flags, folder):
    sampling = ["--dataset", flags.dataset, "--nsamples", str(flags.nsamples), "--seqlen", str(flags.seqlen)]
    light = [*sampling, "--recipe", "light", "--set", f"batch_size={flags.batch_size}"]
    seconds = convert(flags.model, folder / "light", light)
    print(f"light: {seconds:.0f} s", file=sys.stderr, flush=True)
    kills = interrupted(flags.model, folder / "killed", light, flags.kill_behind, flags.delay)
    convert(flags.model, folder / "rounded", ["--set", "iters=0"])
    whole, pieces = digests(folder / "light"), digests(folder / "killed")
    base, native, gptq, rounded = scores(
        flags.model, [folder / "light" / "native", folder / "light" / "gptq", folder / "rounded" / "native"], flags
    )
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{torch.get_num_threads()} torch threads, {platform.machine()}, torch {torch.__version__}, lowbit {lowbit.__version__}",
        "options": " ".join(["lowbit convert", flags.model.name, "OUT", *COMMAND, *light]),
        "seconds": round(seconds, 1),
        "blocks_finished_when_killed": kills,
        "files": len(whole),
        "identical": whole == pieces,
        "windows_of_1024": flags.windows,
        "perplexity": {"base": base, "iters=0": rounded, "light, native": native, "light, gptq": gptq},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--dataset", default="default")
    parser.add_argument("--nsamples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=4, help="sequences of a tuning step")
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--kill-behind", type=int, nargs=2, default=(2, 4), metavar="BLOCKS")
    parser.add_argument(
        "--delay", type=float, default=5.0, help="seconds from the end of a block to the kill in the next one"
    )
    parser.add_argument("--folder", type=Path, help="where the results lie for the time being")
    parser.add_argument("--json", type=Path, help="a file to keep the figures in, by model")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=flags.folder) as name:
        found = measure(flags, Path(name))
    print(json.dumps(found, indent=1))
    if flags.json:
        known = json.loads(flags.json.read_text()) if flags.json.exists() else {}
        flags.json.write_text(json.dumps({**known, flags.model.name: found}, indent=1) + "\n")
    if not found["identical"]:
        raise SystemExit("the files of the conversion that was killed differ")


if __name__ == "__main__":
    main()
