"""Whole models in llama.cpp: what lowbit writes loads, computes what transformers computes, and is as good as llama-quantize's."""

import argparse
import inspect
import json
import logging
import random
import re
import subprocess
import unittest

import numpy as np
import pytest
import torch

from lowbit.convert import convert
from lowbit.plan import Target
from lowbit.plugins import installed
from lowbit.recipe import NOTHING, Recipe, Rule
from lowbit_formats import gguf_mixes
from lowbit_formats.gguf.header import read_header

transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.network,
    pytest.mark.filterwarnings("ignore"),  # transformers' own deprecations are not ours to fail on
]
GGML = Recipe(Rule("*", "ggml"))
PROMPTS = (
    "The capital of France is",
    "def add(a, b):\n    return",
    "1, 2, 3, 4, 5,",
    "<|im_start|>user\nName three colours.<|im_end|>\n<|im_start|>assistant\n",
)
LENGTH = 24
CHUNK, CHUNKS = 512, 4
PROSE = (random, re, json, argparse, subprocess, unittest, logging.Logger, argparse.ArgumentParser, subprocess.Popen)
SEARCHED = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def float16(smollm2, folder):
    """SmolLM2 as a float16 GGUF written by lowbit: the source that both quantizers start from."""
    convert(smollm2, folder / "hf", Target("hf"), installed())
    convert(folder / "hf", folder / "f16.gguf", Target("gguf", dtype=torch.float16), installed(), NOTHING)
    return folder / "f16.gguf"


def converted(float16, name):
    """The source quantized by lowbit to a file type; made once."""
    path = float16.with_name(f"{name}.gguf")
    if not path.exists():
        convert(float16, path, Target.parse(f"gguf:{name}"), installed(), GGML)
    return path


def exported(path):
    """The same weights as transformers loads them."""
    folder = path.with_suffix(".hf")
    convert(path, folder, Target("hf"), installed())
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def text():
    """English prose that every Python has: what its modules say of themselves."""
    return "\n\n".join(inspect.getdoc(thing) for thing in PROSE)


@pytest.fixture(scope="module")
def chunks(float16, llama, text):
    model = llama.model(float16)
    tokens = model.tokenize(text)
    model.close()
    assert len(tokens) >= CHUNK * CHUNKS
    return [tokens[start * CHUNK : (start + 1) * CHUNK] for start in range(CHUNKS)]


@pytest.mark.parametrize(("name", "tie"), [("f16", 0.0), ("q8_0", 0.25)])
def test_greedy_tokens_are_those_of_transformers(name, tie, float16, llama):
    """For Q8_0 llama.cpp rounds activations to 8 bits, which moves logits by 0.2 on average (measured 2026-11-21).

    A choice between two tokens whose logits are nearer than that may differ, and with it all that follows.
    """
    path = float16 if name == "f16" else converted(float16, name)
    theirs, ours = llama.model(path), exported(path)
    same = 0
    for prompt in PROMPTS:
        tokens = theirs.tokenize(prompt)
        found = theirs.greedy(tokens, LENGTH)
        wanted, margins = greedy(ours, tokens)
        same += found == wanted
        different = [step for step in range(LENGTH) if found[step] != wanted[step]]
        assert not different or margins[different[0]] < tie, (prompt, different)
    theirs.close()
    assert same >= (len(PROMPTS) if name == "f16" else 2)


def greedy(model, tokens):
    """Return LENGTH greedy tokens of transformers, and by how much the logit of each leads."""
    options = {"max_new_tokens": LENGTH, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        sequence = model.generate(torch.tensor([tokens]), **options)
        best = model(sequence).logits[0, len(tokens) - 1 : -1].topk(2).values
    return sequence[0, len(tokens) :].tolist(), (best[:, 0] - best[:, 1]).tolist()


@pytest.mark.parametrize("name", ["q4_k_m", "q4_0", "q2_k"])
def test_perplexity_is_no_worse_than_llama_quantizes(name, float16, llama, chunks, tmp_path):
    assert llama.quantize(float16, tmp_path / "theirs.gguf", gguf_mixes.id_of(name))
    ours, theirs = (perplexity(llama, path, chunks) for path in (converted(float16, name), tmp_path / "theirs.gguf"))
    assert ours <= 1.005 * theirs


@pytest.mark.parametrize("name", ["q4_k_m", "q4_0", "q2_k", "q8_0", "q5_k_s"])
def test_files_are_like_llama_quantizes(name, float16, llama, tmp_path):
    """Every tensor has the same type and, where ggml does not search, the same bytes; so has the key general.file_type."""
    assert llama.quantize(float16, tmp_path / "theirs.gguf", gguf_mixes.id_of(name))
    ours, theirs = (read_header(path) for path in (converted(float16, name), tmp_path / "theirs.gguf"))
    assert ours.keys["general.file_type"] == theirs.keys["general.file_type"] == gguf_mixes.id_of(name)
    by_name = {info.name: info for info in theirs.tensors}
    assert by_name.keys() == {info.name for info in ours.tensors}
    compared = 0
    for info in ours.tensors:
        other = by_name[info.name]
        assert (info.type, info.shape) == (other.type, other.shape), info.name
        if info.type.name not in SEARCHED:
            assert data(ours, info) == data(theirs, other), info.name
            compared += 1
    assert compared > 60


@pytest.mark.parametrize("name", ["q2_k", "q3_k_m", "q4_k_m", "q5_k_m", "q6_k", "q4_1", "q5_0", "iq4_nl", "tq2_0"])
def test_quantized_logits_are_those_of_the_same_weights(name, gguf_source, llama, tmp_path):
    """llama.cpp rounds activations to 8 bits before it multiplies: measured differences are 0.5 to 2% of the logits' spread."""
    path = tmp_path / "model.gguf"
    convert(gguf_source, path, Target.parse(f"gguf:{name}"), installed(), GGML)
    theirs, ours = llama.model(path, context=64), exported(path)
    tokens = list(range(3, 53))
    with torch.no_grad():
        wanted = ours(torch.tensor([tokens])).logits[0].numpy()
    found = theirs.logits(tokens)
    theirs.close()
    assert np.abs(found - wanted).mean() < 0.05 * wanted.std()
    assert np.corrcoef(found.ravel(), wanted.ravel())[0, 1] > 0.998


@pytest.fixture(scope="module")
def gguf_source(float16, folder):
    """Two layers of random weights whose rows are super-blocks, with SmolLM2's tokenizer."""
    config = transformers.AutoConfig.from_pretrained(folder / "hf")
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    for key, value in {**sizes, "head_dim": 64, "num_hidden_layers": 2, "layer_types": None}.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "small")
    transformers.AutoTokenizer.from_pretrained(folder / "hf").save_pretrained(folder / "small")
    convert(folder / "small", folder / "small.gguf", Target("gguf"), installed(), NOTHING)
    return folder / "small.gguf"


def perplexity(llama, path, chunks):
    """The geometric mean over chunks."""
    model = llama.model(path)
    logs = [np.log(llama.perplexity(model.logits(chunk), chunk)) for chunk in chunks]
    model.close()
    return float(np.exp(np.mean(logs)))


def data(header, info):
    with header.path.open("rb") as file:
        file.seek(info.start)
        return file.read(info.nbytes)
