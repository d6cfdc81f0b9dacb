"""The peer's half of ``autoround_against_peer.py`` and ``autoround_gpu.py``; runs under the Python that has auto-round 0.16.

Nothing of lowbit is imported here. The time is that of ``SignRoundQuantizer.quantize_block`` alone: no loading, no caching.
Prints one JSON line.
"""

import argparse
import json
import time
from importlib import metadata, util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


class Watch:
    """Seconds and GPU memory of every call of a method; ``file``, if given, is written anew after each of them."""

    def __init__(self, owner, method, device, file=None):
        self.gpu, self.file = device != "cpu", file
        self.seconds, self.peaks, self.between, self.facts = [], [], 0, {}
        self.began, original = time.perf_counter(), getattr(owner, method)

        def timed(*args, **kwargs):
            self.between = max(self.between, self._peak())
            start = time.perf_counter()
            result = original(*args, **kwargs)
            self._wait()
            self.seconds.append(time.perf_counter() - start)
            self.peaks.append(self._peak())
            self.save()
            return result

        setattr(owner, method, timed)

    def _wait(self):
        if self.gpu:
            torch.cuda.synchronize()

    def _peak(self):
        """Return the bytes that were allocated at most since the last call."""
        if not self.gpu:
            return 0
        self._wait()
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak

    def results(self):
        """Return what was measured so far; ``peak_bytes`` is that of the process, ``block_peak_bytes`` that of each call."""
        found = {"block_seconds": self.seconds, "seconds": time.perf_counter() - self.began}
        if self.gpu:
            self.between = max(self.between, self._peak())
            found |= {"block_peak_bytes": self.peaks, "peak_bytes": max(self.between, *self.peaks, 0)}
        return found

    def save(self):
        if self.file:
            Path(self.file).write_text(json.dumps({**self.results(), **self.facts, "versions": versions()}))


def versions():
    """Return the versions of what the figures depend on, as far as it is there."""
    modules = {"torch": "torch", "transformers": "transformers", "triton": "triton", "auto-round": "auto_round"}
    return {name: metadata.version(name) for name, module in modules.items() if util.find_spec(module)}


def perplexity(model, windows):
    """Return the perplexity over windows (n, length), each on its own."""
    total, count = 0.0, 0
    with torch.no_grad():
        for window in windows:
            logits = model(window[None]).logits[0, :-1].float()
            total += float(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
            count += len(window) - 1
    return float(torch.tensor(total / count).exp())


def sample(window, unmasked):
    """Return a sequence as auto-round takes it.

    It makes an attention mask for sequences without one, but none for its data sets; a mask rules out the fastest attention.
    """
    return {"input_ids": window[None], **({"attention_mask": None} if unmasked else {})}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("tokens", help="a file of torch.save: calibration (n, length), and heldout (n, length) or not")
    for name in ("bits", "group-size", "iters", "batch-size", "seed"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--asym", action="store_true")
    parser.add_argument("--extended", action="store_true", help="SignRoundV2: enable_alg_ext")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--unmasked", action="store_true", help="without an attention mask, as with its own data sets")
    parser.add_argument("--eager", action="store_true", help="without torch.compile, which is its default")
    parser.add_argument("--json", help="a file to keep the figures in, after every block")
    flags = parser.parse_args()
    tokens = torch.load(flags.tokens)

    from auto_round import AutoRound
    from auto_round.algorithms.quantization.sign_round.quantizer import SignRoundQuantizer

    watch = Watch(SignRoundQuantizer, "quantize_block", flags.device, flags.json)
    model = AutoModelForCausalLM.from_pretrained(flags.model, dtype=getattr(torch, flags.dtype))
    calibration = [sample(window, flags.unmasked) for window in tokens["calibration"]]
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
        device_map="cpu" if flags.device == "cpu" else 0,
        enable_alg_ext=flags.extended,
        enable_torch_compile=False if flags.eager else None,
    )
    watch.facts["torch_compile"] = rounder.enable_torch_compile
    watch.began = time.perf_counter()
    model, _ = rounder.quantize()
    watch.save()
    found = watch.results()
    if "heldout" in tokens:
        found["perplexity"] = perplexity(model.float(), tokens["heldout"])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
