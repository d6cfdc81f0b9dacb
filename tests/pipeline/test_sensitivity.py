"""Sensitivity: errors at several widths, widths under a budget, rules that convert takes, and the picture."""

import itertools
import json

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

import lowbit
from lowbit import Calibration
from lowbit.cli import cli
from lowbit.errors import LowbitError, OptionError
from lowbit.plan import Target
from lowbit.recipe import Rule, parse_rules
from lowbit.sensitivity import (
    Layer,
    Width,
    average_bits,
    choose_widths,
    fused_groups,
    measure_layers,
    rules,
    total_cost,
)
from lowbit.testing import weights

LAYER = "model.layers.0."
NAMES = [
    LAYER + "self_attn.q_proj.weight",
    LAYER + "self_attn.k_proj.weight",
    LAYER + "self_attn.v_proj.weight",
    LAYER + "self_attn.o_proj.weight",
    LAYER + "mlp.gate_proj.weight",
    LAYER + "mlp.up_proj.weight",
    LAYER + "mlp.down_proj.weight",
]


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    tensors = {name: weights.gaussian((64, 128), seed) for seed, name in enumerate(NAMES)}
    tensors[NAMES[-1]] **= 3  # long tails
    tensors["model.embed_tokens.weight"] = weights.gaussian((32, 128), 9)
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


def run(*arguments):
    return CliRunner().invoke(cli, list(map(str, arguments)), catch_exceptions=False)


def layers_of(costs, sizes=None, stored=(2.25, 3.25, 4.25, 8.25)):
    """Layers with given errors at 2, 3, 4 and 8 bits."""
    return [
        Layer(
            name,
            (size, 1),
            tuple(Width(bits, kept, error, None) for bits, kept, error in zip((2, 3, 4, 8), stored, row, strict=True)),
        )
        for (name, row), size in zip(costs.items(), sizes or [1000] * len(costs), strict=True)
    ]


def random_layers(count, seed=0):
    source = weights.generator(seed)
    start = torch.rand(count, generator=source) + 0.1
    sizes = (torch.rand(count, generator=source) * 5000 + 500).int().tolist()
    return layers_of(
        {f"layer{i}.weight": [float(start[i]) / f for f in (1, 2.1, 4.3, 70)] for i in range(count)}, sizes
    )


@pytest.mark.parametrize("budget", [2.6, 3.5, 6.0, 9.0])
@pytest.mark.parametrize("seed", range(2))
def test_widths_are_the_best_of_all(budget, seed):
    layers = random_layers(5, seed)
    chosen = choose_widths(layers, budget)
    assert average_bits(layers, chosen) <= budget + 1e-9
    names = [layer.name for layer in layers]
    every = (dict(zip(names, choice, strict=True)) for choice in itertools.product(range(4), repeat=5))
    best = min(total_cost(layers, other) for other in every if average_bits(layers, other) <= budget - 1e-4)
    assert total_cost(layers, chosen) <= best * (1 + 1e-9)


def test_a_budget_of_exactly_the_narrowest_gives_the_narrowest():
    layers = random_layers(6)
    assert set(choose_widths(layers, average_bits(layers, dict.fromkeys((la.name for la in layers), 0))).values()) == {
        0
    }


def test_many_layers_stay_within_the_budget():
    layers = random_layers(300)
    chosen = choose_widths(layers, 3.5)
    assert 3.45 < average_bits(layers, chosen) <= 3.5


def test_a_budget_below_the_narrowest_is_refused():
    with pytest.raises(OptionError, match="raise it"):
        choose_widths(random_layers(3), 2.0)


def test_fused_layers_share_a_width():
    names = [*NAMES, "model.layers.1.mlp.experts.0.up_proj.weight", "model.layers.1.mlp.experts.7.gate_proj.weight"]
    groups = fused_groups(names)
    assert sorted(map(len, groups)) == [1, 1, 2, 2, 3]
    costs = {name: [0.5 - 0.01 * i, 0.2, 0.1, 0.01] for i, name in enumerate(names)}
    costs[NAMES[1]] = [50, 30, 1, 0.1]  # k alone would want all the bits
    chosen = choose_widths(layers_of(costs), 3.5)
    for group in groups:
        assert len({chosen[name] for name in group}) == 1
    assert chosen[NAMES[0]] == max(chosen.values())


def test_errors_are_those_of_the_quantizer_and_of_the_output(model):
    registry = lowbit.installed()
    inputs = torch.randn(300, 128, generator=weights.generator(3)) * torch.linspace(0.1, 2, 128)
    known = {name: Calibration(hessian=inputs.T @ inputs / 300) for name in NAMES}
    with registry.open(model) as checkpoint:
        rule = Rule("*", "kbit", {"group_size": "64"})
        (layer, *_) = measure_layers(checkpoint, registry, rule, [2, 4], Target("native"), known)
        weight = checkpoint.read(layer.name).float()
    quantizer = registry.quantizers["kbit"]
    result = lowbit.dequantize(quantizer.quantize(weight, quantizer.Options(bits=2), known[layer.name]))
    assert layer.widths[0].error == pytest.approx(float((result - weight).norm() / weight.norm()), rel=1e-4)
    expected = (inputs @ (result - weight).T).norm() / (inputs @ weight.T).norm()
    assert layer.widths[0].output_error == pytest.approx(float(expected), rel=1e-3)
    assert layer.widths[0].stored == pytest.approx(2 + 16 / 64 + 32 * 4 / (64 * 128))
    assert layer.widths[1].cost < layer.widths[0].cost


def test_the_command_writes_rules_that_convert_takes(model, tmp_path):
    out = tmp_path / "rules.txt"
    found = run("sensitivity", model, "-q", "kbit", "-g", 32, "--budget", 3.6, "--rules-out", out, "--json")
    document = json.loads(found.stdout)
    assert len(document["layers"]) == 7
    assert document["budget"]["reached"] <= 3.6
    assert out.read_text().splitlines() == document["budget"]["rules"]
    converted = json.loads(run("convert", model, tmp_path / "out", "--rule", f"@{out}", "--json").stdout)
    bits = {
        tensor["name"]: tensor["to"]["scheme"]["bits"] for tensor in converted["tensors"] if "scheme" in tensor["to"]
    }
    assert bits == document["budget"]["bits"]
    packed = [tensor for tensor in converted["tensors"] if "scheme" in tensor["to"]]
    average = sum(8 * tensor["to"]["bytes"] for tensor in packed) / (7 * 64 * 128)
    assert average == pytest.approx(document["budget"]["reached"], abs=1e-3)


def test_the_table(model):
    shown = run("sensitivity", model, "--bits", "4,2", "--budget", 4.5).stdout
    assert "2 bits (2." in shown
    assert "self_attn.q_proj" in shown
    assert "Within 4.5 bits" in shown


def test_rules_from_a_file(tmp_path):
    path = tmp_path / "rules"
    path.write_text("# widths\na.*=kbit,bits=3  # three\n\nb.*=none\n", encoding="utf-8")
    assert parse_rules([f"@{path}", "c=kbit"]) == (
        Rule("a.*", "kbit", {"bits": "3"}),
        Rule("b.*", "none"),
        Rule("c", "kbit"),
    )
    with pytest.raises(OptionError, match="cannot be read"):
        parse_rules([f"@{path}.missing"])


def test_rules_keep_settings():
    (layer,) = layers_of({"a.weight": [4, 3, 2, 1]})
    assert rules([layer], {"a.weight": 1}, Rule("*", "kbit", {"group_size": "32"})) == [
        "a.weight=kbit,bits=3,group_size=32"
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--bits", "two"], "widths such as"),
        (["--bits", "2,99"], "no installed quantizer"),
        (["--rules-out", "x"], "give --budget"),
        (["--set", "bits=3"], "give --bits"),
        (["--plot", "a.jpeg"], ".png, .svg, .pdf"),
        (["--plot", "missing/a.png"], "is no folder"),
        (["--budget", "1"], "raise it"),
    ],
)
def test_mistakes_are_sentences(model, arguments, words):
    with pytest.raises(LowbitError, match=words):
        run("sensitivity", model, *arguments)


def test_the_picture(model, tmp_path):
    pytest.importorskip("matplotlib", reason="the extra plot is not installed")
    for suffix, start in ((".png", b"\x89PNG"), (".svg", b"<?xml")):
        path = tmp_path / f"picture{suffix}"
        run("sensitivity", model, "--bits", "2,4", "--budget", 3, "--plot", path, "--json")
        assert path.read_bytes().startswith(start)
    assert "down_proj" in path.read_text() or len(path.read_text()) > 10_000


def test_without_matplotlib_the_way_out_is_named(model, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(LowbitError, match=r"pip install 'lowbit\[plot\]'"):
        run("sensitivity", model, "--plot", "a.png")
