"""What each loader takes of each format: one table, read from the sources of the versions that it names.

vLLM 0.33.0, SGLang 0.5.23, transformers 5.23.0, llama.cpp as of ggml 0.25.3, mlx-lm as of 2026-08. Each row is what their
loaders check or their kernels accept. The rows of llama.cpp and transformers were tried, too (tests/oracles); that transformers
with compressed-tensors 0.20.0 loads no asymmetric pack-quantized file, because it expects zero points unpacked, was found so.
"""

from __future__ import annotations

from lowbit.loaders import LoaderRule

MARLIN_GROUPS = (None, 32, 64, 128)
GGUF_MODELS = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "gemma3", "phi3")

TABLE: dict[str, tuple[LoaderRule, ...]] = {
    "gptq": (
        LoaderRule(
            "vllm",
            "0.33.0",
            bits=(4, 8),
            symmetric=True,
            group_sizes=MARLIN_GROUPS,
            permutation=False,
            fused=True,
            whole_groups=True,
            casts_scales=True,
        ),
        LoaderRule(
            "sglang",
            "0.5.23",
            bits=(4, 8),
            symmetric=True,
            group_sizes=MARLIN_GROUPS,
            fused=True,
            whole_groups=True,
            casts_scales=True,
        ),
        LoaderRule(
            "transformers",
            "5.23.0",
            bits=(2, 3, 4, 8),
            uniform=True,
            lm_head=False,
            whole_groups=True,
            note="transformers loads GPTQ with the packages optimum and gptqmodel",
        ),
    ),
    "awq": (
        LoaderRule(
            "vllm",
            "0.33.0",
            bits=(4,),
            group_sizes=MARLIN_GROUPS,
            out_multiple=8,
            fused=True,
            uniform=True,
            whole_groups=True,
            casts_scales=True,
        ),
        LoaderRule(
            "sglang",
            "0.5.23",
            bits=(4,),
            group_sizes=MARLIN_GROUPS,
            out_multiple=8,
            fused=True,
            uniform=True,
            whole_groups=True,
            casts_scales=True,
        ),
        LoaderRule(
            "transformers",
            "5.23.0",
            bits=(4,),
            out_multiple=8,
            uniform=True,
            whole_groups=True,
            note="transformers loads AWQ with the package gptqmodel",
        ),
    ),
    "compressed-tensors": (
        LoaderRule("vllm", "0.33.0", bits=(2, 3, 4, 5, 6, 7, 8), permutation=False, fused=True, whole_groups=True),
        LoaderRule("sglang", "0.5.23", bits=(4, 8), permutation=False, fused=True, whole_groups=True),
        LoaderRule(
            "transformers",
            "5.23.0",
            bits=(2, 3, 4, 5, 6, 7, 8),
            symmetric=True,
            note="transformers loads compressed-tensors with the package of that name, 0.15 or newer",
        ),
    ),
    "auto-round": (
        LoaderRule(
            "vllm",
            "0.33.0",
            bits=(2, 3, 4, 8),
            symmetric=True,
            permutation=False,
            fused=True,
            whole_groups=True,
            note="vLLM runs 2- and 3-bit weights through the package humming-kernels, on NVIDIA GPUs",
        ),
        LoaderRule("sglang", "0.5.23", bits=(2, 3, 4, 8), permutation=False, fused=True, whole_groups=True),
        LoaderRule(
            "transformers",
            "5.23.0",
            bits=(2, 3, 4, 8),
            note="transformers loads auto-round with the package of that name",
        ),
    ),
    "gguf": (
        LoaderRule("llama.cpp", "ggml 0.25.3", model_types=GGUF_MODELS),
        LoaderRule(
            "transformers",
            "5.23.0",
            model_types=GGUF_MODELS,
            refused_layouts=("gguf-q2_0", "gguf-q1_0"),
            note="transformers dequantizes GGUF files on load, with the package gguf",
        ),
        LoaderRule(
            "vllm",
            "0.33.0",
            refused_layouts=("gguf-q2_0", "gguf-q1_0", "gguf-tq1_0", "gguf-tq2_0", "gguf-mxfp4"),
            note="vLLM loads GGUF files with the package vllm-gguf-plugin",
        ),
        LoaderRule("sglang", "0.5.23", refused_layouts=("gguf-q2_0", "gguf-q1_0")),
    ),
    "bitsandbytes": (
        LoaderRule("transformers", "5.23.0", note="transformers loads bitsandbytes with the package of that name"),
        LoaderRule("sglang", "0.5.23"),
    ),
    "mlx": (LoaderRule("mlx", "mlx-lm 2026-08", bits=(2, 3, 4, 5, 6, 8), group_sizes=(32, 64, 128)),),
    "hf": (
        LoaderRule("transformers", "5.23.0"),
        LoaderRule("vllm", "0.33.0"),
        LoaderRule("sglang", "0.5.23"),
        LoaderRule("mlx", "mlx-lm 2026-08"),
    ),
}


def loader_rules(format: str) -> tuple[LoaderRule, ...]:
    """Return the rows of one format."""
    return TABLE.get(format, ())
