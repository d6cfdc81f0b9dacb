"""``lowbit.load``: whole models from checkpoints of any format."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import lowbit
from lowbit.convert import convert
from lowbit.errors import CheckpointError, LowbitError, NoRouteError, OptionError
from lowbit.plan import Target
from lowbit.recipe import Rule
from lowbit.tensors import PackedSpec

pytestmark = pytest.mark.usefixtures("transformers")


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


def test_packed_computes_what_the_dequantized_model_computes(pair, tokens):
    packed, plain = (lowbit.load(path, dtype=torch.float32) for path in pair)
    assert any(isinstance(module, lowbit.QuantLinear) for module in packed.modules())
    torch.testing.assert_close(logits(packed, tokens), logits(plain, tokens), atol=1e-5, rtol=1e-5)
    assert not packed.training


def test_plain_folders_load_as_transformers_loads_them(pair, tokens, transformers):
    _, plain = pair
    expected = transformers.AutoModelForCausalLM.from_pretrained(plain)
    assert torch.equal(logits(lowbit.load(plain), tokens), logits(expected, tokens))


def test_experts_become_linears_of_their_own(transformers, tmp_path, quantize, tiny_experts):
    tiny_experts().save_pretrained(tmp_path / "base")
    model = lowbit.load(quantize(tmp_path / "base", tmp_path / "packed"))
    expert = model.get_submodule("model.layers.1.mlp.experts.3.down_proj")
    assert isinstance(expert, lowbit.QuantLinear)
    assert expert.spec.shape == (64, 32)


def test_everything_that_is_not_packed_is_cast(llama_folder):
    model = lowbit.load(llama_folder)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert lowbit.load(llama_folder, dtype=torch.float16).model.norm.weight.dtype == torch.float16


def test_tied_embeddings_stay_tied(llama_folder):
    model = lowbit.load(llama_folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_packed_head_of_a_tied_model_is_its_own(tmp_path, tokens, quantize, tiny):
    """A file may hold a head although its config ties it; the file's head is what runs."""
    tiny(tied=False).save_pretrained(tmp_path / "base")
    packed = quantize(
        tmp_path / "base",
        tmp_path / "packed",
        rules=[Rule("lm_head.weight", "autoround", {"bits": "8", "group_size": "32"})],
    )
    expected = logits(lowbit.load(packed, dtype=torch.float32), tokens)
    config = json.loads((packed / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    model = lowbit.load(packed, dtype=torch.float32)
    assert isinstance(model.lm_head, lowbit.QuantLinear)
    assert torch.equal(logits(model, tokens), expected)


@pytest.mark.parametrize("target", ["gguf:q4_0", "gptq", "awq"])
def test_other_formats_load_through_their_importers(target, tmp_path, tokens, quantize, tiny, add_tokenizer):
    registry = lowbit.installed()
    format = target.partition(":")[0]
    if format not in registry.exporters:
        pytest.skip(f"format {format} is not installed")
    tiny(hidden_size=128, intermediate_size=256).save_pretrained(tmp_path / "base")
    add_tokenizer(tmp_path / "base")
    destination = tmp_path / ("model.gguf" if format == "gguf" else "model")
    try:
        quantize(tmp_path / "base", destination, target)
    except NoRouteError as error:
        pytest.skip(str(error))
    convert(destination, tmp_path / "plain", Target("hf"), registry)
    model, plain = (lowbit.load(path, dtype=torch.float32) for path in (destination, tmp_path / "plain"))
    assert isinstance(model.model.layers[0].mlp.up_proj, lowbit.QuantLinear)
    torch.testing.assert_close(logits(model, tokens), logits(plain, tokens), atol=1e-4, rtol=1e-4)


def test_keep_packed_keeps_the_bits(llama_folder):
    kept, released = (
        lowbit.load(llama_folder, dtype=torch.float32, keep_packed=keep, prepare=True) for keep in (True, False)
    )
    name = "model.layers.0.mlp.up_proj.weight"
    with lowbit.installed().open(llama_folder) as checkpoint:
        stored = checkpoint.read(name).buffers
    layer = kept.model.layers[0].mlp.up_proj
    assert all(torch.equal(buffer, stored[key]) for key, buffer in layer.packed.buffers.items())
    kept.state_dict()
    with pytest.raises(CheckpointError, match="keep_packed=True"):
        released.state_dict()


def test_layers_are_prepared_when_they_first_run(llama_folder, tokens):
    """And only then are the packed bits given up, so that until then nothing was done beyond reading."""
    lazy, ready = (lowbit.load(llama_folder, dtype=torch.float32, prepare=prepare) for prepare in (False, True))
    first, second = (model.model.layers[1].mlp.up_proj for model in (lazy, ready))
    assert (first.is_prepared, second.is_prepared) == (False, True)
    assert first.packed.buffers
    assert torch.equal(logits(lazy, tokens), logits(ready, tokens))
    assert first.is_prepared
    with pytest.raises(CheckpointError, match="keep_packed=True"):
        _ = first.packed


def test_generation_settings_of_the_checkpoint_are_used(llama_folder, tmp_path):
    folder = shutil.copytree(llama_folder, tmp_path / "copy")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 7, "do_sample": True}))
    assert lowbit.load(folder).generation_config.eos_token_id == 7


def _edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "no-such-model"}, "no model of type 'no-such-model'"),
        ({"model_type": "clip_vision_model", "architectures": None}, "no language model for 'clip_vision_model'"),
        ({"num_hidden_layers": 3}, r"lacks model\.layers\.2\.\S+, .* and \d+ more"),
        ({"num_hidden_layers": 1}, r"the model does not, model\.layers\.1\."),
        ({"intermediate_size": 80}, r"down_proj.weight is 64x96, but the model of this config needs 64x80"),
        ({"vocab_size": 100}, "does not fit its config"),
    ],
)
def test_models_that_do_not_fit_are_refused_in_a_sentence(llama_folder, tmp_path, changes, words):
    folder = shutil.copytree(llama_folder, tmp_path / "copy")
    _edit(folder, **changes)
    with pytest.raises(CheckpointError, match=words) as caught:
        lowbit.load(folder)
    assert "\n" not in str(caught.value)


def test_buffers_of_another_scheme_are_refused_at_once(llama_folder, tmp_path):
    folder = shutil.copytree(llama_folder, tmp_path / "copy")
    said = (folder / "lowbit.json").read_text()
    (folder / "lowbit.json").write_text(said.replace('"bits": 4', '"bits": 3'))
    with pytest.raises(
        CheckpointError, match=r"declared as an affine 3-bit g32 weight in layout 'plain', but qweight is"
    ):
        lowbit.load(folder)


def test_a_path_without_a_config_is_refused(tmp_path, llama_folder):
    from safetensors.torch import save_file

    save_file({"x.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="no config that names a model_type"):
        lowbit.load(tmp_path)


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ("tpu7", "no device is named 'tpu7'"),
        ("cuda", "no CUDA device"),
        ("xpu:3", r"this torch \(\S+\), has no device xpu:3"),
        ("meta", "'meta' holds no weights"),
    ],
)
def test_devices_that_are_not_there_are_refused(llama_folder, device, words):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(OptionError, match=words):
        lowbit.load(llama_folder, device)


def test_a_missing_plugin_is_named(llama_folder):
    """As when a kbit checkpoint is opened where lowbit-kbit is not installed."""
    from lowbit.registry import Registry

    bare, full = Registry(), lowbit.installed()
    for importer in full.importers.values():
        bare.importers.register(_Renaming(importer) if importer.format == "native" else importer)
    with pytest.raises(NoRouteError, match="pip install lowbit-kbit"):
        lowbit.load(llama_folder, registry=bare)


class _Renaming(lowbit.Importer):
    """Says that every packed weight has a layout of lowbit-kbit."""

    format, priority = "native", 10

    def __init__(self, importer):
        self.importer = importer

    def why_not(self, path):
        return self.importer.why_not(path)

    def open(self, path):
        checkpoint = self.importer.open(path)
        checkpoint.entries = {
            name: replace(entry, layout="kbit-strange") if isinstance(entry, PackedSpec) else entry
            for name, entry in checkpoint.entries.items()
        }
        return checkpoint


def test_without_transformers_the_extra_is_named(monkeypatch, llama_folder):
    monkeypatch.setattr("lowbit.runtime.extras.find_spec", lambda name: None)
    for use in (lowbit.load, lowbit.load_tokenizer):
        with pytest.raises(OptionError, match=r"pip install 'lowbit\[hf\]'"):
            use(llama_folder)


def test_a_checkpoint_without_a_tokenizer_says_so(llama_folder):
    with pytest.raises(LowbitError, match="no tokenizer that transformers can load"):
        lowbit.load_tokenizer(llama_folder)


def test_importing_lowbit_imports_neither_torch_nor_transformers():
    code = "import sys, lowbit; lowbit.__all__; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
