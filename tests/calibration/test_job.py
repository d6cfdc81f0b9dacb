"""Calibrated conversions: what reaches quantizers and files, what can be kept, stopped and taken up again."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lowbit
from lowbit.calibration.measured import StatisticsFile
from lowbit.calibration.runner import BlockRunner
from lowbit.calibration.wishes import Wishes
from lowbit.calibration.workdir import work_path
from lowbit.convert import convert
from lowbit.errors import CheckpointError, OptionError, OutputError, PausedError
from lowbit.plan import Target
from lowbit.recipe import Recipe, Rule, parse_rules

SMALL = {"nsamples": 6, "seqlen": 16, "batch_size": 4}


def run(source, destination, registry, quantizer="needs-block", target="native", rules=(), **wishes):
    said = {name: wishes.pop(name) for name in ("note", "progress") if name in wishes}
    recipe = Recipe(Rule("*", quantizer), parse_rules(rules))
    calibrating = Wishes(**{**SMALL, **wishes})
    return convert(source, destination, Target.parse(target), registry, recipe, calibrating=calibrating, **said)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def whole(registry, llama, tmp_path_factory):
    """The folder that a conversion writes that nobody interrupts."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    run(llama, folder, registry)
    return folder


def test_blocks_are_calibrated_and_the_rest_is_copied(registry, llama, tmp_path):
    notes, phases = [], []
    report = run(
        llama,
        tmp_path / "out",
        registry,
        note=notes.append,
        progress=lambda phase, step: phases.append((phase, step.name)),
    )
    assert sum(outcome.step.choice is not None for outcome in report.outcomes) == 21
    assert len([name for phase, name in phases if phase == "calibrate"]) == 21
    assert [note.split(":")[0] for note in notes if "21 weights" in note or "7 weights" in note] == [
        f"model.layers.{number}" for number in range(3)
    ]
    assert sum("loss" in note for note in notes) == 3
    assert not work_path(tmp_path / "out").exists()
    assert lowbit.load(tmp_path / "out").config.num_hidden_layers == 3


def test_a_model_in_gguf_is_calibrated_too(registry, llama, tmp_path):
    convert(llama, tmp_path / "source.gguf", Target("gguf"), registry)
    run(tmp_path / "source.gguf", tmp_path / "out", registry)
    run(tmp_path / "source.gguf", tmp_path / "floats", registry, target="hf")
    with registry.open(tmp_path / "out") as checkpoint:
        assert len(checkpoint.entries) > 21


def test_importance_reaches_quantizers_that_need_nothing_only_when_texts_are_named(registry, llama, tmp_path):
    run(llama, tmp_path / "plain", registry, "rounds")
    run(llama, tmp_path / "weighed", registry, "rounds", dataset="default")
    plain, weighed = contents(tmp_path / "plain"), contents(tmp_path / "weighed")
    assert plain["lowbit.safetensors"] != weighed["lowbit.safetensors"]


def test_statistics_are_kept_and_used_again(registry, llama, tmp_path, monkeypatch):
    kept = tmp_path / "kept.safetensors"
    run(llama, tmp_path / "first", registry, "needs-hessian", statistics=kept)
    with registry.open(llama) as checkpoint:
        found = StatisticsFile(kept, checkpoint)
        assert len(found) == 21
        assert found["model.layers.1.mlp.down_proj.weight"].hessian.shape == (96, 96)
    monkeypatch.setattr(BlockRunner, "start", lambda self: pytest.fail("calibrated again"))
    run(llama, tmp_path / "second", registry, "needs-hessian", statistics=kept)
    assert contents(tmp_path / "first") == contents(tmp_path / "second")


def test_statistics_of_another_model_are_refused(registry, llama, experts, tmp_path):
    kept = tmp_path / "kept.safetensors"
    run(llama, tmp_path / "first", registry, "rounds", statistics=kept)
    with pytest.raises(CheckpointError, match="it is another model's"):
        run(experts, tmp_path / "second", registry, "rounds", statistics=kept)
    (tmp_path / "noise").write_bytes(b"noise")
    with pytest.raises(CheckpointError, match="cannot be read as statistics"):
        run(llama, tmp_path / "second", registry, "rounds", statistics=tmp_path / "noise")


def test_importance_is_saved_as_llama_cpp_reads_it(registry, llama, tmp_path):
    run(llama, tmp_path / "out", registry, "needs-hessian", save_imatrix=tmp_path / "imatrix.gguf")
    with registry.open(llama) as checkpoint:
        found = registry.calibration(tmp_path / "imatrix.gguf", checkpoint)
    assert len(found) == 21
    assert all((measured.importance > 0).all() for measured in found.values())
    with pytest.raises(OptionError, match=r"must end in \.gguf"):
        run(llama, tmp_path / "o", registry, save_imatrix=tmp_path / "imatrix.txt")


def test_needs_outside_of_blocks_are_refused(registry, llama, tmp_path):
    with pytest.raises(OptionError, match=r"needs calibration \(hessian\) for lm_head.weight"):
        run(llama, tmp_path / "out", registry, rules=["lm_head.weight=needs-hessian"])
    assert not work_path(tmp_path / "out").exists()


def test_a_missing_tokenizer_is_said_before_any_work(registry, llama, tmp_path):
    import shutil

    shutil.copytree(llama, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(CheckpointError, match="has no tokenizer that transformers can load"):
        run(tmp_path / "bare", tmp_path / "out", registry)
    assert not work_path(tmp_path / "out").exists()


def test_ctrl_c_stops_behind_the_block_and_resume_gives_the_same_bytes(registry, llama, tmp_path, whole):
    def interrupt(line):
        if line.startswith("model.layers.1: loss"):
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(PausedError, match=r"behind model.layers.1, 2 of 3 blocks are finished"):
        run(llama, tmp_path / "out", registry, note=interrupt)
    assert not (tmp_path / "out").exists()
    with pytest.raises(OutputError, match="holds an unfinished conversion; give --resume"):
        run(llama, tmp_path / "out", registry)
    notes = []
    run(llama, tmp_path / "out", registry, resume=True, note=notes.append)
    assert "2 of 3 blocks are finished already" in notes
    assert [note for note in notes if "loss" in note] == [
        note for note in notes if note.startswith("model.layers.2: loss")
    ]
    assert contents(tmp_path / "out") == contents(whole)
    assert not work_path(tmp_path / "out").exists()


def test_ctrl_c_twice_stops_at_once(registry, llama, tmp_path):
    before = signal.getsignal(signal.SIGINT)  # ignored, where a shell runs the tests in the background

    def interrupt(line):
        if "loss" in line:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(llama, tmp_path / "out", registry, note=interrupt)
    assert not work_path(tmp_path / "out").exists(), "nothing was finished, so nothing is kept"
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"nsamples": 5}, "samples number was 6, is 5"),
        ({"batch_size": 3}, "batch size was 4, is 3"),
        (
            {"rules": ["*down_proj*=needs-block,bits=4"]},
            r"choice for model.layers.0.mlp.down_proj.weight bits was \d, is 4",
        ),
        (
            {"target": "compressed-tensors", "rules": ["model.layers.*=needs-block,bits=4"]},
            "format was native, is comp",
        ),
    ],
)
def test_another_job_is_refused_and_the_difference_named(registry, llama, tmp_path, changes, sentence):
    def interrupt(line):
        if line.startswith("model.layers.0: loss"):
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(PausedError):
        run(llama, tmp_path / "out", registry, note=interrupt)
    with pytest.raises(OutputError, match=sentence):
        run(llama, tmp_path / "out", registry, resume=True, **changes)


@pytest.mark.parametrize(("share", "kept"), [(float("inf"), 2), (0.0, 0)])
def test_an_error_keeps_the_committed_blocks(registry, llama, tmp_path, whole, monkeypatch, share, kept):
    """Where commits may take no time none is made but the last; what is not committed is done again."""
    quantizer, notes = registry.quantizers["needs-block"], []
    original = quantizer.quantize_block

    def fail(weights, options, calibration, block=None):
        if block.name.endswith("2"):
            raise RuntimeError("out of memory")
        return original(weights, options, calibration, block)

    monkeypatch.setattr("lowbit.calibration.job.COMMIT_SHARE", share)
    monkeypatch.setattr(quantizer, "quantize_block", fail)
    with pytest.raises(RuntimeError):
        run(llama, tmp_path / "out", registry)
    monkeypatch.undo()
    run(llama, tmp_path / "out", registry, resume=True, note=notes.append)
    assert [line for line in notes if "finished already" in line] == (
        [f"{kept} of 3 blocks are finished already"] if kept else []
    )
    assert contents(tmp_path / "out") == contents(whole)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")
@pytest.mark.parametrize("how", ["operations", "7"])
def test_killed_at_any_moment_and_resumed_it_gives_the_same_bytes(llama, tmp_path, whole, how):
    script = Path(__file__).with_name("killed_job.py")
    command = [sys.executable, str(script), str(llama), str(tmp_path / "out"), how]
    result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    kills = [int(line) for line in result.stdout.split()]
    assert len(kills) >= 3
    if not how.isdecimal():
        assert {0, 1, 2} <= set(kills), "some child died behind every block"
    assert contents(tmp_path / "out") == contents(whole)
    assert not work_path(tmp_path / "out").exists()


def test_a_damaged_state_is_one_sentence(registry, llama, tmp_path):
    work_path(tmp_path / "out").mkdir()
    (work_path(tmp_path / "out") / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is damaged"):
        run(llama, tmp_path / "out", registry, resume=True)


def test_mixtures_of_experts_convert(registry, experts, tmp_path):
    report = run(experts, tmp_path / "out", registry, "needs-hessian")
    assert sum(outcome.step.choice is not None for outcome in report.outcomes) == 3 * (4 + 12)
    assert torch.isfinite(lowbit.load(tmp_path / "out")(torch.arange(1, 9)[None]).logits).all()
