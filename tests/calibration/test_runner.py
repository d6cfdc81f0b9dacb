"""The block runner against the model run as a whole by transformers."""

from contextlib import contextmanager
from types import SimpleNamespace
from typing import cast

import pytest
import torch

import lowbit
from lowbit.calibration.runner import BlockRunner, run_blocks
from lowbit.calibration.skeleton import Filling, Skeleton
from lowbit.calibration.statistics import InputSums, Statistics
from lowbit.errors import CheckpointError, OptionError, WeightError
from lowbit.grids import dequantize
from lowbit.recipe import Recipe, Rule

CPU = torch.device("cpu")


def choices(checkpoint, registry, quantizer, rules=()):
    return Recipe(Rule("*", quantizer), tuple(rules)).choose(checkpoint.entries, registry)


def quantized_model(folder, found):
    """The whole model with the weights of ``found`` dequantized."""
    model = lowbit.load(folder, dtype=torch.float32)
    for block in found:
        for name, weight in block.quantized.items():
            model.get_submodule(name.removesuffix(".weight")).weight.data = dequantize(weight)
    return model


def hidden_states(model, tokens):
    with torch.no_grad():
        return model(tokens, output_hidden_states=True).hidden_states


@contextmanager
def watching(registry):
    """Yield a dict that fills with the inputs and targets of every block that the quantizer sees."""
    quantizer, seen = registry.quantizers["needs-block"], {}
    original = quantizer.quantize_block

    def watch(weights, options, calibration, block=None):
        seen[block.name] = block.inputs(range(6)), block.targets(range(6))
        return original(weights, options, calibration, block)

    quantizer.quantize_block = watch
    try:
        yield seen
    finally:
        del quantizer.quantize_block


def run(registry, folder, tokens, quantizer="needs-block", **options):
    with registry.open(folder) as checkpoint:
        chosen = choices(checkpoint, registry, quantizer)
        return list(run_blocks(checkpoint, chosen, tokens, registry, **options))


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_both_chains_are_those_of_the_whole_models(kind, registry, tokens, request):
    folder = request.getfixturevalue(kind)
    with watching(registry) as seen:
        found = run(registry, folder, tokens, batch_size=4)
    floats = hidden_states(lowbit.load(folder, dtype=torch.float32), tokens)
    rounded = hidden_states(quantized_model(folder, found), tokens)
    assert list(seen) == [f"model.layers.{number}" for number in range(3)]
    for number, (inputs, targets) in enumerate(seen.values()):
        torch.testing.assert_close(inputs, rounded[number], rtol=1e-4, atol=1e-4)
        if number < 2:  # the last hidden state of transformers is behind the final norm
            torch.testing.assert_close(targets, floats[number + 1], rtol=1e-4, atol=1e-4)
    assert all(block.error > 0.01 for block in found)


def test_the_float_chain_of_a_mixture_is_that_of_the_whole_model(registry, experts, tokens):
    with watching(registry) as seen:
        found = run(registry, experts, tokens)
    floats = hidden_states(lowbit.load(experts, dtype=torch.float32), tokens)
    for number, (_, targets) in enumerate(list(seen.values())[:2]):
        torch.testing.assert_close(targets, floats[number + 1], rtol=1e-4, atol=1e-4)
    assert 0.01 < found[0].error < 1


def test_the_float_weights_are_the_checkpoints_again_after_the_block(registry, llama, tokens):
    with registry.open(llama) as checkpoint:
        skeleton = Skeleton(checkpoint, registry, CPU, torch.float32)
        list(BlockRunner(skeleton, choices(checkpoint, registry, "needs-block"), tokens).run())
        assert all(parameter.device.type == "meta" for parameter in skeleton.model.parameters())


def test_statistics_are_means_over_the_float_models_inputs(registry, llama, tokens):
    model, seen = lowbit.load(llama, dtype=torch.float32), {}
    for path in ("model.layers.1.self_attn.k_proj", "model.layers.2.mlp.down_proj"):
        model.get_submodule(path).register_forward_pre_hook(
            lambda module, args, path=path: seen.__setitem__(path, args[0].reshape(-1, args[0].shape[-1]).double())
        )
    hidden_states(model, tokens)
    with registry.open(llama) as checkpoint:
        blocks = run_blocks(checkpoint, choices(checkpoint, registry, "needs-hessian"), tokens, registry, batch_size=4)
        found = {name: measured for block in blocks for name, measured in block.calibration.items()}
    assert len(found) == 21
    for path, x in seen.items():
        measured = found[f"{path}.weight"]
        torch.testing.assert_close(measured.importance.double(), x.square().mean(0), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(measured.hessian.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-5)


def test_experts_that_saw_little_take_the_mean_of_all(registry, experts, tokens):
    notes = []
    with registry.open(experts) as checkpoint:
        chosen = choices(checkpoint, registry, "needs-hessian")
        blocks = list(run_blocks(checkpoint, chosen, tokens, registry, note=notes.append))
    assert len(blocks[0].quantized) == 4 + 4 * 3
    few = [note for note in notes if "model.layers.0.mlp.experts" in note]
    assert few, "96 tokens times two experts leave some of four with fewer than 64"
    assert "it takes the mean of all experts" in few[0]
    names = {note.partition(" ")[0] for note in few if "down_proj" in note}
    pooled = [blocks[0].calibration[name].hessian for name in names]
    assert all(torch.equal(pooled[0], other) for other in pooled)


def test_activations_in_files_give_the_same_codes(registry, llama, tokens, tmp_path):
    def codes(folder):
        with registry.open(llama) as checkpoint:
            skeleton = Skeleton(checkpoint, registry, CPU, torch.float32)
            chosen = choices(checkpoint, registry, "needs-block")
            runner = BlockRunner(skeleton, chosen, tokens, batch_size=4, folder=folder)
            return [
                part for block in runner.run() for weight in block.quantized.values() for part in weight.parts.values()
            ]

    (tmp_path / "files").mkdir()
    assert all(torch.equal(*pair) for pair in zip(codes(None), codes(tmp_path / "files"), strict=True))
    assert any((tmp_path / "files").iterdir())


def test_a_packed_checkpoint_is_dequantized_block_by_block(registry, llama, tokens, tmp_path):
    from lowbit.convert import convert
    from lowbit.plan import Target

    convert(llama, tmp_path / "packed", Target("native"), registry, Recipe(Rule("*", "rounds", {"bits": "8"})))
    with registry.open(tmp_path / "packed") as checkpoint:
        found = list(run_blocks(checkpoint, choices(checkpoint, registry, "needs-block"), tokens, registry))
    assert [len(block.quantized) for block in found] == [7, 7, 7]


def test_a_tensor_that_is_missing_is_named(registry, llama, tokens):
    with registry.open(llama) as checkpoint:
        checkpoint.entries = {
            name: entry for name, entry in checkpoint.entries.items() if "layers.1.mlp.up" not in name
        }
        chosen = choices(checkpoint, registry, "needs-block")
        with pytest.raises(CheckpointError, match=r"lacks model.layers.1.mlp.up_proj.weight"):
            list(run_blocks(checkpoint, chosen, tokens, registry))


def test_a_model_without_blocks_is_refused_by_name(registry, llama):
    with registry.open(llama) as checkpoint:
        skeleton = Skeleton(checkpoint, registry, CPU, torch.float32)
        skeleton.config.num_hidden_layers = 7
        with pytest.raises(OptionError, match="LlamaForCausalLM has no list of 7 decoder blocks"):
            skeleton._find_blocks()


def test_a_block_that_gets_the_text_is_refused_by_its_class(registry, llama, tokens, transformers, monkeypatch):
    layer = transformers.models.llama.modeling_llama.LlamaDecoderLayer
    forward = transformers.models.llama.modeling_llama.LlamaModel.forward

    def with_text(self, input_ids=None, **kwargs):
        for block in self.layers:
            block(self.embed_tokens(input_ids), text=input_ids)
        return forward(self, input_ids, **kwargs)

    monkeypatch.setattr(transformers.models.llama.modeling_llama.LlamaModel, "forward", with_text)
    with registry.open(llama) as checkpoint:
        chosen = choices(checkpoint, registry, "needs-block")
        with pytest.raises(OptionError, match=f"{layer.__name__} gets arguments that depend on the text"):
            list(run_blocks(checkpoint, chosen, tokens, registry))


def test_outputs_that_overflow_name_the_block(registry, llama, tokens, monkeypatch):
    read = Skeleton.source_weight
    monkeypatch.setattr(
        Skeleton, "source_weight", lambda self, name: read(self, name) * (3e38 if "layers.1.mlp.down" in name else 1)
    )
    with pytest.raises(WeightError, match=r"model.layers.1: the outputs of this block are NaN or infinite"):
        run(registry, llama, tokens)


def test_infinite_activations_name_the_layer():
    linear = torch.nn.Linear(4, 4)
    statistics = Statistics(linear, {"a.weight": ""}, frozenset())
    with statistics.gathering():
        linear(torch.full((3, 4), float("inf")))
    with pytest.raises(WeightError, match=r"a.weight: an input of this layer is NaN or infinite"):
        statistics.results()


def test_float32_sums_are_checked_against_float64():
    sums = InputSums(2, True, CPU)
    sums.add(10, torch.ones(2, dtype=torch.float64), 1.01 * torch.eye(2))
    with pytest.raises(WeightError, match=r"differ by 1\.0e-02 from float64"):
        sums.result("a.weight")


def test_on_a_gpu_the_next_block_is_read_beside_the_work_and_no_further_one():
    read: list[str] = []

    def fill(name: str) -> Filling:
        read.append(name)
        return Filling({name: torch.zeros(1)}, {})

    skeleton = SimpleNamespace(device=torch.device("cuda"), read=fill)
    runner = BlockRunner(cast("Skeleton", skeleton), {}, torch.zeros(1, 1))
    fillings = runner._fillings(["a", "b", "c"])
    for done, name in enumerate("abc", 1):
        assert list(next(fillings).tensors) == [name]
        assert len(read) <= done + 1
    assert read == ["a", "b", "c"]
    assert next(fillings, None) is None
    assert next(runner._fillings([]), None) is None


def test_a_block_that_cannot_be_read_ahead_fails_when_it_is_asked_for():
    def fill(name: str) -> Filling:
        if name == "b":
            raise CheckpointError("b is damaged")
        return Filling({}, {})

    runner = BlockRunner(
        cast("Skeleton", SimpleNamespace(device=torch.device("cuda"), read=fill)), {}, torch.zeros(1, 1)
    )
    fillings = runner._fillings(["a", "b", "c"])
    next(fillings)
    with pytest.raises(CheckpointError, match="b is damaged"):
        next(fillings)
