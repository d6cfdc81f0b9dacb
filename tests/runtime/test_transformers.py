"""transformers' own ``from_pretrained`` and ``save_pretrained`` with native folders, and adapters on top."""

import pytest
import torch

import lowbit
from lowbit.diff import differences
from lowbit.errors import CheckpointError, LowbitError, OutputError

pytestmark = pytest.mark.usefixtures("transformers")


@pytest.fixture(scope="module")
def auto(transformers):
    import lowbit.transformers

    assert lowbit.transformers.register
    return transformers.AutoModelForCausalLM


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


def same(left, right):
    registry = lowbit.installed()
    with registry.open(left) as first, registry.open(right) as second:
        assert first.entries == second.entries
        return all(difference.exact for difference in differences(first, second, registry))


def test_from_pretrained_loads_a_native_folder(auto, pair, tokens):
    model, expected = auto.from_pretrained(pair[0], dtype=torch.float32), lowbit.load(pair[0], dtype=torch.float32)
    assert torch.equal(logits(model, tokens), logits(expected, tokens))
    assert sum(isinstance(module, lowbit.QuantLinear) for module in model.modules()) == sum(
        isinstance(module, lowbit.QuantLinear) for module in expected.modules()
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, "auto"])
def test_codes_and_scales_are_untouched_by_the_dtype(auto, llama_folder, dtype):
    model = auto.from_pretrained(llama_folder, dtype=dtype)
    with lowbit.installed().open(llama_folder) as checkpoint:
        for path, module in model.named_modules():
            if isinstance(module, lowbit.QuantLinear):
                stored = checkpoint.read(f"{path}.weight").buffers
                assert all(torch.equal(module.packed.buffers[name], buffer) for name, buffer in stored.items())


def test_save_pretrained_round_trip_is_exact(auto, pair, tmp_path, tokens):
    model = auto.from_pretrained(pair[0], dtype="auto")
    model.save_pretrained(tmp_path / "saved")
    assert same(pair[0], tmp_path / "saved")
    again = auto.from_pretrained(tmp_path / "saved", dtype="auto")
    assert torch.equal(logits(again, tokens), logits(model, tokens))
    (tmp_path / "saved" / "lowbit-00001-of-00002.safetensors").write_bytes(b"of an earlier save, in two shards")
    (tmp_path / "saved" / "adapter_model.safetensors").write_bytes(b"someone else's")
    model.save_pretrained(tmp_path / "saved")  # over itself
    kept = {file.name for file in (tmp_path / "saved").glob("*.safetensors")}
    assert kept == {"lowbit.safetensors", "adapter_model.safetensors"}
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_a_model_of_lowbit_load_saves_as_a_native_folder(pair, tmp_path):
    model = lowbit.load(pair[0], dtype=torch.float32, keep_packed=True)
    lowbit.save(model, tmp_path / "saved")
    assert same(pair[0], tmp_path / "saved")
    with pytest.raises(OutputError, match="exists"):
        lowbit.save(model, tmp_path / "saved")


def test_what_a_native_folder_cannot_be_is_refused(llama_folder, tmp_path):
    model = lowbit.load(llama_folder, keep_packed=True)
    with pytest.raises(OutputError, match="no variant"):
        model.save_pretrained(tmp_path / "saved", variant="fp16")
    with pytest.raises(CheckpointError, match="keep_packed"):
        lowbit.load(llama_folder, prepare=True).save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_plugins_and_kernels_compute_on_the_cpu(auto, llama_folder, monkeypatch):
    """And not on meta, where transformers makes the model: what they keep would have no values, now and for ever."""
    from lowbit.runtime import hf

    places = []

    def watched():
        places.append(torch.empty(0).device.type)
        return lowbit.installed()

    monkeypatch.setattr(hf, "installed", watched)
    auto.from_pretrained(llama_folder)
    assert len(places) > 1
    assert set(places) == {"cpu"}


def test_without_the_import_transformers_stops(auto, llama_folder, monkeypatch):
    """Random weights behind a warning would be the alternative."""
    from transformers.quantizers import auto as known

    monkeypatch.delitem(known.AUTO_QUANTIZER_MAPPING, "lowbit")
    monkeypatch.delitem(known.AUTO_QUANTIZATION_CONFIG_MAPPING, "lowbit")
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        auto.from_pretrained(llama_folder)


def test_registering_twice_is_once(auto):
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    from lowbit.runtime.hf import LowbitQuantizer, register

    register()
    assert AUTO_QUANTIZER_MAPPING["lowbit"] is LowbitQuantizer


def test_generate_runs(auto, llama_folder, tokens):
    model = auto.from_pretrained(llama_folder)
    out = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=3, do_sample=False, pad_token_id=0
    )
    assert out.shape == (2, 12)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # PEFT's own
def test_training_an_adapter_lowers_the_loss(auto, llama_folder, tokens, tmp_path):
    peft = pytest.importorskip("peft")
    model = auto.from_pretrained(llama_folder, dtype=torch.float32)
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    model.save_pretrained(tmp_path / "adapter")
    base = auto.from_pretrained(llama_folder, dtype=torch.float32)
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert torch.equal(logits(again.eval(), tokens), logits(model.eval(), tokens))
    with pytest.raises(LowbitError, match="packed weight"):
        model.merge_and_unload()


def test_gradients_reach_norms_through_packed_layers(auto, llama_folder, tokens):
    model = auto.from_pretrained(llama_folder, dtype=torch.float32)
    model.model.layers[0].input_layernorm.weight.requires_grad_()
    model(tokens, labels=tokens).loss.backward()
    assert model.model.layers[0].input_layernorm.weight.grad.abs().sum() > 0
