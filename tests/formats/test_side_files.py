"""What goes along with the weights: names, heads and towers that nothing quantizes, and a model card that says what was done."""

import json

import pytest
import torch
from safetensors.torch import save_file

from lowbit import PackedSpec, installed
from lowbit.card import fingerprint
from lowbit.convert import convert
from lowbit.diff import differences
from lowbit.plan import Target
from lowbit.recipe import Recipe, Rule, parse_rules
from lowbit.tensors import bit_equal

REGISTRY = installed()
UP = "model.layers.0.mlp.up_proj.weight"
OTHERS = {
    "model.embed_tokens.weight": (32, 64),
    "model.norm.weight": (64,),
    "lm_head.weight": (32, 64),
    "mtp.fc.weight": (64, 128),
    "mtp.layers.0.mlp.up_proj.weight": (64, 64),
    "vision_tower.blocks.0.attn.qkv.weight": (96, 64),
    "vision_tower.patch_embed.proj.weight": (64, 3, 2, 2),
    "model.visual.merger.mlp.0.weight": (64, 64),
    "multi_modal_projector.linear_1.weight": (64, 64),
    "model.layers.0.mlp.up_proj.bias": (64,),
    "some.position_ids": (1, 8),
}
FORMATS = ("native", "gptq", "awq", "compressed-tensors", "auto-round", "mlx", "bitsandbytes")
CARD = "---\nlicense: mit\n---\n\n# Tiny\n\nA model.\n"


@pytest.fixture
def model(tmp_path):
    """A folder of one linear layer, everything else that a model may have, and side files."""
    source, folder = torch.Generator().manual_seed(0), tmp_path / "tiny"
    tensors = {name: torch.randn(shape, generator=source).bfloat16() for name, shape in OTHERS.items()}
    tensors["some.position_ids"] = torch.arange(8).view(1, 8)
    tensors[UP] = torch.randn(64, 64, generator=source).bfloat16()
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "bfloat16"}))
    sides = ("tokenizer.json", "generation_config.json", "chat_template.jinja", "preprocessor_config.json")
    for name in sides:
        (folder / name).write_text(f'{{"file": "{name}"}}')
    (folder / "README.md").write_text(CARD)
    return folder


def quantize(source, out, format="native", **settings):
    """Convert with a quantizer that suits the format."""
    name = "kbit" if format == "bitsandbytes" else "autoround"
    variant = "4bit" if format == "mlx" else None
    settings = settings or ({} if name == "kbit" or variant else {"group_size": "32"})
    return convert(source, out, Target(format, variant), REGISTRY, Recipe(Rule("*", name, settings)))


@pytest.mark.parametrize("format", FORMATS)
def test_nothing_is_dropped_renamed_or_rounded(model, tmp_path, format):
    report = quantize(model, tmp_path / "out", format)
    assert isinstance(report.plan.entries[UP], PackedSpec)
    with REGISTRY.open(model) as first, REGISTRY.open(tmp_path / "out") as second:
        assert set(first.entries) == set(second.entries) == {UP, *OTHERS}
        assert all(bit_equal(first.read(name), second.read(name)) for name in OTHERS)
    for file in model.iterdir():
        if file.name not in ("README.md", "config.json", "model.safetensors"):
            assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes(), file.name


def test_back_to_floats_nothing_is_missing(model, tmp_path):
    quantize(model, tmp_path / "packed", "gptq")
    convert(tmp_path / "packed", tmp_path / "floats", Target("hf"), REGISTRY)
    with REGISTRY.open(tmp_path / "packed") as first, REGISTRY.open(tmp_path / "floats") as second:
        assert all(difference.exact for difference in differences(first, second, REGISTRY))


def test_the_card_keeps_the_source_s_and_says_what_was_done(model, tmp_path):
    settings = {"bits": "3", "group_size": "32"}
    recipe = Recipe(Rule("*", "autoround", settings), parse_rules(["mtp.fc.weight=kbit,bits=4"]))
    report = convert(model, tmp_path / "out", Target("native"), REGISTRY, recipe)
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith(CARD.rstrip() + "\n\n## Converted with lowbit\n")
    command = "lowbit convert SOURCE DESTINATION --format native --quantizer autoround --set bits=3 --set group_size=32"
    assert f"| command | `{command} --rule mtp.fc.weight=kbit,bits=4` |" in card
    assert f"| source_fingerprint | `{fingerprint(model)}` |" in card
    assert f"| torch_version | `{torch.__version__}` |" in card
    error = next(outcome.error for outcome in report.outcomes if outcome.step.name == UP)
    assert f"(affine 3-bit g32) | 1 | 4,096 | 3.500 | {error.text()} |" in card
    assert "| copy | bfloat16 | bfloat16 | 9 |" in card


def test_a_card_of_cards_grows_by_a_section(model, tmp_path):
    quantize(model, tmp_path / "one", "gptq")
    convert(tmp_path / "one", tmp_path / "two", Target("awq"), REGISTRY)
    first, second = ((tmp_path / name / "README.md").read_text() for name in ("one", "two"))
    assert second.startswith(first)
    assert second.count("## Converted with lowbit") == 2
    assert "| transcode | gptq (affine 4-bit g32) | awq-gemm (affine 4-bit g32) | 1 | 4,096 | 4.625 | exact |" in second


def test_the_same_conversion_writes_the_same_card(model, tmp_path):
    for name in ("one", "two"):
        quantize(model, tmp_path / name)
    assert (tmp_path / "one" / "README.md").read_bytes() == (tmp_path / "two" / "README.md").read_bytes()


def test_the_fingerprint_is_of_the_content(model, tmp_path):
    before = fingerprint(model)
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in model.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert fingerprint(copy) == before
    with (copy / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")
    assert fingerprint(copy) != before
    large = tmp_path / "large"
    large.write_bytes(bytes(3_000_000))
    first = fingerprint(large)
    large.write_bytes(bytes(2_999_999) + b"x")
    assert fingerprint(large) != first
