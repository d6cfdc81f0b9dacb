"""transformers as the judge: models that it made and saved are written as GGUF, and what it reads of them computes the same."""

import gguf
import pytest
import torch

from lowbit.convert import convert
from lowbit.plan import Target
from lowbit.plugins import installed
from lowbit.recipe import NOTHING
from lowbit_formats.gguf.architectures import ARCHITECTURES
from lowbit_formats.gguf.header import read_header

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own deprecations are not ours to fail on
TEXT = ["the cat sat on the mat in 2024, and the dog sat on the cat", "a cat and a dog and a mat"] * 20
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 320,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
LOCAL = {"rope_type": "default", "rope_theta": 5000.0}
LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 256}
LONG |= {
    "short_factor": [1.0, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6],
    "long_factor": [float(2 + step) for step in range(8)],
}
PARTIAL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}
GEMMA = {"sliding_window": 32, "query_pre_attn_scalar": 256, "head_dim": 256, "num_hidden_layers": 7}
CASES = {
    "llama": ("Llama", {"tie_word_embeddings": True}),
    "llama-bias": ("Llama", {"attention_bias": True, "mlp_bias": True, "hidden_size": 64, "rope_parameters": LINEAR}),
    "llama-3": ("Llama", {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 128}}),
    "llama-yarn": ("Llama", {"rope_parameters": YARN}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 128}),
    "gemma3": ("Gemma3", GEMMA),
    "gemma3-linear": ("Gemma3", {**GEMMA, "rope_parameters": {"full_attention": LINEAR, "sliding_attention": LOCAL}}),
    "mistral-heads": ("Mistral", {"sliding_window": None, "head_dim": 32}),
    "phi3": ("Phi3", {"head_dim": None, "original_max_position_embeddings": 256}),
    "phi3-longrope": ("Phi3", {"head_dim": None, "max_position_embeddings": 512, "rope_parameters": LONG}),
    "phi3-partial": ("Phi3", {"head_dim": None, "rope_parameters": PARTIAL, "original_max_position_embeddings": 256}),
    "qwen2-yarn": ("Qwen2", {"rope_parameters": YARN}),
}
READ_BY_TRANSFORMERS = ("llama", "mistral", "qwen2", "qwen3", "gemma3", "phi3")
"""Cases whose GGUF transformers computes rightly; it ignores rope scaling and biases of llama there."""


@pytest.fixture(scope="module")
def tokenizer():
    """A byte-level BPE tokenizer that splits like GPT-2's, trained here."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(TEXT, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>", bos_token="<|end|>")


def saved(case, tokenizer, folder):
    """Save a model of random weights as transformers saves it, and return it."""
    family, changes = CASES[case]
    config_class = getattr(transformers, "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config")
    config = config_class(**{name: value for name, value in {**SHAPE, **changes}.items() if value is not None})
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                around = 0.0 if family == "Gemma3" or name.endswith("bias") else 1.0
                parameter.copy_((around + torch.randn(parameter.shape) * 0.25).mul(256).round() / 256)
            else:
                parameter.copy_(torch.randn(parameter.shape) * 0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def logits_of(model):
    tokens = torch.arange(3, 103).view(2, 50)
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize("case", CASES)
def test_there_and_back_computes_the_same(case, tokenizer, tmp_path):
    model = saved(case, tokenizer, tmp_path / "hf")
    registry = installed()
    convert(tmp_path / "hf", tmp_path / "model.gguf", Target("gguf"), registry, NOTHING)
    convert(tmp_path / "model.gguf", tmp_path / "again", Target("hf"), registry, NOTHING)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    wanted, found = model.state_dict(), again.state_dict()
    assert wanted.keys() == found.keys()
    for name, weight in wanted.items():
        assert torch.equal(weight, found[name]), name
    assert torch.allclose(logits_of(again), logits_of(model), rtol=0, atol=1e-5)
    written = tokenizers.Tokenizer.from_file(str(tmp_path / "again" / "tokenizer.json"))
    assert [written.encode(text).ids for text in TEXT] == tokenizer(TEXT).input_ids


@pytest.mark.parametrize("case", READ_BY_TRANSFORMERS)
def test_transformers_reads_the_file_alike(case, tokenizer, tmp_path):
    pytest.importorskip("accelerate")
    model = saved(case, tokenizer, tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "model.gguf", Target("gguf"), installed(), NOTHING)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    assert torch.allclose(logits_of(theirs), logits_of(model), rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_the_same(case, tokenizer, tmp_path):
    """Its key-value cache is fp16: measured differences are 1e-3 to 4e-3 of logits up to 3.7."""
    llama_cpp = pytest.importorskip("llama_cpp")
    model = saved(case, tokenizer, tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "model.gguf", Target("gguf"), installed(), NOTHING)
    tokens = list(range(3, 53))
    theirs = llama_cpp.Llama(str(tmp_path / "model.gguf"), n_ctx=64, n_threads=1, logits_all=True, verbose=False)
    theirs.eval(tokens)
    found = torch.tensor(theirs.scores[: len(tokens)])
    with torch.no_grad():
        wanted = model(torch.tensor([tokens])).logits[0]
    assert torch.allclose(found, wanted, rtol=0, atol=0.02)
    assert torch.equal(found.argmax(1), wanted.argmax(1))
    text = TEXT[0]
    assert theirs.tokenize(text.encode(), add_bos=True, special=True) == tokenizer(text).input_ids
    theirs.close()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tensor_names_are_those_of_the_gguf_package(name):
    architecture = ARCHITECTURES[name]
    theirs = gguf.get_tensor_name_map(next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name), 3)
    for hf_name in [*architecture.required(3), "lm_head.weight"]:
        assert theirs.get_name(hf_name, (".weight",)) == architecture.ggml_name(hf_name, 3)


def test_llama_3_factors_are_llama_cpps():
    """The published parameters of Llama 3.1, and the factors as its converted files hold them (first, middle, last)."""
    from lowbit_formats.gguf.rope import llama3_factors

    factors = llama3_factors({**LLAMA3, "original_max_position_embeddings": 8192}, 128)
    assert factors[:29].tolist() == [1.0] * 29
    assert factors[-28:].tolist() == [8.0] * 28
    assert sorted(factors.tolist()) == factors.tolist()


def test_weights_that_are_tied_are_stored_once(tokenizer, tmp_path):
    saved("qwen2", tokenizer, tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "model.gguf", Target("gguf"), installed(), NOTHING)
    assert "output.weight" not in {tensor.name for tensor in read_header(tmp_path / "model.gguf").tensors}
