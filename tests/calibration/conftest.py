"""Tiny models with tokenizers, and a quantizer that needs everything that calibration can give."""

import json
import os
import sys
import warnings
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

import lowbit


@pytest.fixture(scope="session")
def transformers():
    """transformers, imported with what it imports in turn, whose deprecations are not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = pytest.importorskip("transformers", reason="models are transformers models")
        import transformers.models.gemma3.modeling_gemma3
        import transformers.models.llama.modeling_llama
        import transformers.models.qwen3_moe.modeling_qwen3_moe  # noqa: F401
    return found


SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 257,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}


def write_tokenizer(folder: Path, template=None):
    """Write a tokenizer of single bytes and an end of text, 257 entries."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = sorted(ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({"<|end|>": 0, **{letter: number + 1 for number, letter in enumerate(alphabet)}}, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "bos_token": None}
    (folder / "tokenizer_config.json").write_text(
        json.dumps(settings | ({"chat_template": template} if template else {}))
    )


def save(model, folder):
    model.eval().save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def llama(transformers, tmp_path_factory):
    """The folder of a random Llama of three blocks, with biases."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, attention_bias=True, tie_word_embeddings=False)
    return save(transformers.LlamaForCausalLM(config), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def experts(transformers, tmp_path_factory):
    """The folder of a random mixture of four experts, two chosen for each token."""
    torch.manual_seed(0)
    own = {
        "moe_intermediate_size": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 16,
        "decoder_sparse_step": 1,
    }
    config = transformers.Qwen3MoeConfig(**SIZES, **own)
    return save(transformers.Qwen3MoeForCausalLM(config), tmp_path_factory.mktemp("experts"))


@pytest.fixture(scope="session")
def gemma(transformers, tmp_path_factory):
    """The folder of a random Gemma 3, whose blocks have different masks and rotations."""
    torch.manual_seed(0)
    kinds = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 8}
    config = transformers.Gemma3TextConfig(**SIZES, **kinds, head_dim=16)
    return save(transformers.Gemma3ForCausalLM(config), tmp_path_factory.mktemp("gemma"))


@pytest.fixture(scope="session")
def registry():
    """Everything installed, and the quantizers of ``quantizers.py``."""
    spec = spec_from_file_location("calibration_quantizers", Path(__file__).with_name("quantizers.py"))
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    found = lowbit.installed.__wrapped__()  # not the one that all other tests share
    for quantizer in (module.RoundQuantizer(), module.BlockQuantizer(), module.HessianQuantizer()):
        found.quantizers.register(quantizer)
    return found


@pytest.fixture
def tokens():
    """Six samples of sixteen tokens."""
    return torch.randint(1, 257, (6, 16), generator=torch.Generator().manual_seed(1))
