"""A layout that stores parts as they are, and tiny models of every kind that the loader must know."""

import json
import os
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

import lowbit
from lowbit import Grid, PackedTensor, Packer, QuantizedTensor, ReferenceKernel, Registry, ScaleFormat, Scheme
from lowbit.convert import convert
from lowbit.parts import TensorSpec, part_specs
from lowbit.plan import Target
from lowbit.recipe import Recipe, Rule
from lowbit.testing import samples

SCHEME = Scheme(Grid.AFFINE, 4, 8, scales=ScaleFormat("float16"))
SHAPE = (24, 16)


class PartsPacker(Packer):
    """Stores every part as it is, the codes under the name that adapters look for."""

    layout = "parts"

    def why_not(self, scheme, shape):
        return None

    def specs(self, scheme, shape):
        return {_buffer(name): spec for name, spec in part_specs(scheme, shape).items()}

    def pack(self, quantized):
        buffers = {_buffer(name): part for name, part in quantized.parts.items()}
        return PackedTensor(self.spec(quantized.scheme, quantized.shape), buffers)

    def unpack(self, packed):
        parts = {name: packed.buffers[_buffer(name)] for name in part_specs(packed.scheme, packed.shape)}
        return QuantizedTensor(packed.scheme, packed.shape, parts)


class WeightPacker(PartsPacker):
    """Calls its buffers as bitsandbytes does: ``weight`` and names with dots."""

    layout = "awkward-names"

    def specs(self, scheme, shape):
        return {"weight": TensorSpec(torch.uint8, shape), "weight.absmax": part_specs(scheme, shape)["scales"]}

    def pack(self, quantized):
        buffers = {"weight": quantized.parts["codes"], "weight.absmax": quantized.parts["scales"]}
        return PackedTensor(self.spec(quantized.scheme, quantized.shape), buffers)

    def unpack(self, packed):
        parts = {"codes": packed.buffers["weight"], "scales": packed.buffers["weight.absmax"]}
        return QuantizedTensor(packed.scheme, packed.shape, parts)


def _buffer(part):
    return "qweight" if part == "codes" else part


@pytest.fixture
def registry():
    found = Registry()
    for packer in (PartsPacker(), WeightPacker()):
        found.packers.register(packer)
        found.kernels.register(ReferenceKernel(packer))
    return found


@pytest.fixture
def packed():
    return PartsPacker().pack(samples.quantized(SCHEME, SHAPE))


@pytest.fixture
def layer(packed, registry):
    bias = torch.randn(SHAPE[0], generator=torch.Generator().manual_seed(1))
    return lowbit.QuantLinear.from_packed(packed, bias, registry=registry)


@pytest.fixture(scope="session")
def transformers():
    """transformers, imported with what it imports in turn (hqq, where installed), whose deprecations are not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = pytest.importorskip("transformers", reason="models are transformers models")
        import transformers.models.gemma3.modeling_gemma3
        import transformers.models.llama.modeling_llama
        import transformers.models.mixtral.modeling_mixtral
        import transformers.models.phi3.modeling_phi3
        import transformers.models.qwen3_moe.modeling_qwen3_moe
        import transformers.quantizers.auto  # noqa: F401
    return found


def small(transformers, kind, config=None, **changes):
    """A model of 64 columns and two layers, with random weights of a fixed seed, unless ``changes`` say otherwise."""
    torch.manual_seed(0)
    settings = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 257,
        "initializer_range": 0.2,
    }
    made = getattr(transformers, config or f"{kind}Config")(**{**settings, **changes})
    return getattr(transformers, f"{kind}ForCausalLM")(made).eval()


def tiny_llama(transformers, tied=True, **changes):
    """Tied embeddings, or biases on the attention."""
    settings = {"max_position_embeddings": 128, "attention_bias": not tied, "tie_word_embeddings": tied}
    return small(transformers, "Llama", **{**settings, **changes})


def experts_model(transformers):
    """Four experts in each layer, two of them chosen for each token."""
    experts = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1}
    return small(transformers, "Qwen3Moe", head_dim=16, **experts)


def mixtral_model(transformers):
    """One layer of four experts, which its checkpoints name w1, w2 and w3, in a module of another name than the model's."""
    return small(transformers, "Mixtral", num_hidden_layers=1, num_local_experts=4, num_experts_per_tok=2)


def gemma_model(transformers):
    """Norms around everything, scaled tied embeddings and a window of attention."""
    window = {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16}
    return small(transformers, "Gemma3", "Gemma3TextConfig", **window)


def phi_model(transformers):
    """Query, key and value share a linear, and so do gate and up."""
    return small(transformers, "Phi3", pad_token_id=0)


MODELS = {
    "tied": lambda transformers: tiny_llama(transformers),
    "untied": lambda transformers: tiny_llama(transformers, tied=False),
    "experts": experts_model,
    "mixtral": mixtral_model,
    "gemma": gemma_model,
    "phi": phi_model,
}


def write_tokenizer(folder: Path, template=None):
    """Write a tokenizer of single bytes and an end of text, 257 entries."""
    from tokenizers import Tokenizer
    from tokenizers.decoders import ByteLevel as ByteLevelDecoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = sorted(ByteLevel.alphabet())
    vocabulary = {"<|endoftext|>": 0, **{letter: number + 1 for number, letter in enumerate(alphabet)}}
    tokenizer = Tokenizer(BPE(vocabulary, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "bos_token": None}
    settings |= {"chat_template": template} if template else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def quantized_copy(source: Path, destination: Path, target="native", rules=()):
    """Convert a folder with round-to-nearest, in 4 bits and groups of 32 unless the target has a variant."""
    settings = {} if ":" in target else {"bits": "4", "group_size": "32"}
    recipe = Recipe(Rule("*", "autoround", settings), tuple(rules))
    convert(source, destination, Target.parse(target), lowbit.installed(), recipe)
    return destination


@pytest.fixture(scope="session", params=MODELS)
def pair(request, transformers, tmp_path_factory):
    """A quantized native folder, and the same weights as a plain ``hf`` folder, for each kind of model."""
    folder = tmp_path_factory.mktemp(request.param)
    MODELS[request.param](transformers).save_pretrained(folder / "base")
    packed = quantized_copy(folder / "base", folder / "packed")
    convert(packed, folder / "plain", Target("hf"), lowbit.installed())
    return packed, folder / "plain"


@pytest.fixture(scope="session")
def llama_folder(transformers, tmp_path_factory):
    """A quantized tiny Llama with a tied embedding."""
    folder = tmp_path_factory.mktemp("llama")
    tiny_llama(transformers).save_pretrained(folder / "base")
    return quantized_copy(folder / "base", folder / "packed")


@pytest.fixture
def tokens():
    return torch.randint(0, 128, (2, 9), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="session")
def tiny(transformers):
    """Make a tiny Llama; arguments as of ``tiny_llama``."""
    return lambda *arguments, **changes: tiny_llama(transformers, *arguments, **changes)


@pytest.fixture(scope="session")
def add_tokenizer(transformers):
    """Write a byte tokenizer into a folder; arguments as of ``write_tokenizer``."""
    return write_tokenizer


@pytest.fixture(scope="session")
def quantize():
    """Convert a folder with round-to-nearest; arguments as of ``quantized_copy``."""
    return quantized_copy


@pytest.fixture(scope="session")
def tiny_experts(transformers):
    """Make a tiny mixture of experts."""
    return lambda: experts_model(transformers)


@pytest.fixture(scope="session")
def tiny_gemma(transformers):
    """Make a tiny Gemma 3."""
    return lambda: gemma_model(transformers)
