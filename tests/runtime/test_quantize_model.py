"""``lowbit.quantize_model`` and ``lowbit.explain``: models in memory."""

import pytest
import torch
from torch import nn

import lowbit
from lowbit import Quantizer, QuantLinear
from lowbit.errors import OptionError, WeightError


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


def test_in_memory_is_what_convert_writes(tiny, tokens, tmp_path, quantize):
    model = tiny()
    model.save_pretrained(tmp_path / "base")
    converted = lowbit.load(quantize(tmp_path / "base", tmp_path / "packed"), dtype=torch.float32)
    assert lowbit.quantize_model(model, "autoround", bits=4, group_size=32) is model
    assert torch.equal(logits(model, tokens), logits(converted, tokens))
    assert isinstance(model.lm_head, nn.Linear)
    assert not isinstance(model.lm_head, QuantLinear)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(lowbit.load(tmp_path / "saved", dtype=torch.float32), tokens), logits(model, tokens))


def test_experts_are_opened(tiny_experts, tokens):
    model = tiny_experts()
    expected = logits(model, tokens)
    lowbit.quantize_model(model, None, rules=["*.experts.2.down_proj.weight=autoround,bits=8,group_size=32"])
    experts = model.model.layers[0].mlp.experts
    assert isinstance(experts.get_submodule("2.down_proj"), QuantLinear)
    assert not isinstance(experts.get_submodule("1.down_proj"), QuantLinear)
    assert 0 < (logits(model, tokens) - expected).abs().max() < 0.05 * expected.abs().max()


def test_rules_decide_layer_by_layer():
    model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32, bias=False))
    lowbit.quantize_model(model, "autoround", group_size=32, rules=["1.weight=autoround,bits=8"])
    assert [layer.spec.scheme.bits for layer in model] == [4, 8]
    assert model[0].bias is not None
    model(torch.randn(3, 32)).sum().backward()
    assert model[0].bias.grad is not None


def test_dtype_and_mode_stay():
    model = nn.Sequential(nn.Linear(32, 64)).bfloat16().eval()
    lowbit.quantize_model(model, "autoround", group_size=32, symmetric=False)
    assert (model[0].compute_dtype, model[0].training) == (torch.bfloat16, False)
    assert not model[0].spec.scheme.symmetric


def test_what_cannot_be_quantized_is_refused_before_anything_changes():
    model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32))
    with torch.no_grad():
        model[0].weight[3, 4] = float("nan")
    with pytest.raises(WeightError, match=r"^0\.weight: "):
        lowbit.quantize_model(model, "autoround", group_size=32)
    with pytest.raises(OptionError, match="matches no 2-D weight"):
        lowbit.quantize_model(model, "autoround", rules=["nowhere.*=none"])


def test_quantizers_that_need_calibration_are_left_to_convert():
    class Needy(type(lowbit.installed().quantizers["autoround"])):
        name = "needy"
        needs = frozenset({"hessian"})

        def needs_for(self, options):
            return self.needs

    registry = lowbit.Registry()
    registry.quantizers.register(Needy())
    assert isinstance(registry.quantizers["needy"], Quantizer)
    with pytest.raises(OptionError, match="needs hessian from calibration"):
        lowbit.quantize_model(nn.Sequential(nn.Linear(32, 64)), "needy", registry=registry)


def test_explain_says_who_serves_and_why_others_do_not():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 24)).bfloat16()
    assert str(lowbit.explain(model)) == "no layer of this model is packed"
    lowbit.quantize_model(model, "autoround", group_size=32)
    explanation = lowbit.explain(model)
    assert [layer.kernel for layer in explanation.layers] == ["cpu-int4", "cpu-rows"]
    assert "multiples of 16" in explanation.layers[1].refusals["cpu-int4"]
    assert "symmetric affine codes of 5 to 8 bits" in explanation.layers[0].refusals["cpu-int8"]
    assert "cpu-rows" not in explanation.layers[0].refusals  # slower than the one that serves
    text = str(explanation)
    assert "cpu-rows serves 1 of " in text
    assert "    not cpu-int4: needs out_features in multiples of 16" in text
