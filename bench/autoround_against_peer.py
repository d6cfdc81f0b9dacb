"""AutoRound here against auto-round 0.16: the same model, sequences, seed and settings; perplexity and seconds per block.

    pip install auto-round==0.16.* transformers       # in an environment of its own
    python bench/autoround_against_peer.py MODEL CALIBRATION.txt HELDOUT.txt --peer-python ENV/bin/python

Both tune float32 models on the CPU with the threads that OMP_NUM_THREADS allows, and are timed around the tuning of a block
alone: no loading, no caching of inputs, no packing. The peer compiles its first block, so the median block is compared.
Perplexity is that of the first 12 windows of 1024 tokens of HELDOUT.txt, each on its own. ``--layers N`` cuts the model.
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
from autoround_peer import perplexity
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowbit import dequantize
from lowbit.calibration.block import Block
from lowbit_autoround.options import AutoRoundOptions
from lowbit_autoround.quantizer import AutoRoundQuantizer

SETTINGS = {"W4G128": (4, 128), "W3G128": (3, 128), "W2G64": (2, 64), "W4G64": (4, 64), "W3G64": (3, 64)}
USUAL = ("W4G128", "W3G128", "W2G64")
HELDOUT_WINDOWS, HELDOUT_TOKENS = 12, 1024
LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LINEARS += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


class LlamaBlock(Block):
    """A decoder layer of a model in memory, with both chains of activations as two tensors."""

    def __init__(self, model, place, quantized_inputs, float_inputs):
        self.name, self.module = f"model.layers.{place}", model.model.layers[place]
        self.linears = {f"{self.name}.{path}.weight": path for path in LINEARS}
        self.samples = len(quantized_inputs)
        self.report = ""
        self._inputs = quantized_inputs
        positions = torch.arange(quantized_inputs.shape[1])[None]
        self._rotary = model.model.rotary_emb(quantized_inputs[:1], positions)
        self._targets = torch.empty_like(float_inputs)
        with torch.no_grad():
            for sample in range(self.samples):
                self._targets[sample] = self.forward(float_inputs[sample : sample + 1])[0]

    def inputs(self, index):
        return self._inputs[list(index)]

    def targets(self, index):
        return self._targets[list(index)]

    def mask(self, index):
        return torch.ones(len(index), self._inputs.shape[1], dtype=torch.bool)

    def forward(self, hidden):
        return self.module(hidden, position_embeddings=self._rotary)

    def log(self, text):
        self.report = text


def tune(model, calibration, options):
    """Quantize every block of ``model`` in place; return the seconds that tuning each of them took."""
    quantizer, seconds = AutoRoundQuantizer(), []
    with torch.no_grad():
        floats = quantized = model.model.embed_tokens(calibration)
    for place in range(len(model.model.layers)):
        block = LlamaBlock(model, place, quantized, floats)
        weights = {name: block.module.get_submodule(path).weight.detach() for name, path in block.linears.items()}
        start = time.perf_counter()
        results = quantizer.quantize_block(weights, dict.fromkeys(weights, options), {}, block)
        seconds.append(time.perf_counter() - start)
        print(f"  {block.name} {seconds[-1]:.1f} s, {block.report}", file=sys.stderr)
        floats = block.targets(range(block.samples))
        with torch.no_grad():
            for name, result in results.items():
                weights[name].copy_(dequantize(result))
            quantized = torch.cat([block.forward(quantized[i : i + 1]) for i in range(block.samples)])
    return seconds


def sequences(tokenizer, text, count, length):
    """Return ``count`` windows of ``length`` tokens, spread evenly over the text."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    step = max(length, len(ids) // count)
    return torch.tensor([ids[i * step : i * step + length] for i in range(count)])


def windows(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return torch.tensor(ids[: HELDOUT_WINDOWS * HELDOUT_TOKENS]).view(HELDOUT_WINDOWS, HELDOUT_TOKENS)


def peer(python, model, tokens, bits, group_size, flags):
    settings = {"bits": bits, "group-size": group_size, "iters": flags.iters, "batch-size": 8, "seed": flags.seed}
    command = [python, str(Path(__file__).with_name("autoround_peer.py")), str(model), str(tokens)]
    command += [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    command += ["--extended"] if flags.extended else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the peer failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def ours(model, tokens, bits, group_size, flags):
    scale = "search" if flags.extended else None
    trim = 0.001 if flags.extended and bits < 4 else 0.0
    wanted = {"iters": flags.iters, "tokens": flags.tokens, "seed": flags.seed, "scale": scale, "trim": trim}
    options = AutoRoundOptions(bits, group_size, batch_size=8, **wanted)
    found = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    seconds = tune(found, tokens["calibration"], options)
    return {"perplexity": perplexity(found, tokens["heldout"]), "block_seconds": seconds}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "calibration", "heldout"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--peer-python", help="the interpreter that has auto-round; without it only ours runs")
    parser.add_argument("--iters", type=int, default=50)
    parser.add_argument("--nsamples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument(
        "--tokens", type=float, help="share of the tokens that a step here counts, instead of the default"
    )
    parser.add_argument("--layers", type=int, help="use the first layers only")
    parser.add_argument("--setting", choices=SETTINGS, action="append")
    parser.add_argument(
        "--extended", action="store_true", help="SignRoundV2: searched scales, trimmed loss under 4 bits"
    )
    parser.add_argument("--skip-ours", action="store_true")
    flags = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(flags.model)
    tokens = {
        "calibration": sequences(tokenizer, flags.calibration.read_text(), flags.nsamples, flags.seqlen),
        "heldout": windows(tokenizer, flags.heldout.read_text()),
    }
    with tempfile.TemporaryDirectory() as folder:
        model, saved = flags.model, Path(folder) / "tokens.pt"
        torch.save(tokens, saved)
        if flags.layers:
            model = Path(folder) / "model"
            cut = AutoModelForCausalLM.from_pretrained(flags.model, num_hidden_layers=flags.layers)
            cut.save_pretrained(model)
            tokenizer.save_pretrained(model)
        for setting in flags.setting or USUAL:
            results = {} if flags.skip_ours else {"lowbit": ours(model, tokens, *SETTINGS[setting], flags)}
            if flags.peer_python:
                results["auto-round"] = peer(flags.peer_python, model, saved, *SETTINGS[setting], flags)
            for name, result in results.items():
                median = statistics.median(result["block_seconds"])
                said = f"perplexity {result['perplexity']:.3f}, {median:.2f} s a block"
                print(f"{setting} seed {flags.seed} {name:10} {said}", flush=True)


if __name__ == "__main__":
    main()
