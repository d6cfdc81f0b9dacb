"""The peer's half of ``autoround_against_peer.py``; runs under the Python that has auto-round 0.16, prints one JSON line.

Nothing of lowbit is imported here. The time is that of ``SignRoundQuantizer.quantize_block`` alone: no loading, no caching.
"""

import argparse
import json
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def perplexity(model, windows):
    """Return the perplexity over windows (n, length), each on its own."""
    total, count = 0.0, 0
    with torch.no_grad():
        for window in windows:
            logits = model(window[None]).logits[0, :-1].float()
            total += float(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
            count += len(window) - 1
    return float(torch.tensor(total / count).exp())


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("tokens", help="a file of torch.save: calibration (n, length) and heldout (n, length)")
    for name in ("bits", "group-size", "iters", "batch-size", "seed"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--asym", action="store_true")
    parser.add_argument("--extended", action="store_true", help="SignRoundV2: enable_alg_ext")
    flags = parser.parse_args()
    tokens = torch.load(flags.tokens)

    from auto_round import AutoRound
    from auto_round.algorithms.quantization.sign_round.quantizer import SignRoundQuantizer

    seconds, original = [], SignRoundQuantizer.quantize_block

    def timed(self, *args, **kwargs):
        start = time.perf_counter()
        result = original(self, *args, **kwargs)
        seconds.append(time.perf_counter() - start)
        return result

    SignRoundQuantizer.quantize_block = timed
    model = AutoModelForCausalLM.from_pretrained(flags.model, dtype=torch.float32)
    calibration = [{"input_ids": window[None]} for window in tokens["calibration"]]
    rounder = AutoRound(
        model,
        AutoTokenizer.from_pretrained(flags.model),
        bits=flags.bits,
        group_size=flags.group_size,
        sym=not flags.asym,
        iters=flags.iters,
        nsamples=len(calibration),
        seqlen=tokens["calibration"].shape[1],
        batch_size=flags.batch_size,
        dataset=calibration,
        seed=flags.seed,
        device_map="cpu",
        enable_alg_ext=flags.extended,
    )
    start = time.perf_counter()
    model, _ = rounder.quantize()
    whole = time.perf_counter() - start
    ppl = perplexity(model.float(), tokens["heldout"])
    print(json.dumps({"perplexity": ppl, "block_seconds": seconds, "seconds": whole}))


if __name__ == "__main__":
    main()
