"""What outliers buy: perplexity of a small model at 2 bits with and without them, stored bits counted to the last row pointer.

    python bench/outliers.py MODEL TEXT [--calibration TEXT] [--windows 12] [--json FILE]

Every line quantizes all linear layers of MODEL from its own weights. With --calibration the last lines tune with AutoRound.
"""

import argparse
import json
import time
from pathlib import Path

import torch

import lowbit
from lowbit.calibration.runner import run_blocks
from lowbit.evaluation.scores import evaluate
from lowbit.evaluation.windows import cut
from lowbit.recipe import Recipe, Rule

KBIT = {"bits": "2", "scale": "search"}
ROUND = {"bits": "2", "scale": "search"}
TUNED = {"bits": "2", "scale": "search", "iters": "20", "batch_size": "4"}
LINES = [
    ("kbit", {**KBIT, "group_size": "128"}),
    ("kbit", {**KBIT, "group_size": "64"}),
    ("kbit", {**KBIT, "group_size": "32"}),
    ("kbit", {**KBIT, "group_size": "24"}),
    ("kbit", {**KBIT, "group_size": "128", "outliers": "0.5%"}),
    ("kbit", {**KBIT, "group_size": "64", "outliers": "0.5%"}),
    ("kbit", {**KBIT, "group_size": "64", "outliers": "1%"}),
    ("autoround", {**ROUND, "group_size": "64"}),
    ("autoround", {**ROUND, "group_size": "32"}),
    ("autoround", {**ROUND, "group_size": "24"}),
    ("autoround", {**ROUND, "group_size": "64", "outliers": "0.5%"}),
    ("autoround", {**ROUND, "group_size": "64", "outliers": "1%"}),
    ("binary", {"group_size": "128"}),
    ("binary", {"group_size": "64"}),
    ("binary", {"group_size": "128", "outliers": "0.5%"}),
]
TUNED_LINES = [
    ("autoround", {**TUNED, "group_size": "64"}),
    ("autoround", {**TUNED, "group_size": "32"}),
    ("autoround", {**TUNED, "group_size": "24"}),
    ("autoround", {**TUNED, "group_size": "64", "outliers": "0.5%"}),
    ("autoround", {**TUNED, "group_size": "64", "outliers": "1%"}),
    ("autoround", {**TUNED, "group_size": "128", "outliers": "1%"}),
]
SAMPLES, LENGTH = 32, 256


def weights_of(path, quantizer, settings, registry, tokens):
    """Yield name, what the codes mean, and stored bits of every linear layer."""
    with registry.open(path) as checkpoint:
        choices = Recipe(Rule("*", quantizer, settings)).choose(checkpoint.entries, registry)
        if tokens is None:
            found = (
                (name, choice.quantizer.quantize(checkpoint.read(name), choice.options))
                for name, choice in choices.items()
            )
        else:
            blocks = run_blocks(checkpoint, choices, tokens, registry)
            found = ((name, quantized) for block in blocks for name, quantized in block.quantized.items())
        for name, quantized in found:
            packer = registry.route(quantized.scheme, quantized.shape, "native").packer
            yield name, lowbit.dequantize(quantized), 8 * packer.spec(quantized.scheme, quantized.shape).nbytes


def measure(path, model, windows, quantizer, settings, registry, tokens=None):
    """Put the quantized weights into the model, score it, and put the old ones back."""
    parameters, kept, bits, started = dict(model.named_parameters()), {}, 0, time.perf_counter()
    for name, weight, stored in weights_of(path, quantizer, settings, registry, tokens):
        kept[name] = parameters[name].data
        parameters[name].data = weight.to(kept[name].dtype)
        bits += stored
    seconds = time.perf_counter() - started
    (score,), _ = evaluate([model], windows)
    for name, weight in kept.items():
        parameters[name].data = weight
    return {
        "quantizer": quantizer,
        "settings": settings,
        "tuned": tokens is not None,
        "bits_per_weight": round(bits / sum(weight.numel() for weight in kept.values()), 3),
        "perplexity": round(score.perplexity, 2),
        "seconds": round(seconds, 1),
    }


def main():
    """Print a line for each setting as it is done."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    registry = lowbit.installed()
    model = lowbit.load(arguments.model, "cpu", torch.float32)
    tokenizer = lowbit.load_tokenizer(arguments.model)
    windows = cut(tokenizer, arguments.text.read_text(), 1024, 1024, None, arguments.windows)
    (base,), _ = evaluate([model], windows)
    print(f"base: {base.perplexity:.2f}", flush=True)
    lines = [(*line, None) for line in LINES]
    if arguments.calibration:
        text = arguments.calibration.read_text()[: 16 * SAMPLES * LENGTH]
        tokens = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        lines += [(*line, tokens[: SAMPLES * LENGTH].view(SAMPLES, LENGTH)) for line in TUNED_LINES]
    results = []
    for quantizer, settings, tokens in lines:
        results.append(measure(arguments.model, model, windows, quantizer, settings, registry, tokens))
        print(json.dumps(results[-1]), flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps({"base": base.perplexity, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
