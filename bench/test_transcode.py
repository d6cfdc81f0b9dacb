"""Moving codes from GPTQ to other formats, exactly, against a plain read and write of the same bytes in the same run.

    python bench/test_transcode.py [--megabytes 500] [--rounds 3]         prints ratios and writes baselines/transcode.json

The ratio counts bytes of the source; the conversion reads its output again and compares, which the copy does not.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import pytest
import torch

import lowbit
from lowbit import Grid, Metadata, PackedTensor, Scheme, SideFile, TensorSpec, Zero, installed
from lowbit.convert import convert
from lowbit.plan import Target

BASELINE = Path(__file__).parent / "baselines" / "transcode.json"
FORMATS = ("awq", "compressed-tensors", "gguf", "mlx", "native")
SMOKE = 12_000_000
HIDDEN, INTERMEDIATE, VOCABULARY = 4096, 14336, 256
GROUP = 128


def write(folder: Path, nbytes: int, small: bool = False) -> None:
    """Write a GPTQ checkpoint of about ``nbytes``: an 8B Llama's layers, random 4-bit codes, groups of 128."""
    hidden, intermediate = (1024, 3584) if small else (HIDDEN, INTERMEDIATE)
    shapes = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (hidden // 4, hidden)}
    shapes |= {"self_attn.v_proj": (hidden // 4, hidden), "self_attn.o_proj": (hidden, hidden)}
    shapes |= {"mlp.gate_proj": (intermediate, hidden), "mlp.up_proj": (intermediate, hidden)}
    shapes |= {"mlp.down_proj": (hidden, intermediate)}
    layers = max(1, round(nbytes / (0.52 * sum(rows * columns for rows, columns in shapes.values()))))
    norms = ("input_layernorm", "post_attention_layernorm")
    values: dict[str, torch.Tensor | PackedTensor] = {
        "model.embed_tokens.weight": torch.zeros(VOCABULARY, hidden, dtype=torch.float16)
    }
    for layer in range(layers):
        values |= {f"model.layers.{layer}.{name}.weight": packed(shape, layer) for name, shape in shapes.items()}
        values |= {f"model.layers.{layer}.{name}.weight": torch.ones(hidden, dtype=torch.float16) for name in norms}
    values["model.norm.weight"] = torch.ones(hidden, dtype=torch.float16)
    entries = {
        name: value.spec if isinstance(value, PackedTensor) else TensorSpec.of(value) for name, value in values.items()
    }
    installed().exporters["gptq"].write(folder, entries, iter(values.items()), config(hidden, intermediate, layers))


def config(hidden: int, intermediate: int, layers: int) -> Metadata:
    """Return the config of the model, as far as any format asks for it, and a tokenizer of bytes, which GGUF files hold."""
    said = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "torch_dtype": "float16"}
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": hidden // 128, "num_key_value_heads": hidden // 512, "vocab_size": VOCABULARY}
    sizes |= {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True}
    return Metadata({**said, **sizes}, (SideFile("tokenizer.json", content=json.dumps(tokenizer()).encode()),))


def tokenizer() -> dict[str, object]:
    """Return a byte-level BPE tokenizer without merges that splits text as SmolLM2's does."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    spelled = [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
    bytewise = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    split = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, bytewise]}
    model = {"type": "BPE", "vocab": {text: index for index, text in enumerate(spelled)}, "merges": []}
    return {"version": "1.0", "added_tokens": [], "pre_tokenizer": split, "decoder": bytewise, "model": model}


def packed(shape: tuple[int, int], seed: int) -> PackedTensor:
    """Return a GPTQ weight of random codes; any words are codes."""
    packer, scheme = installed().packers["gptq"], Scheme(Grid.AFFINE, 4, GROUP, Zero.SYMMETRIC)
    spec, source = packer.spec(scheme, shape), torch.Generator().manual_seed(seed)
    zeros = spec.buffers["qzeros"]
    buffers = {
        "qweight": torch.randint(-(2**31), 2**31, spec.buffers["qweight"].shape, generator=source).int(),
        "qzeros": torch.full(zeros.shape, 0x77777777, dtype=torch.int32),
        "scales": (torch.rand(spec.buffers["scales"].shape, generator=source) * 0.01 + 0.001).half(),
        "g_idx": torch.arange(shape[1], dtype=torch.int32) // GROUP,
    }
    return PackedTensor(spec, buffers)


def copy(folder: Path) -> float:
    """Read every file of the source and write it again, 16 MB at a time; return seconds."""
    target = folder / "copy"
    target.mkdir()
    started, buffer = time.perf_counter(), bytearray(16 << 20)
    for file in sorted((folder / "source").glob("*.safetensors")):
        with file.open("rb", buffering=0) as read, (target / file.name).open("wb", buffering=0) as written:
            while count := read.readinto(buffer):
                written.write(memoryview(buffer)[:count])
    elapsed = time.perf_counter() - started
    shutil.rmtree(target)
    return elapsed


def transcode(folder: Path, format: str) -> float:
    """Convert the source to a format, prove that it is exact, remove it; return seconds."""
    out = folder / f"out{installed().exporters[format].suffix}"
    started = time.perf_counter()
    report = convert(folder / "source", out, Target(format), installed())
    elapsed = time.perf_counter() - started
    assert report.error.exact
    shutil.rmtree(out) if out.is_dir() else out.unlink()
    return elapsed


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("transcode")
    write(folder / "source", SMOKE, small=True)
    return folder


@pytest.mark.benchmark(group="transcode", min_rounds=3)
@pytest.mark.parametrize("format", FORMATS)
def test_transcode(benchmark, source, format):
    benchmark.extra_info["copy_seconds"] = copy(source)
    benchmark(transcode, source, format)


def main() -> None:
    """Measure copies and conversions in turn, print medians, write the baseline."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        write(folder / "source", arguments.megabytes * 1_000_000)
        nbytes = sum(file.stat().st_size for file in (folder / "source").glob("*.safetensors"))
        seconds: dict[str, list[float]] = {"copy": [], **{format: [] for format in FORMATS}}
        for _ in range(arguments.rounds):
            seconds["copy"].append(copy(folder))
            for format in FORMATS:
                seconds[format].append(transcode(folder, format))
    figures = {}
    for case, values in seconds.items():
        ratio = statistics.median(copied / own for copied, own in zip(seconds["copy"], values, strict=True))
        figures[case] = {"seconds": round(statistics.median(values), 2), "rate_of_copy": round(ratio, 3)}
        print(f"{case:20s} {figures[case]}")
    machine = (
        f"{os.cpu_count()} cores, {platform.machine()}, {torch.get_num_threads()} threads, lowbit {lowbit.__version__}"
    )
    method = "medians over rounds, copy and conversions in turn; warm page cache, no fsync; conversions read their output again"
    said = {"date": time.strftime("%Y-%m-%d"), "machine": machine, "method": method, "source_bytes": nbytes}
    BASELINE.write_text(json.dumps({**said, "figures": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
