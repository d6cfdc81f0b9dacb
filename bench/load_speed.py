"""Speed and peak memory of ``lowbit.load`` on native models, against reading the same bytes.

    python bench/load_speed.py [--rounds 5]

Two models: SmolLM2 as it is, and a synthetic one shaped like a Llama of 1.1 billion weights, packed in 4 bits. Each round reads the files
into fresh memory, 16 MB at a time, and loads the model, in turn; the median of the ratios counts. Native files are mapped into
memory and their pages brought in, not copied; "touched" adds reading a byte of each page. "Building" is what transformers alone
takes to make the model on meta, as it is and with the random numbers that lowbit spares. Peak memory is the growth of
the resident set over a load in a process that has done nothing else but a load of a tiny model. Writes ``bench/baselines/load_speed.json``.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from models import smollm2
from transformers.initialization import no_init_weights

import lowbit
import lowbit.runtime.load
import lowbit.testing.samples
from lowbit.convert import convert
from lowbit.interfaces import Value
from lowbit.plan import Target
from lowbit.tensors import raw_bytes

BASELINE = Path(__file__).parent / "baselines" / "load_speed.json"
HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY, SHARDS = 2048, 8192, 16, 32000, 4
SCHEME = lowbit.Scheme(lowbit.Grid.AFFINE, 4, 128)


def main() -> None:
    """Write the models, run the rounds in processes of their own, and record the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        speed(Path(arguments.child[1]), arguments.rounds) if arguments.child[0] == "speed" else memory(
            Path(arguments.child[1])
        )
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        tiny, synthetic, real = (Path(name) / part for part in ("tiny", "synthetic", "smollm2"))
        write(tiny, 64, 128, 1, 256, 1)
        write(synthetic, HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY, SHARDS)
        convert(smollm2(), real, Target("native"), lowbit.installed())
        figures = {
            title: measure(folder, arguments.rounds)
            for title, folder in (("SmolLM2-135M", real), ("Llama of 1.1 G weights", synthetic))
        }
    document = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads",
        "method": __doc__.split("\n\n")[2].replace("\n", " "),
        "figures": figures,
    }
    BASELINE.write_text(json.dumps(document, indent=1) + "\n")


def measure(folder: Path, rounds: int) -> dict[str, float]:
    """Return the figures of one model, from two processes."""
    found = {**run("speed", folder, rounds), **run("memory", folder, rounds)}
    print(f"{folder.name:10s} {found}", flush=True)
    return found


def run(what: str, folder: Path, rounds: int) -> dict[str, float]:
    """Measure in a process of its own."""
    command = [sys.executable, __file__, "--rounds", str(rounds), "--child", what, str(folder)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def speed(folder: Path, rounds: int) -> None:
    """Print the seconds of reading and loading, medians, and the median of their ratios."""
    lowbit.load(folder)  # imports, and the page cache
    runs = []
    for _ in range(rounds):
        touch(folder)
        reading = read(folder)
        touch(folder)
        loading, model = timed(lambda: lowbit.load(folder))
        walking, _ = timed(lambda loaded=model: walk(loaded))
        preparing, _ = timed(lambda loaded=model: lowbit.runtime.load.prepare_layers(loaded))
        runs.append((reading, loading, loading + walking, loading + walking + preparing, *building(folder)))
        del model
    medians = [round(statistics.median(column), 4) for column in zip(*runs, strict=True)]
    names = ("read", "load", "touched", "prepared", "building", "building_bare")
    found = {f"{name}_seconds": value for name, value in zip(names, medians, strict=True)}
    found["speed_of_reading"] = round(statistics.median(run[0] / run[1] for run in runs), 3)
    found["touched_speed_of_reading"] = round(statistics.median(run[0] / run[2] for run in runs), 3)
    print(json.dumps(found))


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds of a call, and what it returned."""
    started = time.perf_counter()
    found = run()
    return time.perf_counter() - started, found


def walk(model: Any) -> None:
    """Read a byte of every page of the model."""
    for tensor in (*model.parameters(), *model.buffers()):
        raw_bytes(tensor.detach())[:: mmap.PAGESIZE].sum()


def building(folder: Path) -> tuple[float, float]:
    """Return the seconds that transformers' model class takes on meta: as it is, and without random numbers."""
    with lowbit.installed().open(folder) as checkpoint:
        config = lowbit.runtime.load.model_config(checkpoint.metadata, str(folder))
    kind = lowbit.runtime.load.find_model_class(config)
    with torch.device("meta"):
        plain, _ = timed(lambda: kind(config))
        with no_init_weights():
            bare, _ = timed(lambda: kind(config))
    return plain, bare


def touch(folder: Path) -> None:
    """Write to as much memory as the model takes, and free it: what runs next then gets pages that a virtual machine has."""
    torch.ones(sum(path.stat().st_size for path in folder.glob("*.safetensors")), dtype=torch.uint8)


def read(folder: Path) -> float:
    """Read all safetensors files of a folder into fresh memory; return seconds."""
    started = time.perf_counter()
    kept = []
    for path in folder.glob("*.safetensors"):
        buffer = memoryview(torch.empty(path.stat().st_size, dtype=torch.uint8).numpy())
        with path.open("rb", buffering=0) as file:
            done = 0
            while count := file.readinto(buffer[done : done + (16 << 20)]):
                done += count
        kept.append(buffer)
    return time.perf_counter() - started


def memory(folder: Path) -> None:
    """Print the growth of the peak resident set over a load, in bytes, beside the bytes of the packed model."""
    lowbit.load(folder.parent / "tiny")
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is that from now on
    model = lowbit.load(folder)
    peak = resident("VmHWM") - before
    shards = [path.stat().st_size for path in folder.glob("*.safetensors")]
    lowbit.runtime.load.prepare_layers(model)
    print(
        json.dumps(
            {
                "model_MB": round(sum(shards) / 1e6, 1),
                "largest_shard_MB": round(max(shards) / 1e6, 1),
                "peak_MB": round(peak / 1e6, 1),
                "peak_prepared_MB": round((resident("VmHWM") - before) / 1e6, 1),
            }
        )
    )


def resident(key: str) -> int:
    """Return a line of /proc/self/status, in bytes."""
    found = re.search(rf"^{key}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def write(folder: Path, hidden: int, intermediate: int, layers: int, vocabulary: int, shards: int) -> None:
    """Write a native Llama of random codes."""
    registry = lowbit.installed()
    packer = registry.route(SCHEME, (hidden, hidden), "native").packer
    shapes = dict.fromkeys(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"), (hidden, hidden)
    )
    shapes |= {
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }
    packed = {shape: packer.pack(lowbit.testing.samples.quantized(SCHEME, shape)) for shape in set(shapes.values())}
    values: dict[str, Value] = {"model.embed_tokens.weight": torch.randn(vocabulary, hidden).bfloat16()}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        values |= {f"{prefix}{name}.weight": packed[shape] for name, shape in shapes.items()}
        values |= {
            f"{prefix}{name}.weight": torch.ones(hidden).bfloat16()
            for name in ("input_layernorm", "post_attention_layernorm")
        }
    values["model.norm.weight"] = torch.ones(hidden).bfloat16()
    entries = {
        name: value.spec if isinstance(value, lowbit.PackedTensor) else lowbit.TensorSpec.of(value)
        for name, value in values.items()
    }
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
        "vocab_size": vocabulary,
        "tie_word_embeddings": True,
    }
    total = sum(entry.nbytes for entry in entries.values())
    registry.exporters["native"].write(
        folder, entries, iter(values.items()), lowbit.Metadata(config), total // shards + (1 << 20)
    )


if __name__ == "__main__":
    main()
