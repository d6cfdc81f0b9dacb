"""Wall time and GPU memory of ``lowbit convert`` with calibration, on an 8B-shaped model of random weights made on the spot.

    python bench/gpu_convert.py --recipe opt_rtn --recipe default          # 32 blocks of Llama-3.1-8B's shape, W4G128, one GPU
    python bench/gpu_convert.py --tiny --device cpu --recipe opt_rtn --recipe default

Everything is in the time: reading, calibration on 128 x 2048 tokens, tuning, packing, writing, reopening and comparing. Where it
went is measured around the calls below, in the thread that makes them; what runs beside the GPU (reading the next block, packing
the last one, keeping it for ``--resume``) is listed, too. Prints one JSON line for each recipe. The weights say nothing about quality; they cost what real ones cost.
"""

import argparse
import json
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from lowbit import convert as conversion
from lowbit.calibration import job
from lowbit.calibration.runner import BlockRunner
from lowbit.calibration.skeleton import Skeleton
from lowbit.calibration.workdir import WorkDirectory
from lowbit.cli import cli
from lowbit_autoround.quantizer import AutoRoundQuantizer

LARGE = {"hidden": 4096, "inner": 14336, "heads": 32, "keys": 8, "layers": 32, "vocabulary": 128256}
TINY = {"hidden": 256, "inner": 512, "heads": 4, "keys": 2, "layers": 3, "vocabulary": 512}
WATCHED = {
    "blocks": (BlockRunner, "_block"),
    "read": (Skeleton, "read"),
    "float forward, statistics": (BlockRunner, "_measure"),
    "quantize": (AutoRoundQuantizer, "quantize_block"),
    "quantized forward": (BlockRunner, "_carry"),
    "measure errors": (BlockRunner, "_errors"),
    "pack": (job, "_finish"),
    "keep finished blocks": (WorkDirectory, "add"),
    "commit activations": (WorkDirectory, "commit"),
    "write, reopen, compare": (conversion, "execute"),
    "reopen and compare": (conversion, "verify"),
}


def write_model(folder, shape, device):
    """Write config, byte tokenizer and a shard for each block; weights are Gaussian, norms 1."""
    folder.mkdir()
    hidden, inner, keys = shape["hidden"], shape["inner"], shape["hidden"] * shape["keys"] // shape["heads"]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["keys"],
        "num_hidden_layers": shape["layers"],
        "vocab_size": shape["vocabulary"],
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-5,
    }
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)
    attention = {
        "q_proj": (hidden, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, hidden),
    }
    mlp = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    shards = [{"model.embed_tokens": (shape["vocabulary"], hidden)}, {"model.norm": (hidden,)}]
    shards.append({"lm_head": (shape["vocabulary"], hidden)})
    for layer in range(shape["layers"]):
        block = {f"self_attn.{name}": size for name, size in attention.items()}
        block |= {f"mlp.{name}": size for name, size in mlp.items()}
        block |= dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (hidden,))
        shards.append({f"model.layers.{layer}.{name}": size for name, size in block.items()})
    generator, places = torch.Generator(device).manual_seed(0), {}
    for number, shard in enumerate(shards):
        file = f"model-{number:05d}.safetensors"
        save_file({f"{name}.weight": values(size, generator) for name, size in shard.items()}, folder / file)
        places |= {f"{name}.weight": file for name in shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def values(size, generator):
    if len(size) == 1:
        return torch.ones(size, dtype=torch.bfloat16)
    return (torch.randn(size, generator=generator, device=generator.device) * 0.02).bfloat16().cpu()


def write_tokenizer(folder):
    alphabet = sorted(ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({"<|end|>": 0, **{letter: number + 1 for number, letter in enumerate(alphabet)}}, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@contextmanager
def watching(seconds):
    """Add the seconds of every watched call to ``seconds``; on a GPU a call counts until its work is queued, or waited for."""
    originals = {name: getattr(owner, method) for name, (owner, method) in WATCHED.items()}

    def timed(name, original):
        def call(*args, **kwargs):
            start = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                with lock:
                    seconds[name] += time.perf_counter() - start
                if name == "blocks":
                    print(f"{time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)

        return call

    lock, began = threading.Lock(), time.perf_counter()
    for name, (owner, method) in WATCHED.items():
        setattr(owner, method, timed(name, originals[name]))
    try:
        yield
    finally:
        for name, (owner, method) in WATCHED.items():
            setattr(owner, method, originals[name])


def convert(model, folder, recipe, flags):
    """Run the command line as a user would; return what it took."""
    words = ["convert", str(model), str(folder / recipe), "-q", "autoround", "--recipe", recipe, "-b", "4", "-g", "128"]
    words += ["--device", flags.device, "--dataset", str(folder / "words.txt"), "--nsamples", str(flags.nsamples)]
    words += ["--seqlen", str(flags.seqlen), "--format", flags.format]
    on_gpu, seconds = flags.device != "cpu", Counter()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    with watching(seconds):
        cli.main(words, standalone_mode=False)
    whole = time.perf_counter() - start
    result = {"recipe": recipe, "seconds": round(whole, 1)}
    result["peak_gpu_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2) if on_gpu else None
    export, packing = seconds["write, reopen, compare"], seconds["measure errors"] + seconds["pack"]
    result["export_share"] = round(export / whole, 4)
    result["pack_and_export_share"] = round((packing + export) / whole, 4)
    result["pack_keep_and_export_share"] = round((packing + seconds["keep finished blocks"] + export) / whole, 4)
    result["where"] = {name: round(taken, 1) for name, taken in seconds.items()}
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", action="append", required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--layers", type=int, help="fewer blocks")
    parser.add_argument("--format", default="native")
    parser.add_argument("--tiny", action="store_true", help="a model of three small blocks and 16 x 64 tokens")
    parser.add_argument("--folder", type=Path, help="where the model and the results lie for the time being")
    flags = parser.parse_args()
    shape = dict(TINY if flags.tiny else LARGE)
    if flags.tiny:
        flags.nsamples, flags.seqlen = 16, 64
    shape["layers"] = flags.layers or shape["layers"]
    with tempfile.TemporaryDirectory(dir=flags.folder) as name:
        folder = Path(name)
        start = time.perf_counter()
        write_model(folder / "model", shape, flags.device)
        words = random.Random(0).choices(
            ["lorem", "ipsum", "dolor", "sit", "amet", "tempor"], k=flags.nsamples * flags.seqlen // 3
        )
        (folder / "words.txt").write_text(" ".join(words))
        print(f"wrote the model in {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
        for recipe in flags.recipe:
            print(json.dumps(convert(folder / "model", folder, recipe, flags)), flush=True)


if __name__ == "__main__":
    main()
