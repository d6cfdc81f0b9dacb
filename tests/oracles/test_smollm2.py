"""A real model end to end, compared with what transformers makes of the same file."""

import json

import pytest
import torch

from lowbit.convert import convert
from lowbit.diff import differences
from lowbit.plan import Action, Target
from lowbit.plugins import installed
from lowbit.recipe import NOTHING, Recipe, Rule

transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.network,
    pytest.mark.filterwarnings("ignore"),  # transformers' own deprecations are not ours to fail on
]
PROMPTS = ["The capital of France is", "def add(a, b):\n    return", "In 1984, 12345 people"]


@pytest.fixture(scope="module")
def exported(smollm2, tmp_path_factory):
    """The source, dequantized to an hf folder."""
    folder = tmp_path_factory.mktemp("smollm2") / "hf"
    report = convert(smollm2, folder, Target("hf"), installed())
    assert report.error.exact
    return folder


@pytest.fixture(scope="module")
def theirs(smollm2):
    """The model and tokenizer that transformers itself loads from the GGUF."""
    place = {"pretrained_model_name_or_path": smollm2.parent, "gguf_file": smollm2.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    return model, transformers.AutoTokenizer.from_pretrained(**place)


@pytest.fixture(scope="module")
def ours(exported):
    model = transformers.AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    return model, transformers.AutoTokenizer.from_pretrained(exported)


def test_every_weight_equals_transformers_own_dequantization(theirs, ours):
    wanted, found = theirs[0].state_dict(), ours[0].state_dict()
    assert wanted.keys() == found.keys()
    for name, weight in wanted.items():
        assert torch.equal(weight, found[name]), name


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_tokens_are_the_same(theirs, ours, prompt):
    tokens = theirs[1](prompt, return_tensors="pt")["input_ids"]
    options = {"max_new_tokens": 24, "do_sample": False}
    assert torch.equal(ours[0].generate(tokens, **options), theirs[0].generate(tokens, **options))


def test_numbers_are_split_into_digits(ours):
    """SmolLM2's pre-tokenizer splits digits; transformers' own GGUF tokenizer loses that, ours must not."""
    tokenizer = ours[1]
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("12345")["input_ids"])
    assert pieces == list("12345")
    assert tokenizer.decode(tokenizer("In 1984, it cost £5.")["input_ids"]) == "In 1984, it cost £5."


def test_chat_template_survives(ours):
    text = ours[1].apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
    assert "<|im_start|>user\nHi<|im_end|>" in text
    assert text.endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("format", "rule", "bits", "error"),
    [
        ("native", Rule("*", "kbit", {"bits": "3", "group_size": "64"}), (3.2, 3.6), (0.1, 0.25)),
        ("gguf", Rule("*", "autoround", {"bits": "8", "group_size": "32"}), (8.5, 8.5), (0.0, 0.01)),
        ("gguf", Rule("*", "autoround", {"bits": "4", "group_size": "32"}), (4.5, 4.5), (0.03, 0.15)),
    ],
    ids=["kbit-3bit", "gguf-q8_0", "gguf-q4_0"],
)
def test_conversions_of_the_real_model(smollm2, tmp_path, format, rule, bits, error):
    registry = installed()
    destination = tmp_path / ("model.gguf" if format.startswith("gguf") else "model")
    report = convert(smollm2, destination, Target.parse(format), registry, Recipe(rule, requantize=True))
    steps = [outcome.step for outcome in report.outcomes if outcome.step.action is Action.QUANTIZE]
    assert len(steps) == 210
    assert all(bits[0] <= step.target.bits_per_weight <= bits[1] for step in steps)
    assert error[0] <= report.error.relative <= error[1]
    with registry.open(smollm2) as first, registry.open(destination) as second:
        assert first.metadata.config == second.metadata.config
        found = {difference.name: difference for difference in differences(first, second, registry)}
    assert found["model.embed_tokens.weight"].exact
    assert found["model.norm.weight"].exact


def test_gguf_to_gguf_keeps_every_byte_of_tensors_and_tokenizer(smollm2, tmp_path):
    from gguf import GGUFReader

    report = convert(smollm2, tmp_path / "again.gguf", Target("gguf"), installed(), NOTHING)
    assert report.error.exact
    first, second = GGUFReader(smollm2), GGUFReader(tmp_path / "again.gguf")
    assert {t.name for t in first.tensors} == {t.name for t in second.tensors}
    for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.ggml.token_type", "tokenizer.ggml.pre"):
        assert first.fields[key].contents() == second.fields[key].contents(), key


def test_native_round_trip_is_exact(smollm2, tmp_path):
    registry = installed()
    convert(smollm2, tmp_path / "native", Target("native"), registry)
    convert(tmp_path / "native", tmp_path / "back.gguf", Target("gguf"), registry)
    with registry.open(smollm2) as first, registry.open(tmp_path / "back.gguf") as second:
        assert all(difference.exact for difference in differences(first, second, registry))
    assert json.loads((tmp_path / "native" / "lowbit.json").read_text())["version"] == 1
