"""``--bits 3.5``: an average of stored bits becomes a width for each layer, in the plan, in the files, and in sentences."""

import json

import pytest
from click.testing import CliRunner
from safetensors.torch import save_file

from lowbit.budget import average_of, within_budget
from lowbit.cli import cli
from lowbit.convert import plan_conversion
from lowbit.errors import LowbitError, OptionError
from lowbit.plan import Action, Target
from lowbit.plugins import installed
from lowbit.recipe import Recipe, Rule
from lowbit.testing import weights

LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LINEARS += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
NAMES = [f"model.layers.{layer}.{linear}.weight" for layer in range(2) for linear in LINEARS]
REGISTRY = installed()
NATIVE = Target.parse("native")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("budget") / "model"
    folder.mkdir()
    tensors = {name: weights.gaussian((64, 128), seed) for seed, name in enumerate(NAMES)}
    tensors[NAMES[-1]] **= 3  # long tails: the hardest
    tensors["model.embed_tokens.weight"] = weights.gaussian((32, 128), 99)
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


def recipe_of(bits, quantizer="autoround", rules=(), **settings):
    return Recipe(Rule("*", quantizer, {"bits": str(bits), "group_size": "64", **settings}), tuple(rules))


def plan_of(model, recipe, target=NATIVE):
    with REGISTRY.open(model) as checkpoint:
        return plan_conversion(checkpoint, target, recipe, REGISTRY)


def stored_bits(plan, names=NAMES):
    steps = [step for step in plan.steps if step.name in names]
    return 8 * sum(step.target.nbytes for step in steps) / sum(step.weights for step in steps)


def widths_of(plan):
    return {step.name: step.choice.options.bits for step in plan.steps if step.action is Action.QUANTIZE}


@pytest.mark.parametrize("quantizer", ["autoround", "kbit"])
@pytest.mark.parametrize("budget", [2.5, 3.5, 4.75])
def test_stored_bits_average_at_most_the_budget_and_nearly_all_of_it(model, quantizer, budget):
    plan = plan_of(model, recipe_of(budget, quantizer))
    assert widths_of(plan).keys() == set(NAMES)
    assert budget - 0.2 < stored_bits(plan) <= budget


def test_layers_that_programs_fuse_get_one_width_and_the_hardest_layer_the_most(model):
    found = widths_of(plan_of(model, recipe_of(3.5)))
    assert len(set(found.values())) > 1
    for layer in range(2):
        for group in (LINEARS[:3], LINEARS[4:6]):
            assert len({found[f"model.layers.{layer}.{linear}.weight"] for linear in group}) == 1
    assert found[NAMES[-1]] == max(found.values())


def test_what_rules_take_is_not_in_the_average(model):
    kept, own = Rule("*.o_proj.weight", "none"), Rule("*.0.mlp.down_proj.weight", "autoround", {"bits": "8"})
    plan = plan_of(model, recipe_of(3.5, rules=(kept, own)))
    found = widths_of(plan)
    assert not [name for name in found if "o_proj" in name]
    assert found[NAMES[6]] == 8
    rest = [name for name in found if name != NAMES[6]]
    assert 3.2 < stored_bits(plan, rest) <= 3.5


def test_a_tuned_recipe_gets_widths_without_being_tuned_for_each(model):
    recipe = recipe_of(3.5, recipe="light")
    with REGISTRY.open(model) as checkpoint:
        made = within_budget(recipe, checkpoint, NATIVE, REGISTRY)
    assert {rule.pattern: int(rule.settings["bits"]) for rule in made.rules} == widths_of(
        plan_of(model, recipe_of(3.5))
    )
    assert made.default.settings["recipe"] == "light"


def test_a_format_gets_only_widths_that_it_holds(model):
    found = widths_of(plan_of(model, recipe_of(3.5, symmetric="true"), Target.parse("gptq")))
    assert set(found.values()) <= {2, 3, 4, 8}


def test_whole_bits_and_fractions_of_the_quantizer_s_own_are_left_alone(model):
    for recipe in (
        recipe_of(3),
        Recipe(Rule("*", "binary", {"bits": "1.5"})),
        Recipe(),
        Recipe(Rule("*", "autoround")),
    ):
        assert average_of(recipe, REGISTRY) is None
        with REGISTRY.open(model) as checkpoint:
            assert within_budget(recipe, checkpoint, NATIVE, REGISTRY) is recipe


@pytest.mark.parametrize(
    ("recipe", "target", "says"),
    [
        (recipe_of(1.5), NATIVE, "below the narrowest widths, which store 2.250; raise it"),
        (recipe_of(9.5), NATIVE, "more than the widest codes store, which is 8.250"),
        (recipe_of(-3.5), NATIVE, "must be a number above 0, got -3.5"),
        (recipe_of("nan"), NATIVE, "must be a number above 0, got nan"),
        (recipe_of("inf"), NATIVE, "must be a number above 0, got inf"),
        (recipe_of("three"), NATIVE, "bits must be int, got 'three'"),
        (recipe_of(3.5), Target.parse("gguf:q4_k_m"), "gguf:q4_k_m says the type of each"),
        (recipe_of(3.5, rules=[Rule("*.o_proj.weight", "autoround")]), NATIVE, "needs bits of its own"),
        (recipe_of(3.5, rules=[Rule("*", "none")]), NATIVE, "the rules take every one"),
        (recipe_of(3.5, group_size="-7"), NATIVE, "group_size must be positive"),
        (recipe_of(3.5, groupsize="7"), NATIVE, "has no option 'groupsize'"),
    ],
)
def test_bad_budgets_end_in_a_sentence(model, recipe, target, says):
    with pytest.raises(LowbitError, match=says.replace(".", r"\.")) as refused:
        plan_of(model, recipe, target)
    assert isinstance(refused.value, OptionError)


def test_convert_takes_an_average(model, tmp_path):
    words = ["convert", str(model), str(tmp_path / "out"), "-q", "autoround", "-b", "3.5", "-g", "64", "--json"]
    done = CliRunner().invoke(cli, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    tensors = [tensor for tensor in json.loads(done.stdout)["tensors"] if tensor["action"] == "quantize"]
    stored = [tensor["to"]["bits_per_weight"] for tensor in tensors]
    assert len(stored) == len(NAMES)
    assert len(set(stored)) > 1
    assert 3.3 < sum(stored) / len(stored) <= 3.5  # all of one size
    with REGISTRY.open(tmp_path / "out") as checkpoint:
        assert {checkpoint.entries[name].scheme.bits for name in NAMES} == {int(bits) for bits in stored}
