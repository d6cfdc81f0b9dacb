"""Seconds and device memory that tuning one decoder block of an 8B-shaped model takes on a GPU (random weights and inputs).

    python bench/gpu_autoround.py --iters 20      # 128 sequences of 2048 tokens, batch 8, W4G128

The shape is Llama-3.1-8B's; 32 such blocks at 200 steps are the default recipe. Prints one JSON line.
"""

import argparse
import json
import time

import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from lowbit.calibration.block import Block
from lowbit_autoround.options import AutoRoundOptions
from lowbit_autoround.quantizer import AutoRoundQuantizer

SHAPE = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 4096,
}


class RandomBlock(Block):
    """One decoder layer on the GPU, its activations in host memory as calibration keeps them."""

    def __init__(self, samples, tokens):
        config = LlamaConfig(**SHAPE)
        config._attn_implementation = "sdpa"
        generator = torch.Generator("cuda").manual_seed(0)
        self.name, self.samples = "model.layers.0", samples
        with torch.device("cuda"):
            self.module = LlamaDecoderLayer(config, 0).bfloat16().eval()
            rotary = LlamaRotaryEmbedding(config)
            self._rotary = rotary(torch.empty(1, dtype=torch.bfloat16), torch.arange(tokens)[None])
        paths = [path for path, module in self.module.named_modules() if isinstance(module, torch.nn.Linear)]
        self.linears = {f"{self.name}.{path}.weight": path for path in paths}
        with torch.no_grad():
            for path in paths:
                weight = self.module.get_submodule(path).weight
                weight.copy_(torch.randn(weight.shape, generator=generator, device="cuda") * 0.02)
            self._inputs = torch.randn(samples, tokens, 4096, generator=generator, device="cuda").bfloat16().cpu()
            self._targets = torch.empty_like(self._inputs)
            for start in range(0, samples, 8):
                self._targets[start : start + 8] = self.forward(self._inputs[start : start + 8].cuda()).cpu()

    def inputs(self, index):
        return self._inputs[list(index)].cuda()

    def targets(self, index):
        return self._targets[list(index)].cuda()

    def mask(self, index):
        return torch.ones(len(index), self._inputs.shape[1], dtype=torch.bool)

    def forward(self, hidden):
        return self.module(hidden, position_embeddings=self._rotary)

    def log(self, text):
        self.report = text


def profile(quantizer, weights, block):
    options = AutoRoundOptions(4, 128, iters=4)
    with torch.profiler.profile() as profiler:
        quantizer.quantize_block(weights, dict.fromkeys(weights, options), {}, block)
    print(profiler.key_averages().table(sort_by="self_cuda_time_total", row_limit=24, max_name_column_width=48))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iters", type=int, default=20)
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--tokens", type=float, default=0.5)
    parser.add_argument("--profile", action="store_true", help="print where the device's time goes")
    flags = parser.parse_args()
    block = RandomBlock(flags.nsamples, flags.seqlen)
    weights = {name: block.module.get_submodule(path).weight.detach() for name, path in block.linears.items()}
    quantizer = AutoRoundQuantizer()
    if flags.profile:
        profile(quantizer, weights, block)
    for iters in (2, flags.iters):
        options = AutoRoundOptions(4, 128, iters=iters, tokens=flags.tokens)
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        start = time.perf_counter()
        quantizer.quantize_block(weights, dict.fromkeys(weights, options), {}, block)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated()
    print(json.dumps({"seconds": seconds, "iters": flags.iters, "peak_bytes": peak, "report": block.report}))


if __name__ == "__main__":
    main()
