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

from lowbit.convert import convert, plan_conversion
from lowbit.interfaces import Calibration
from lowbit.plan import Target
from lowbit.plugins import installed
from lowbit.recipe import NOTHING, Recipe, Rule
from lowbit.tensors import PackedSpec
from lowbit_formats import gguf_mixes
from lowbit_formats.gguf.architectures import BY_MODEL_TYPE
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
    "<|im_start|>user\nName three colours.<|im_end|>\n<|im_start|>assistant\n",
)
LENGTH = 16
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


def by_llama_quantize(llama, float16, name):
    """The source quantized by llama.cpp to the same file type; made once."""
    path = float16.with_name(f"{name}-theirs.gguf")
    if not path.exists():
        assert llama.quantize(float16, path, gguf_mixes.id_of(name))
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


@pytest.mark.parametrize("name", ["q4_k_m", "q2_k"])
def test_perplexity_is_no_worse_than_llama_quantizes(name, float16, llama, chunks):
    """Q4_0 needs no model to run: its file has the same bytes, which the test of files says."""
    files = converted(float16, name), by_llama_quantize(llama, float16, name)
    ours, theirs = (perplexity(llama, path, chunks) for path in files)
    assert ours <= 1.005 * theirs


@pytest.mark.parametrize("calibrated", [False, True], ids=["plain", "imatrix"])
@pytest.mark.parametrize("name", ["q2_k", "q3_k_l", "q4_k_m", "q4_0", "iq4_nl", "tq1_0", "q1_0"])
def test_plans_have_the_types_that_llama_quantize_gives(name, calibrated, float16, llama):
    """Rows of 576 weights fall back, and the embedding is tied: what is planned is what is written, layout for layout.

    test_llama_cpp_mixes.py has every file type, on small models.
    """
    header, registry = read_header(float16), installed()
    shapes = {info.name: info.shape for info in header.tensors if len(info.shape) == 2}
    factors = {tensor: np.ones(shape[1], np.float32) for tensor, shape in shapes.items()} if calibrated else None
    with registry.open(float16) as checkpoint:
        matrices = {tensor: spec.shape for tensor, spec in checkpoint.entries.items() if len(spec.shape) == 2}
        ones = {tensor: Calibration(importance=torch.ones(shape[1])) for tensor, shape in matrices.items()}
        target = Target.parse(f"gguf:{name}")
        plan = plan_conversion(checkpoint, target, GGML, registry, ones if calibrated else {})
    expected = llama.planned_types(float16, gguf_mixes.id_of(name), factors)
    if expected is None:
        assert name == "q1_0", "llama.cpp has no fallback for rows that no block of Q1_0 fits"
        quantized = [step.name for step in plan.steps if isinstance(step.target, PackedSpec)]
        assert all(tensor.endswith(("down_proj.weight", "embed_tokens.weight")) for tensor in quantized)
        assert len(quantized) == 31, "blocks of 128 divide rows of 1536, and the tied embedding is Q8_0"
        return
    names = BY_MODEL_TYPE["llama"]
    found = {
        names.ggml_name(step.name, 30): step.target.layout.removeprefix("gguf-").upper()
        for step in plan.steps
        if isinstance(step.target, PackedSpec)
    }
    assert found == expected


@pytest.mark.parametrize("name", ["q4_k_m", "q4_0", "q2_k", "q8_0"])
def test_files_are_like_llama_quantizes(name, float16, llama):
    """Every tensor has the same type and, where ggml does not search, the same bytes; so has the key general.file_type."""
    files = converted(float16, name), by_llama_quantize(llama, float16, name)
    ours, theirs = (read_header(path) for path in files)
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
    assert compared == len(ours.tensors) or name not in ("q4_0", "q8_0")


@pytest.mark.parametrize("name", ["q2_k", "q3_k_m", "q6_k", "iq4_nl"])
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


def test_a_split_model_loads_whole(gguf_source, llama, tmp_path):
    """llama.cpp finds the other files by the name of the first, and checks their numbers and the count of tensors."""
    convert(gguf_source, tmp_path / "parts", Target.parse("gguf:q8_0"), installed(), GGML, shard_size=400_000)
    convert(gguf_source, tmp_path / "whole.gguf", Target.parse("gguf:q8_0"), installed(), GGML)
    files = sorted((tmp_path / "parts").glob("*.gguf"))
    assert len(files) > 2
    tokens, found = list(range(3, 35)), []
    for path in (files[0], tmp_path / "whole.gguf"):
        model = llama.model(path, context=64)
        found.append(model.logits(tokens))
        model.close()
    assert np.array_equal(*found)


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
