"""Weights that no exact route leads on from: the refusal names what holds them, and ``--allow-requantize`` chooses new codes."""

import pytest
import torch

from lowbit import Grid, Metadata, PackedSpec, PackedTensor, ScaleFormat, Scheme, TensorSpec, Zero, installed
from lowbit.convert import convert
from lowbit.errors import NoRouteError, OptionError
from lowbit.plan import Action, Target
from lowbit.recipe import Recipe, Rule, parse_rules
from lowbit.requantize import exact_alternatives, nearest_choice, why_not_exactly
from lowbit.testing import samples

REGISTRY = installed()
ALLOWED = Recipe(requantize=True)
UP, EMBED = "model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"
SHAPE = (64, 256)


def affine(bits=4, group_size=64, zero=Zero.SYMMETRIC, **fields):
    return Scheme(Grid.AFFINE, bits, group_size, zero, **fields)


def write(path, scheme, format="native", **others):
    """Write one packed weight and what else a test needs."""
    packer = REGISTRY.route(scheme, SHAPE, format).packer
    values = {UP: packer.pack(samples.quantized(scheme, SHAPE, 1)), "model.norm.weight": torch.ones(256), **others}
    entries = {
        name: value.spec if isinstance(value, PackedTensor) else TensorSpec.of(value) for name, value in values.items()
    }
    REGISTRY.exporters[format].write(path, entries, iter(values.items()), Metadata({"model_type": "llama"}))
    return path


def requantize(tmp_path, scheme, target, recipe=ALLOWED, **others):
    source = write(tmp_path / "source", scheme, **others)
    return convert(source, tmp_path / "out", Target.parse(target), REGISTRY, recipe)


@pytest.mark.parametrize(
    ("scheme", "target", "alternative"),
    [
        (affine(4, 64, permutation=True), "awq", "gptq, native"),
        (affine(5, 64), "awq", "compressed-tensors, gguf:q5_0"),
        (Scheme(Grid.CODEBOOK, 3, 64), "gptq", "native"),
    ],
    ids=lambda value: value.summary().replace(" ", "_") if isinstance(value, Scheme) else value,
)
def test_a_refusal_names_the_nearest_exact_alternative(tmp_path, scheme, target, alternative):
    with pytest.raises(NoRouteError) as raised:
        requantize(tmp_path, scheme, target, Recipe())
    assert raised.value.hint.startswith(f"these formats can, exactly: {alternative}")
    assert raised.value.hint.endswith("; --allow-requantize chooses new codes")
    assert raised.value.reasons
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("scheme", "nearest", "reason"),
    [
        (affine(8, 64, Zero.INTEGER), "gguf:q8_0", "8-bit codes with a zero of their own need 9 symmetric bits"),
        (affine(4, 64, permutation=True), "gguf:q4_0", "no place for a permutation"),
        (Scheme(Grid.CODEBOOK, 3, 64), "gguf:iq4_nl", "only affine grids are re-expressed, not codebook"),
    ],
)
def test_a_refusal_says_what_keeps_each_variant_from_being_exact(scheme, nearest, reason):
    found = why_not_exactly(REGISTRY, scheme, (64, 256), REGISTRY.exporters["gguf"], {})
    assert len(found) == len(REGISTRY.exporters["gguf"].variants())
    assert reason in found[nearest]
    sentence = str(NoRouteError("no route", found))
    assert len(sentence) < 1000
    assert nearest in sentence.split(reason)[0]


@pytest.mark.parametrize("settings", [{}, {"type": "q4_k"}])
def test_a_row_that_no_block_divides_is_named_with_its_length(tmp_path, settings):
    values = {UP: torch.randn(16, 80)}
    entries = {name: TensorSpec.of(value) for name, value in values.items()}
    REGISTRY.exporters["hf"].write(tmp_path / "in", entries, iter(values.items()), Metadata({"model_type": "llama"}))
    recipe = Recipe(Rule("*", "ggml", settings))
    with pytest.raises(NoRouteError, match=r"up_proj.weight: format 'gguf' .*\(gguf-q4_k: a block .* in_features 80"):
        convert(tmp_path / "in", tmp_path / "out.gguf", Target("gguf"), REGISTRY, recipe)


def test_a_variant_that_cannot_be_exact_names_the_one_that_can():
    found = exact_alternatives(REGISTRY, affine(4, 128, Zero.INTEGER), (64, 256), "gguf")
    assert found[0] == "gguf:q5_0"
    assert {"awq", "gptq", "compressed-tensors", "native"} < set(found)


@pytest.mark.parametrize(
    ("scheme", "target", "found", "quantizer"),
    [
        (affine(4, 64, permutation=True), "awq", affine(4, 64), "autoround"),
        (affine(5, 64), "awq", affine(4, 64), "autoround"),
        (affine(4, 32, Zero.MINIMUM), "gptq", affine(4, 32, Zero.INTEGER), "autoround"),
        (Scheme(Grid.CODEBOOK, 3, 64), "gptq", affine(3, 64), "autoround"),
        (Scheme(Grid.CODEBOOK, 3, 64), "mlx", affine(3, 64, Zero.MINIMUM), "autoround"),
        (affine(8, None, permutation=True), "compressed-tensors", affine(8, None), "autoround"),
    ],
    ids=lambda value: value.summary().replace(" ", "_") if isinstance(value, Scheme) else value,
)
def test_new_codes_come_in_the_nearest_scheme_and_their_error_is_measured(tmp_path, scheme, target, found, quantizer):
    report = requantize(tmp_path, scheme, target)
    (step,) = (outcome.step for outcome in report.outcomes if outcome.step.name == UP)
    assert step.action is Action.QUANTIZE
    assert step.target.scheme == found
    assert step.choice.quantizer.name == quantizer
    assert 0 < report.error.relative < 0.5
    assert not report.error.exact


@pytest.mark.parametrize(
    ("scheme", "options"),
    [
        (affine(4, 64, permutation=True), "q4_0"),
        (affine(4, 64, Zero.INTEGER, permutation=True), "q4_1"),
        (affine(4, 32, Zero.FLOAT), "q4_1"),
        (Scheme(Grid.CODEBOOK, 4, 64), "iq4_nl"),
        (affine(8, None, permutation=True), "q8_0"),
    ],
)
def test_gguf_asks_the_quantizer_of_its_own_types(scheme, options):
    choice = nearest_choice(REGISTRY, scheme, SHAPE, REGISTRY.exporters["gguf"])
    assert (choice.quantizer.name, choice.options.type) == ("ggml", options)


def test_what_has_an_exact_route_takes_it_all_the_same(tmp_path):
    other = REGISTRY.packers["plain"].pack(samples.quantized(affine(), SHAPE, 2))
    source = write(tmp_path / "source", affine(4, 64, permutation=True), **{UP.replace(".0.", ".1."): other})
    report = convert(source, tmp_path / "out", Target("awq"), REGISTRY, ALLOWED)
    actions = {outcome.step.name: outcome for outcome in report.outcomes}
    assert actions[UP].step.action is Action.QUANTIZE
    moved = actions[UP.replace(".0.", ".1.")]
    assert moved.step.action is Action.TRANSCODE
    assert moved.error.exact


def test_a_quantizer_takes_packed_weights_only_when_that_is_allowed(tmp_path):
    source = write(tmp_path / "source", affine())
    for recipe in (Recipe(Rule("*", "kbit")), Recipe(None, parse_rules([f"{UP}=kbit"]))):
        with pytest.raises(OptionError, match=f"{UP} is affine 4-bit g64 already.*--allow-requantize"):
            convert(source, tmp_path / "out", Target("native"), REGISTRY, recipe)
    kept = Recipe(Rule("*", "kbit"), parse_rules([f"{UP}=none"]))
    assert convert(source, tmp_path / "kept", Target("native"), REGISTRY, kept).error.exact
    chosen = Recipe(Rule("*", "kbit", {"bits": "3"}), requantize=True)
    report = convert(source, tmp_path / "out", Target("native"), REGISTRY, chosen)
    assert report.plan.entries[UP].scheme == Scheme(Grid.CODEBOOK, 3, 64)
    assert 0.05 < report.error.relative < 0.5


def test_no_quantizer_for_any_scheme_of_the_format_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("lowbit.requantize.choice_for", lambda *_: None)
    with pytest.raises(NoRouteError, match="no installed quantizer gives a scheme that it holds; name one"):
        requantize(tmp_path, affine(4, 64, permutation=True), "awq")


@pytest.mark.parametrize("target", ["gptq", "compressed-tensors", "awq"])
def test_embeddings_become_floats_where_loaders_want_floats(tmp_path, target):
    """A packed embedding has an exact scheme in these formats, and no loader that looks for it."""
    embedding = REGISTRY.packers["plain"].pack(samples.quantized(affine(), SHAPE, 3))
    report = requantize(tmp_path, affine(), target, Recipe(), **{EMBED: embedding})
    assert report.error.exact
    assert report.plan.entries[EMBED] == TensorSpec(torch.float32, SHAPE)


def test_mlx_keeps_embeddings_packed(tmp_path):
    scheme = affine(4, 64, Zero.MINIMUM, scales=ScaleFormat("float16"))
    embedding = REGISTRY.packers["plain"].pack(samples.quantized(scheme, SHAPE, 3))
    report = requantize(tmp_path, scheme, "mlx", Recipe(), **{EMBED: embedding})
    assert isinstance(report.plan.entries[EMBED], PackedSpec)


def floats_folder(path):
    """Write a folder with two plain weights, one with rows that no block of 64 divides."""
    values = {UP: torch.randn(SHAPE), UP.replace("up", "down"): torch.randn(48, 100)}
    entries = {name: TensorSpec.of(value) for name, value in values.items()}
    REGISTRY.exporters["hf"].write(path, entries, iter(values.items()), Metadata({"model_type": "llama"}))
    return path


@pytest.mark.parametrize(("variant", "layout"), [("", "bnb-nf4"), (":nf4", "bnb-nf4"), (":fp4", "bnb-fp4")])
def test_a_quantizer_takes_the_format_s_codebook_and_flat_groups(tmp_path, variant, layout):
    target = Target.parse(f"bitsandbytes{variant}")
    report = convert(floats_folder(tmp_path / "in"), tmp_path / "out", target, REGISTRY, Recipe(Rule("*", "kbit")))
    assert {spec.layout for spec in report.plan.entries.values()} == {layout}
    assert 0.05 < report.error.relative < 0.15


@pytest.mark.parametrize("settings", [{"bits": "3"}, {"group_size": "32"}, {"codebook": "int"}])
def test_options_that_the_user_set_are_never_changed_to_suit_a_format(tmp_path, settings):
    recipe = Recipe(Rule("*", "kbit", settings))
    with pytest.raises(NoRouteError, match="format 'bitsandbytes' cannot hold"):
        convert(floats_folder(tmp_path / "in"), tmp_path / "out", Target("bitsandbytes"), REGISTRY, recipe)


def test_a_learned_codebook_is_refused_before_work_where_the_layout_has_its_own(tmp_path):
    settings = {"bits": "4", "group_size": "64", "flat": "true", "scale_dtype": "float32", "codebook": "learned"}
    recipe = Recipe(Rule("*", "kbit", settings))
    with pytest.raises(NoRouteError, match=r"cannot hold a .* weight with this codebook \(bnb-nf4: its codes mean"):
        convert(floats_folder(tmp_path / "in"), tmp_path / "out", Target("bitsandbytes"), REGISTRY, recipe)


def test_one_fixed_codebook_does_not_become_another(tmp_path):
    convert(
        floats_folder(tmp_path / "in"),
        tmp_path / "fp4",
        Target("bitsandbytes", "fp4"),
        REGISTRY,
        Recipe(Rule("*", "kbit")),
    )
    with pytest.raises(NoRouteError, match="with this codebook"):
        convert(tmp_path / "fp4", tmp_path / "out", Target("bitsandbytes", "nf4"), REGISTRY)
    report = convert(tmp_path / "fp4", tmp_path / "out", Target("bitsandbytes", "nf4"), REGISTRY, ALLOWED)
    assert {spec.layout for spec in report.plan.entries.values()} == {"bnb-nf4"}
    assert convert(tmp_path / "fp4", tmp_path / "same", Target("bitsandbytes"), REGISTRY).error.exact


def test_integers_become_codes_of_a_table_where_the_format_has_nothing_else(tmp_path):
    report = requantize(tmp_path, affine(4, 64), "bitsandbytes")
    assert report.plan.entries[UP].layout == "bnb-nf4"
    assert 0.02 < report.error.relative < 0.15
