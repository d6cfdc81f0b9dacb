"""Tuning a block: the error falls, codes decode to what was tuned, results repeat, the module comes back, failures are named."""

import dataclasses

import pytest
import torch
from tiny_block import TOKENS, TinyBlock, hidden_states, output_error
from torch import nn

from lowbit import Calibration, dequantize
from lowbit.errors import OptionError, WeightError
from lowbit.testing.contracts.checks import assert_same_quantized
from lowbit_autoround import activations
from lowbit_autoround.kquants import K_SCHEMES
from lowbit_autoround.options import AutoRoundOptions
from lowbit_autoround.quantizer import AutoRoundQuantizer

QUANTIZER = AutoRoundQuantizer()
TUNED = AutoRoundOptions(3, 16, iters=25, batch_size=8)
KINDS = {
    "symmetric": TUNED,
    "integer": dataclasses.replace(TUNED, symmetric=False),
    "minimum": dataclasses.replace(TUNED, symmetric=False, zero="minimum"),
    "ragged": dataclasses.replace(TUNED, group_size=20, symmetric=False),
    "row": dataclasses.replace(TUNED, group_size=None),
    "one-bit": dataclasses.replace(TUNED, bits=1, symmetric=False, zero="minimum"),
    "searched": dataclasses.replace(TUNED, scale="search"),
    "searched-integer": dataclasses.replace(TUNED, scale="search", symmetric=False),
    "searched-minimum": dataclasses.replace(TUNED, scale="search", symmetric=False, zero="minimum"),
    **{
        f"q{bits}_k": dataclasses.replace(TUNED, lr=0.02).for_scheme(K_SCHEMES[bits]) for bits in K_SCHEMES if bits != 5
    },
    "q5_k": dataclasses.replace(TUNED, lr=0.01, iters=60).for_scheme(
        K_SCHEMES[5]
    ),  # smaller steps, as there is less to gain
}
kinds = pytest.mark.parametrize("options", KINDS.values(), ids=KINDS.keys())


def run(block, options, **changed):
    weights = block.weights()
    chosen = {name: changed.get(name.split(".")[-2], options) for name in weights}
    return QUANTIZER.quantize_block(weights, chosen, {}, block)


def rounded(block, options):
    return {name: QUANTIZER.quantize(weight, options) for name, weight in block.weights().items()}


@kinds
def test_tuning_lowers_the_output_error(options):
    """5-bit codes leave the rounded minimums of Q5_K as the larger part of its error, where tuning gains little."""
    block = TinyBlock()
    before = output_error(block, rounded(block, options), dequantize)
    results = run(block, options)
    for name, result in results.items():
        assert result.scheme == QUANTIZER.scheme(options)
        result.validate(name)
    assert output_error(block, results, dequantize) < (1.1 if options.two_level and options.bits == 5 else 0.9) * before
    words = block.lines[0].split()
    assert float(words[3]) < 0.98 * float(words[1])


def test_tuning_gains_on_sequences_that_it_never_saw():
    block = TinyBlock()
    unseen = TinyBlock()
    unseen.hidden = hidden_states(64, torch.Generator().manual_seed(9))
    unseen.counts = torch.ones(unseen.hidden.shape[:2], dtype=torch.bool)
    with torch.no_grad():
        unseen.outputs = unseen.module(unseen.hidden)
    before = output_error(unseen, rounded(block, TUNED), dequantize)
    assert output_error(unseen, run(block, TUNED), dequantize) < 0.9 * before


@kinds
def test_the_logged_loss_is_that_of_the_codes(options):
    """The best state's loss, measured again from the stored codes: they are what was tuned, not a rounding of it."""
    block = TinyBlock()
    results = run(block, dataclasses.replace(options, batch_size=block.samples, iters=12))  # all samples are checked
    (line,) = block.lines
    words = line.split()
    assert words[0] == "loss"
    assert float(words[3]) <= float(words[1])
    assert float(words[3]) == pytest.approx(output_error(block, results, dequantize), rel=1e-3)


@kinds
def test_the_same_seed_gives_the_same_bits_on_any_number_of_threads(options):
    before, found = torch.get_num_threads(), []
    try:
        for threads, seed in ((1, 1), (3, 2)):
            torch.set_num_threads(threads)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                found.append(run(TinyBlock(), options))
    finally:
        torch.set_num_threads(before)
    for name in found[0]:
        assert_same_quantized(found[1][name], found[0][name], name)


def test_gradients_added_up_between_rounds_give_the_same_bits(monkeypatch):
    monkeypatch.setattr(activations, "PIECE_TOKENS", TOKENS)  # 8 pieces: 4 rounds on one thread
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            found.append(run(TinyBlock(), TUNED))
    finally:
        torch.set_num_threads(before)
    for name in found[0]:
        assert_same_quantized(found[1][name], found[0][name], name)


def test_another_seed_and_another_block_draw_other_batches():
    first = run(TinyBlock(), TUNED)
    other = run(TinyBlock(), dataclasses.replace(TUNED, seed=43))
    assert any(not torch.equal(first[name].parts["codes"], other[name].parts["codes"]) for name in first)


def test_the_global_generator_is_left_alone():
    block = TinyBlock()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        state = torch.get_rng_state()
        run(block, TUNED)
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_the_module_comes_back_as_it_was(bias, fails):
    block = TinyBlock(bias=bias)
    state = {name: value.clone() for name, value in block.module.state_dict().items()}
    identities = {name: id(parameter) for name, parameter in block.module.named_parameters()}
    block.module.norm.weight.requires_grad_(False)
    if fails:
        block.hidden[2, 3] = torch.inf
        with pytest.raises(WeightError):
            run(block, TUNED)
    else:
        run(block, TUNED)
    assert {name: id(parameter) for name, parameter in block.module.named_parameters()} == identities
    assert [parameter.requires_grad for parameter in block.module.norm.parameters()] == [False, True]
    for name, value in block.module.state_dict().items():
        assert torch.equal(value, state[name])
    assert all("forward" not in vars(module) and not module._forward_pre_hooks for module in block.module.modules())


def test_a_block_in_bfloat16_is_tuned_in_it():
    block = TinyBlock(dtype=torch.bfloat16)
    run(block, TUNED)
    assert all(parameter.dtype == torch.bfloat16 for parameter in block.module.parameters())
    words = block.lines[0].split()
    assert float(words[3]) < 0.95 * float(words[1])


def test_inference_mode_around_it_changes_nothing():
    expected = run(TinyBlock(), TUNED)
    block = TinyBlock()
    with torch.inference_mode():
        found = run(block, TUNED)
    for name, result in found.items():
        assert_same_quantized(result, expected[name], name)


def test_padding_does_not_count():
    block, other = TinyBlock(), TinyBlock()
    for each, value in ((block, 3.0), (other, -7.0)):
        each.counts[:, 20:] = False
        each.hidden[:, 20:] = value  # tokens do not meet in this block, so only the loss could see them
    results, again = run(block, TUNED), run(other, TUNED)
    for name, result in results.items():
        assert_same_quantized(again[name], result, name)


def test_weights_without_iterations_are_rounded_beside_the_others():
    block = TinyBlock()
    plain = dataclasses.replace(TUNED, iters=0, bits=8)
    results = run(block, TUNED, down=plain)
    down = f"{block.name}.down.weight"
    assert_same_quantized(results[down], QUANTIZER.quantize(block.weights()[down], plain), "down")
    assert list(results) == list(block.linears)


def test_no_iterations_give_what_rounding_gives_with_or_without_a_block():
    block, options = TinyBlock(), AutoRoundOptions(4, 16)
    for given in (block, None):
        results = QUANTIZER.quantize_block(block.weights(), dict.fromkeys(block.linears, options), {}, given)
        for name, result in results.items():
            assert_same_quantized(result, QUANTIZER.quantize(block.weights()[name], options), name)


def test_accumulated_batches_are_one_large_batch():
    small = run(TinyBlock(), dataclasses.replace(TUNED, batch_size=4, accumulate=2, iters=5))
    large = run(TinyBlock(), dataclasses.replace(TUNED, batch_size=8, iters=5))
    assert_same_quantized(*(next(iter(results.values())) for results in (small, large)), "up")


def test_settings_of_the_block_must_agree():
    with pytest.raises(
        OptionError, match=r"model.layers.3 is tuned as a whole, and iters is 25 for .*up.weight but 9 for"
    ):
        run(TinyBlock(), TUNED, down=dataclasses.replace(TUNED, iters=9))
    run(TinyBlock(), dataclasses.replace(TUNED, iters=2), down=dataclasses.replace(TUNED, iters=2, bits=4, lr=0.1))


@pytest.mark.parametrize(("where", "words"), [("hidden", "the inputs of"), ("outputs", "the float outputs of")])
def test_activations_that_are_not_finite_are_named(where, words):
    block = TinyBlock()
    getattr(block, where)[5, 0, 0] = torch.inf
    with pytest.raises(WeightError, match=rf"^{words} calibration sequence 5 hold NaN .* fallback=rtn"):
        run(block, TUNED)


def test_a_loss_that_becomes_nan_names_the_step_or_falls_back():
    class Breaking(TinyBlock):
        calls = 0

        def forward(self, hidden):
            if torch.is_grad_enabled():
                self.calls += 1
            return self.module(hidden) * (torch.nan if self.calls > 3 else 1.0)

    options = dataclasses.replace(TUNED, batch_size=1, tokens=1.0)
    with pytest.raises(WeightError, match=r"^the loss is nan at tuning step 3; try a smaller lr"):
        run(Breaking(), options)
    block = Breaking()
    results = run(block, dataclasses.replace(options, fallback="rtn"))
    assert block.lines == ["loss nan at step 3: rounded to nearest instead"]
    for name, result in rounded(block, TUNED).items():
        assert_same_quantized(results[name], result, name)


def test_a_weight_that_the_block_has_no_linear_for_is_refused_with_the_way_out():
    block = TinyBlock()
    weights = {**block.weights(), "model.layers.3.experts.weight": torch.ones(8, 8)}
    with pytest.raises(OptionError, match=r"experts.weight is no linear layer of its own in model.layers.3"):
        QUANTIZER.quantize_block(weights, dict.fromkeys(weights, TUNED), {}, block)


def test_an_expert_that_no_token_reaches_keeps_its_rounding():
    block = TinyBlock()
    block.module.register_module("idle", nn.Linear(32, 32, bias=False))
    block.linears[f"{block.name}.idle.weight"] = "idle"
    for options in (TUNED, dataclasses.replace(TUNED, scale="search")):
        results = run(block, options)
        idle = f"{block.name}.idle.weight"
        assert_same_quantized(results[idle], QUANTIZER.quantize(block.weights()[idle], options), "idle")


def test_searched_scales_weigh_the_inputs_of_the_block():
    block = TinyBlock()
    block.module.norm.weight.data[:4] *= 20  # inputs of unequal size
    with torch.no_grad():
        block.outputs = block.module(block.hidden)
    options = dataclasses.replace(TUNED, bits=2, scale="search", iters=1, lr=1e-9)
    weight = block.weights()[name := f"{block.name}.up.weight"]
    normed = block.module.norm(block.hidden[::3]).detach()
    measured = Calibration(importance=normed.square().mean((0, 1)))
    found = run(block, options)[name].parts["scales"]
    assert torch.equal(found, QUANTIZER.quantize(weight, options, measured).parts["scales"])
    assert not torch.equal(found, QUANTIZER.quantize(weight, options).parts["scales"])


def test_trimmed_losses_ignore_the_largest_errors():
    block = TinyBlock()
    block.outputs[:, 0, 0] += 1e4  # what no rounding can reach
    run(block, dataclasses.replace(TUNED, trim=0.01))
    trimmed = [float(word) for word in block.lines[0].split()[1:4:2]]
    assert trimmed[0] < 10
    assert trimmed[1] < 0.9 * trimmed[0]


@pytest.mark.parametrize(
    ("tokens", "step", "share"), [(None, 8 * 2048, 0.5), (None, 8 * 128, 0.6), (0.25, 8 * 128, 0.25)]
)
def test_small_batches_count_more_of_their_tokens(tokens, step, share):
    assert dataclasses.replace(TUNED, tokens=tokens).counted_share(step) == share
