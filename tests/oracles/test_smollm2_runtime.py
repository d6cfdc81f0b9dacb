"""The real model in four low-bit forms: each loads, runs, says something sensible, and loses as much as its bits explain."""

from importlib import import_module

import pytest
import torch

import lowbit
from lowbit.convert import convert
from lowbit.data import heldout_text
from lowbit.evaluation.scores import evaluate
from lowbit.evaluation.windows import cut
from lowbit.plan import Target
from lowbit.recipe import Recipe, Rule
from lowbit.runtime.generate import stream

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")  # deprecations of transformers, and of hqq, which it imports

KBIT = Rule("*", "kbit", {"bits": "3", "group_size": "16", "scale_bits": "6"})
RTN = Rule("*", "autoround", {"bits": "4", "group_size": "64"})
FORMS = {  # target, rule, and the most that the perplexity may grow by (measured: 2.3, 1.14, 1.14 and 1.06)
    "kbit 3-bit": ("native", KBIT, 3.0),
    "gptq 4-bit": ("gptq", RTN, 1.3),
    "awq 4-bit": ("awq", Rule("*", "autoround", {**RTN.settings, "symmetric": "false"}), 1.3),
    "gguf q4_k_m": ("gguf:q4_k_m", Rule("*", "ggml"), 1.15),
}


@pytest.fixture(scope="module")
def base(smollm2, tmp_path_factory):
    """The model as floats: folder, loaded model, tokenizer, windows of text and perplexity."""
    folder = tmp_path_factory.mktemp("smollm2") / "base"
    convert(smollm2, folder, Target("hf"), lowbit.installed())
    model, tokenizer = lowbit.load(folder), lowbit.load_tokenizer(folder)
    windows = cut(tokenizer, heldout_text(), None, 256, limit=2)
    return folder, model, tokenizer, windows


@pytest.mark.parametrize("form", FORMS)
def test_it_loads_speaks_and_keeps_its_perplexity(form, base, tmp_path):
    folder, original, tokenizer, windows = base
    format, rule, most = FORMS[form]
    target = Target.parse(format)
    path = tmp_path / f"model{lowbit.installed().exporters[target.format].suffix}"
    convert(folder, path, target, lowbit.installed(), Recipe(rule))
    model = lowbit.load(path, dtype=torch.float32)
    packed_head = format.startswith("gguf")  # the mix packs the embedding, and the tied head shares its bits
    assert sum(isinstance(module, lowbit.QuantLinear) for module in model.modules()) == 210 + packed_head
    (score,), reference = evaluate([model], windows, original)
    assert reference.perplexity < score.perplexity < most * reference.perplexity
    prompt = tokenizer("The opposite of hot is")["input_ids"]
    assert "cold" in tokenizer.decode(list(stream(model, prompt, 8)))
    if format == "native":
        import_module("lowbit.transformers")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        with torch.no_grad():
            assert torch.equal(theirs(torch.tensor([prompt])).logits, model(torch.tensor([prompt])).logits)
