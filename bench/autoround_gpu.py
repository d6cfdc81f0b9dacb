"""AutoRound here against auto-round 0.16 on a GPU: seconds and memory of tuning a block of an 8B-shaped model of random weights.

    python bench/autoround_gpu.py FIGURES.json                      # the Python that runs this has auto-round, too
    python bench/autoround_gpu.py FIGURES.json --peer-python ENV/bin/python
    python bench/autoround_gpu.py FIGURES.json --device cpu --hidden 256 --intermediate 512 --layers 2 --iters 3 --samples 8 --seqlen 64

Both tune W4G128 by the default recipe (200 steps of 8 sequences of 2048 tokens out of 128), with the settings that each has by
default, on the same weights and sequences, in bfloat16 (on a CPU float32), one after the other, each in a process of its own.
``block_seconds`` is the tuning of a block alone, waited for: no loading, no forward pass between blocks, no packing. Both compile
in the first block, which the median leaves out. The peer gets its sequences as from a data set by name, without an attention
mask. What was measured before a half failed or ran out of ``--limit`` is kept, beside what it said last; all of that is in
``FIGURES.HALF.log``.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from autoround_peer import Watch
from gpu_convert import LARGE, write_model

from lowbit import installed
from lowbit.calibration.runner import run_blocks
from lowbit.recipe import Recipe, Rule
from lowbit_autoround.quantizer import AutoRoundQuantizer

HALVES = ("lowbit", "auto-round", "auto-round, eager")
SEED, BITS, GROUP_SIZE, BATCH_SIZE = 42, 4, 128, 8
SAID = 3000
"""Characters kept of what a half that failed said last."""


def prepare(folder, flags):
    """Write the model and the sequences."""
    shape = LARGE | {"hidden": flags.hidden, "inner": flags.intermediate, "layers": flags.layers}
    if flags.hidden < LARGE["hidden"]:
        shape |= {"heads": 4, "keys": 2, "vocabulary": 512}
    write_model(folder / "model", shape, flags.device)
    generator = torch.Generator().manual_seed(SEED)
    tokens = torch.randint(1, shape["vocabulary"], (flags.samples, flags.seqlen), generator=generator)
    torch.save({"calibration": tokens}, folder / "tokens.pt")


def tune(folder, flags):
    """Our half: run the blocks as ``lowbit convert`` does, and keep the figures in ``flags.figures``."""
    settings = {"recipe": "default", "bits": str(BITS), "group_size": str(GROUP_SIZE), "iters": str(flags.iters)}
    tokens, registry = torch.load(folder / "tokens.pt")["calibration"], installed()
    watch = Watch(AutoRoundQuantizer, "quantize_block", flags.device, flags.figures)

    def note(text):
        print(text, file=sys.stderr, flush=True)

    with registry.open(folder / "model") as checkpoint:
        choices = Recipe(Rule("*", "autoround", settings)).choose(checkpoint.entries, registry)
        for _ in run_blocks(
            checkpoint, choices, tokens, registry, batch_size=BATCH_SIZE, device=flags.device, note=note
        ):
            pass
    watch.save()


def command(half, folder, figures, flags):
    """Return the words that run a half."""
    if half == "lowbit":
        given = ["--device", flags.device, "--iters", str(flags.iters)]
        return [sys.executable, __file__, str(figures), "--child", str(folder), *given]
    settings = {"bits": BITS, "group-size": GROUP_SIZE, "iters": flags.iters, "batch-size": BATCH_SIZE, "seed": SEED}
    settings |= {"device": flags.device, "dtype": "float32" if flags.device == "cpu" else "bfloat16", "json": figures}
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    eager = ["--eager"] if half.endswith("eager") else []
    peer = Path(__file__).with_name("autoround_peer.py")
    return [
        flags.peer_python,
        str(peer),
        str(folder / "model"),
        str(folder / "tokens.pt"),
        "--unmasked",
        *words,
        *eager,
    ]


def measure(half, folder, flags):
    """Run a half in a process of its own; return its figures, and what it said if it did not come to its end."""
    figures, log = folder / "figures.json", flags.figures.with_suffix(f".{half.replace(', ', '-')}.log")
    figures.unlink(missing_ok=True)
    began, failure = time.perf_counter(), None
    with log.open("w") as said:
        try:
            words = command(half, folder, figures, flags)
            code = subprocess.run(words, stdout=said, stderr=said, timeout=flags.limit, check=False).returncode
            failure = f"ended with {code}" if code else None
        except subprocess.TimeoutExpired:
            failure = f"stopped after {flags.limit:.0f} s"
        except OSError as error:
            failure = str(error)
    found = json.loads(figures.read_text()) if figures.exists() else {}
    if failure:
        found |= {"failure": failure, "said": log.read_text()[-SAID:]}
    found["process_seconds"] = time.perf_counter() - began
    if tuned := found.get("block_seconds"):
        found["median_seconds"] = statistics.median(tuned[1:] or tuned)
        found["steps_per_second"] = flags.iters / found["median_seconds"]
    return found


def report(half, found):
    """Print a line, and what a half that failed said."""
    if "median_seconds" in found:
        blocks = ", ".join(f"{seconds:.2f}" for seconds in found["block_seconds"])
        memory = f", {found['peak_bytes'] / 1e9:.2f} GB" if "peak_bytes" in found else ""
        said = f"{found['median_seconds']:.2f} s a block ({blocks}), {found['steps_per_second']:.1f} steps/s{memory}"
        print(f"{half:18} {said}", flush=True)
    if "failure" in found:
        print(f"{half:18} {found['failure']}\n{found['said']}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", type=Path, help="a JSON file for the figures, written after every half")
    parser.add_argument("--peer-python", default=sys.executable, help="the interpreter that has auto-round")
    parser.add_argument(
        "--half", choices=HALVES, action="append", help="what to run, in this order; the first two by default"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=LARGE["hidden"])
    parser.add_argument("--intermediate", type=int, default=LARGE["inner"])
    parser.add_argument("--iters", type=int, default=200)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--limit", type=float, default=300.0, help="seconds that a half may take")
    parser.add_argument("--folder", type=Path, help="where the model lies for the time being")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.child:
        tune(flags.child, flags)
        return
    asked = ("hidden", "intermediate", "layers", "iters", "samples", "seqlen", "device")
    document = {"date": time.strftime("%Y-%m-%d"), **{name: getattr(flags, name) for name in asked}}
    if flags.device != "cpu":
        document["device"] = torch.cuda.get_device_name()
    document |= {"bits": BITS, "group_size": GROUP_SIZE, "batch_size": BATCH_SIZE}
    with tempfile.TemporaryDirectory(dir=flags.folder) as name:
        prepare(Path(name), flags)
        for half in flags.half or HALVES[:2]:
            document[half] = found = measure(half, Path(name), flags)
            report(half, found)
            medians = [document.get(half, {}).get("median_seconds") for half in HALVES[:2]]
            if all(medians):
                document["ratio"] = medians[0] / medians[1]
            flags.figures.write_text(json.dumps(document, indent=1) + "\n")
    if "ratio" in document:
        print(f"a block takes {document['ratio']:.2f} of the peer's time")


if __name__ == "__main__":
    main()
