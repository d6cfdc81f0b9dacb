import shutil
from types import SimpleNamespace

import pytest
import torch

from lowbit import Calibration, PackedSpec
from lowbit.convert import convert, plan_conversion
from lowbit.diff import differences
from lowbit.errors import CheckpointError, NoRouteError, OptionError, OutputError, VerificationError, WeightError
from lowbit.plan import Action, Target
from lowbit.recipe import NOTHING, Recipe, Rule, parse_rules

UP, DOWN = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"


def actions(report):
    return {outcome.step.name: outcome.step.action for outcome in report.outcomes}


def test_quantize_reports_a_measured_error_and_copies_the_rest(registry, source, tmp_path):
    report = convert(source, tmp_path / "out", Target("any"), registry, Recipe(Rule("*", "round")))
    assert [name for name, action in actions(report).items() if action is Action.QUANTIZE] == [UP, DOWN]
    assert not report.error.exact
    assert 0.03 < report.error.relative < 0.15
    with registry.open(source) as first, registry.open(tmp_path / "out") as second:
        found = {difference.name: difference for difference in differences(first, second, registry)}
    assert found[UP].error.relative == pytest.approx(report.outcomes[1].error.relative, rel=1e-6)
    assert found["model.norm.weight"].exact
    assert found["counts"].exact


def test_transcoding_is_exact(registry, packed_source, tmp_path):
    report = convert(packed_source, tmp_path / "out", Target("wide-only"), registry)
    assert actions(report)[UP] is Action.TRANSCODE
    assert report.error.exact
    with registry.open(packed_source) as first, registry.open(tmp_path / "out") as second:
        assert second.entries[UP].layout == "wide"
        assert all(difference.exact for difference in differences(first, second, registry))


def test_dequantizing_is_exact_in_float32_and_measured_in_bfloat16(registry, packed_source, tmp_path):
    report = convert(packed_source, tmp_path / "exact", Target("floats"), registry)
    assert actions(report)[UP] is Action.DEQUANTIZE
    assert report.error.exact
    rounded = convert(packed_source, tmp_path / "rounded", Target("floats", dtype=torch.bfloat16), registry)
    assert not rounded.error.exact
    assert rounded.error.relative < 2**-8


def test_a_layout_that_the_format_stores_is_copied_byte_for_byte(registry, packed_source, tmp_path):
    report = convert(packed_source, tmp_path / "out", Target("any"), registry)
    assert set(actions(report).values()) == {Action.COPY}


def test_packed_weights_can_be_quantized_again_when_asked(registry, packed_source, tmp_path):
    recipe = Recipe(Rule("*", "round", {"bits": "2"}), requantize=True)
    report = convert(packed_source, tmp_path / "out", Target("any"), registry, recipe)
    assert actions(report)[UP] is Action.QUANTIZE
    assert report.error.relative > 0.2


def test_a_variant_never_answers_a_different_question(registry, packed_source, tmp_path, source):
    convert(packed_source, tmp_path / "four", Target("wide-only", "four"), registry)
    for bits, name in (("3", "three"), ("5", "five")):
        convert(source, tmp_path / name, Target("any"), registry, Recipe(Rule("*", "round", {"bits": bits})))
    wider = convert(tmp_path / "three", tmp_path / "widened", Target("wide-only", "four"), registry)
    assert wider.error.exact
    assert wider.plan.entries[UP].scheme.bits == 4
    with pytest.raises(NoRouteError, match=r"no exact way leads there.*--allow-requantize"):
        convert(tmp_path / "five", tmp_path / "out", Target("wide-only", "four"), registry)
    with pytest.raises(OptionError, match="needs quantized weights and source has none"):
        convert(source, tmp_path / "out", Target("wide-only", "four"), registry)
    assert not (tmp_path / "out").exists()


def test_a_quantizers_scheme_is_re_expressed_where_the_format_lacks_it(registry, source, tmp_path, monkeypatch):
    refuse = lambda scheme, shape: None if scheme.bits == 4 else "4 bits only"
    for packer in registry.packers.values():
        monkeypatch.setattr(packer, "why_not", refuse)
    recipe = Recipe(Rule("*", "round", {"bits": "3"}))
    report = convert(source, tmp_path / "out", Target("any"), registry, recipe)
    assert report.plan.entries[UP].scheme.bits == 4
    assert {value.layout for value in report.plan.entries.values() if isinstance(value, PackedSpec)} == {"narrow"}
    assert 0.1 < report.error.relative < 0.3


def test_nan_names_the_tensor_and_leaves_nothing(registry, source, tmp_path):
    with registry.open(source) as checkpoint:
        checkpoint.read(DOWN)[3, 4] = float("nan")
    with pytest.raises(WeightError, match=f"{DOWN}: .*NaN"):
        convert(source, tmp_path / "out", Target("any"), registry, Recipe(Rule("*", "round")))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_difference_in_the_reopened_file_is_found(registry, source, tmp_path, monkeypatch):
    read = registry.exporters["any"].open

    def corrupted(path):
        checkpoint = read(path)
        checkpoint.values = {name: value.clone() for name, value in checkpoint.values.items()}
        checkpoint.values["counts"][0] = 7
        return checkpoint

    with registry.open(source):
        monkeypatch.setattr(
            registry.importers["any"], "open", lambda path: corrupted(path) if path != source else read(path)
        )
    with pytest.raises(VerificationError, match="counts reads back with other bytes"):
        convert(source, tmp_path / "out", Target("any"), registry)
    assert not (tmp_path / "out").exists()


def test_an_existing_destination_is_kept_unless_overwrite(registry, source, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputError, match="exists; give --overwrite"):
        convert(source, tmp_path / "out", Target("any"), registry)
    assert (tmp_path / "out").read_text() == "mine"
    convert(source, tmp_path / "out", Target("any"), registry, overwrite=True)
    assert (tmp_path / "out").read_text().startswith("any")


def test_an_interrupt_leaves_the_destination_as_it_was(registry, source, tmp_path):
    def interrupt(phase, step):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", Target("any"), registry, progress=interrupt)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_too_little_space_is_refused_before_any_work(registry, source, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(OutputError, match="its disk has 10 free"):
        convert(source, tmp_path / "out", Target("any"), registry)


def test_the_plan_knows_bytes_bits_and_memory_beforehand(registry, source):
    with registry.open(source) as checkpoint:
        plan = plan_conversion(checkpoint, Target("any"), Recipe(Rule("*", "round", {"bits": "4"})), registry)
    steps = {step.name: step for step in plan.steps}
    assert isinstance(steps[UP].target, PackedSpec)
    assert steps[UP].target.nbytes == 24 * 16 + 4 * 24 * 2
    assert plan.nbytes == sum(step.target.nbytes for step in plan.steps)
    assert plan.peak_memory > max(step.peak_bytes for step in plan.steps)


def test_rules_for_some_tensors_leave_others_as_they_are(registry, source, tmp_path):
    recipe = Recipe(None, parse_rules(["*up_proj*=round"]))
    assert actions(convert(source, tmp_path / "out", Target("any"), registry, recipe))[DOWN] is Action.COPY


def test_calibration_that_cannot_be_collected_is_refused(registry, source, tmp_path, monkeypatch):
    monkeypatch.setattr(type(registry.quantizers["round"]), "needs", frozenset({"hessian"}))
    with pytest.raises(OptionError, match=r"needs calibration \(hessian\)"):
        convert(source, tmp_path / "out", Target("any"), registry, Recipe(Rule("*", "round")))


def test_an_importance_matrix_reaches_the_quantizer(registry, source, tmp_path, monkeypatch):
    importance = torch.arange(16.0)
    seen = {}

    def quantize(self, weight, options, calibration=None):
        seen[tuple(weight.shape)] = calibration
        return original(self, weight, options)

    original = type(registry.quantizers["round"]).quantize
    monkeypatch.setattr(type(registry.quantizers["round"]), "needs", frozenset({"importance"}))
    monkeypatch.setattr(type(registry.quantizers["round"]), "quantize", quantize)
    (tmp_path / "imatrix").write_text("measured")
    recipe = Recipe(None, parse_rules(["*up_proj*=round"]))
    with pytest.raises(CheckpointError, match="holds no importance matrix"):
        convert(source, tmp_path / "out", Target("any"), registry, recipe, imatrix=tmp_path / "imatrix")
    monkeypatch.setattr(
        registry.importers["any"], "calibration", lambda path, checkpoint: {UP: Calibration(importance)}
    )
    convert(source, tmp_path / "out", Target("any"), registry, recipe, imatrix=tmp_path / "imatrix")
    assert torch.equal(seen[24, 16].importance, importance)
    with pytest.raises(OptionError, match=r"needs calibration \(importance\) for model.layers.0.mlp.down_proj"):
        convert(
            source, tmp_path / "o", Target("any"), registry, Recipe(Rule("*", "round")), imatrix=tmp_path / "imatrix"
        )


def test_progress_reports_every_tensor_twice(registry, source, tmp_path):
    seen = []
    convert(source, tmp_path / "out", Target("any"), registry, NOTHING, progress=lambda phase, step: seen.append(phase))
    assert seen == ["convert"] * 5 + ["verify"] * 5
