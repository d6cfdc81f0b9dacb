"""Writing GGUF: what comes back, which keys the gguf package reads, and everything that is refused before work."""

import json
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch

from lowbit.errors import CheckpointError, WeightError
from lowbit.metadata import Metadata, SideFile
from lowbit.parts import TensorSpec
from lowbit.tensors import PackedTensor, bit_equal
from lowbit.testing import ExporterContract, PackerContract, samples
from lowbit_formats.gguf import PACKERS, GgufExporter, GgufImporter
from lowbit_formats.gguf.header import read_header
from lowbit_formats.gguf.layouts import BY_TYPE

SCHEMES = [(packer.scheme, (3, 512)) for packer in PACKERS]


@pytest.fixture
def model(gguf_models, tmp_path_factory):
    """A function from recipe fields to the values and the metadata of a model."""

    def make(**changes):
        path = tmp_path_factory.mktemp("source") / "model.gguf"
        gguf_models.write(path, gguf_models.Recipe(**changes))
        with GgufImporter().open(path) as checkpoint:
            return dict(checkpoint.stream()), checkpoint.metadata

    return make


def entries_of(values):
    return {
        name: value.spec if isinstance(value, PackedTensor) else TensorSpec.of(value) for name, value in values.items()
    }


def written(values, metadata, path):
    GgufExporter().write(path, entries_of(values), iter(values.items()), metadata)
    return path


class TestGgufExporter(ExporterContract):
    @pytest.fixture
    def exporter(self):
        return GgufExporter()

    @pytest.fixture
    def importer(self):
        return GgufImporter()

    @pytest.fixture
    def source(self, model):
        types = {"blk.0.attn_q.weight": "Q4_0", "blk.0.attn_k.weight": "Q5_0", "blk.0.attn_v.weight": "BF16"}
        types |= {"blk.0.ffn_up.weight": "Q4_K", "blk.0.ffn_down.weight": "F16", "blk.0.ffn_gate.weight": "TQ1_0"}
        return model(types=types, tied=False)

    @pytest.fixture
    def values(self, source):
        return source[0]

    @pytest.fixture
    def metadata(self, source):
        return source[1]


@pytest.mark.parametrize(
    "packer", [packer for packer in PACKERS if packer.codebook is None], ids=lambda packer: packer.layout
)
class TestGgufPackers(PackerContract):
    @pytest.fixture
    def packer(self, packer):
        return packer

    @pytest.fixture
    def examples(self, packer):
        return [(packer.scheme, (3, 512)), (packer.scheme, (1, packer.type.weights))]


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma3", "phi3"])
@pytest.mark.parametrize("vocabulary", ["gpt2", "llama"])
def test_reading_back_gives_the_same_model(model, tmp_path, architecture, vocabulary):
    keys = {"gemma3.attention.sliding_window": 32} if architecture == "gemma3" else {}
    values, metadata = model(architecture=architecture, vocabulary=vocabulary, keys=keys)
    with GgufImporter().open(written(values, metadata, tmp_path / "out.gguf")) as again:
        assert again.metadata.config == metadata.config
        assert {file.name: file.content for file in again.metadata.side_files} == {
            file.name: file.content for file in metadata.side_files
        }
        assert list(again.entries.items()) == list(entries_of(values).items())
        for name, value in again.stream():
            first = values[name]
            if isinstance(value, PackedTensor):
                value, first = value.buffers["blocks"], first.buffers["blocks"]
            assert bit_equal(value, first), name


def test_keys_survive_a_round_trip(gguf_models, tmp_path):
    """Everything that the first file says is said by the second, and its data has the same bytes."""
    first, second = tmp_path / "first.gguf", tmp_path / "second.gguf"
    keys = {"general.name": "Tiny", "tokenizer.chat_template": "{{ messages }}", "llama.rope.scaling.type": "linear"}
    keys |= {"llama.rope.scaling.factor": 2.0, "tokenizer.ggml.add_bos_token": True}
    keys |= {"general.file_type": 7, "general.quantization_version": 2, "llama.rope.dimension_count": 64}
    gguf_models.write(first, gguf_models.Recipe(keys=keys))
    with GgufImporter().open(first) as checkpoint:
        GgufExporter().write(second, checkpoint.entries, checkpoint.stream(), checkpoint.metadata)
    before, after = read_header(first), read_header(second)
    assert {name: after.keys.get(name) for name in before.keys} == dict(before.keys)
    theirs, ours = gguf.GGUFReader(first), gguf.GGUFReader(second)
    assert [tensor.name for tensor in ours.tensors] == [tensor.name for tensor in theirs.tensors]
    for one, other in zip(theirs.tensors, ours.tensors, strict=True):
        assert one.tensor_type == other.tensor_type
        assert one.shape.tolist() == other.shape.tolist()
        assert np.array_equal(one.data.view(np.uint8), other.data.view(np.uint8))


def test_the_gguf_package_reads_what_is_written(model, tmp_path):
    values, metadata = model()
    reader = gguf.GGUFReader(written(values, metadata, tmp_path / "out.gguf"))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "llama"
    assert fields["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q8_0
    assert fields["general.quantization_version"] == 2
    assert fields["llama.attention.head_count_kv"] == 2
    assert fields["tokenizer.ggml.pre"] == "smollm"
    assert all(tensor.data_offset % 32 == 0 for tensor in reader.tensors)


def test_llama_3_factors_are_a_tensor(model, tmp_path):
    values, metadata = model()
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 8192, "rope_theta": 500000.0}
    config = {**metadata.config, "rope_parameters": scaling, "rope_scaling": None}
    path = written(values, replace(metadata, config=config), tmp_path / "out.gguf")
    factors = next(tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == "rope_freqs.weight")
    assert factors.data.shape == (32,)
    assert factors.data[0] == 1.0
    assert factors.data[-1] == 8.0
    with GgufImporter().open(path) as again:
        assert again.metadata.config["rope_parameters"] == scaling


def test_old_configs_say_rope_at_the_top(model, tmp_path):
    values, metadata = model()
    config = {name: value for name, value in metadata.config.items() if name != "rope_parameters"}
    config |= {"rope_theta": 123.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    header = read_header(written(values, replace(metadata, config=config), tmp_path / "out.gguf"))
    assert header.keys["llama.rope.freq_base"] == 123.0
    assert (header.keys["llama.rope.scaling.type"], header.keys["llama.rope.scaling.factor"]) == ("linear", 2.0)


def test_mistral_is_written_as_llama(model, tmp_path):
    values, metadata = model()
    config = {**metadata.config, "model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    assert (
        read_header(written(values, replace(metadata, config=config), tmp_path / "o.gguf")).keys["general.architecture"]
        == "llama"
    )


def test_provenance_is_kept_in_keys(model, tmp_path):
    values, metadata = model()
    metadata = replace(metadata, provenance={"general.name": "Tiny", "quantizer": "kbit bits=4"})
    keys = read_header(written(values, metadata, tmp_path / "out.gguf")).keys
    assert keys["general.name"] == "Tiny"
    assert keys["lowbit.quantizer"] == "kbit bits=4"


def test_vectors_are_stored_as_float32():
    exporter = GgufExporter()
    assert exporter.plain("model.norm.weight", TensorSpec(torch.bfloat16, (64,))) == TensorSpec(torch.float32, (64,))
    matrix = TensorSpec(torch.bfloat16, (64, 64))
    assert exporter.plain("lm_head.weight", matrix) == matrix


def test_every_layout_and_variant_is_its_own(gguf_models):
    exporter = GgufExporter()
    assert set(exporter.layouts) == {packer.layout for packer in PACKERS}
    assert {"q8_0", "q4_0", "q4_1", "q5_0", "q5_1"} <= exporter.variants().keys()
    for name, scheme in exporter.variants().items():
        (layout,) = exporter.preferred(name)
        packer = BY_TYPE[name.upper()]
        assert (packer.layout, packer.scheme) == (layout, scheme)


def refusal(values, metadata):
    with pytest.raises(CheckpointError) as raised:
        GgufExporter().check(entries_of(values), metadata)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "falcon"}, "'falcon'"),
        ({"model_type": None}, "None"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "'dynamic'"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "'factor'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": "2"}}, "'factor' is '2'"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8, "high_freq_factor": []}}, "'high_freq_factor'"),
        ({"rope_parameters": {"rope_type": "longrope", "long_factor": [1], "short_factor": [1]}}, "long_factor"),
        ({"rope_theta": "many"}, "'rope_theta' is 'many'"),
        ({"hidden_size": None}, "hidden_size is None"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_attention_heads": 2.5}, "num_attention_heads is 2.5"),
        ({"head_dim": "64"}, "head_dim is '64'"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'"),
        ({"vocab_size": 200}, "200"),
        ({"num_hidden_layers": 2}, "model.layers.1."),
        ({"num_hidden_layers": 2**30}, "num_hidden_layers is 1073741824"),
        ({"num_attention_heads": 3}, "3 heads"),
        ({"tie_word_embeddings": False}, "lm_head.weight"),
    ],
)
def test_configs_that_are_refused(model, changes, words):
    values, metadata = model()
    config = {**metadata.config, **changes}
    if "rope_parameters" not in changes:
        config.pop("rope_parameters")
    assert words in refusal(values, replace(metadata, config=config))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"query_pre_attn_scalar": 128}, "query_pre_attn_scalar 128"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"hidden_activation": "silu"}, "'silu'"),
        ({"sliding_window": "32"}, "layer_types"),
        ({"final_logit_softcapping": "30"}, "final_logit_softcapping is '30'"),
    ],
)
def test_gemma3_configs_that_are_refused(model, changes, words):
    values, metadata = model(architecture="gemma3", keys={"gemma3.attention.sliding_window": 32})
    assert words in refusal(values, replace(metadata, config={**metadata.config, **changes}))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(32), "rotary_emb.inv_freq"),
        ("model.layers.0.mlp.experts.0.up_proj.weight", torch.ones(8, 32), "experts.0.up_proj"),
        ("model.layers.7.mlp.up_proj.weight", torch.ones(8, 32), "model.layers.7"),
        ("model.layers.0.self_attn.a_projection_with_a_name_that_takes_over_63_bytes.weight", torch.ones(8), "over_63"),
        ("vision_tower.weight", torch.ones(8, 32), "vision_tower"),
        ("model.norm.bias", torch.ones(8, dtype=torch.int64), "int64"),
        ("model.norm.weight", torch.ones(256, dtype=torch.bfloat16), "a vector of torch.bfloat16"),
        ("lm_head.weight", torch.ones(2, 2, 2), "(2, 2, 2)"),
        ("lm_head.weight", torch.ones(8, 8, dtype=torch.float64), "float64"),
    ],
)
def test_tensors_that_are_refused(model, name, value, words):
    values, metadata = model()
    assert words in refusal({**values, name: value}, metadata)


def test_a_layout_of_another_format_is_refused(model):
    values, metadata = model()
    name = "model.layers.0.mlp.up_proj.weight"
    spec = replace(values[name].spec, layout="awq")
    assert "'awq'" in refusal({**values, name: PackedTensor(spec, values[name].buffers)}, metadata)


def test_scales_that_are_not_finite_are_refused(model, tmp_path):
    values, metadata = model()
    name = "model.layers.0.mlp.up_proj.weight"
    blocks = values[name].buffers["blocks"].clone()
    blocks[5, 34:36] = torch.tensor([0x00, 0x7C], dtype=torch.uint8)
    values[name] = PackedTensor(values[name].spec, {"blocks": blocks})
    with pytest.raises(WeightError, match=r"up_proj\.weight: row 5 has the scale inf"):
        written(values, metadata, tmp_path / "out.gguf")
    assert list(tmp_path.iterdir()) == []


def test_gemma3_norms_come_back_although_their_sum_is_rounded(model, tmp_path):
    """The file holds weight + 1 in float32, which forgets 2**-26 and the sign of zero; a key keeps them."""
    values, metadata = model(architecture="gemma3", keys={"gemma3.attention.sliding_window": 32})
    values["model.norm.weight"] = torch.tensor([2.0**-26, -0.0, 0.0, -1e-30] * 64)
    values["model.layers.0.self_attn.q_norm.weight"] = torch.tensor([0.1, -3.5] * 32)
    path = written(values, metadata, tmp_path / "out.gguf")
    with GgufImporter().open(path) as again:
        for name in entries_of(values):
            if name.endswith("norm.weight"):
                assert bit_equal(again.read(name), values[name]), name
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert set(stored["output_norm.weight"].data.tolist()) == {1.0}
    assert np.allclose(stored["blk.0.attn_q_norm.weight"].data[:2], [1.1, -2.5])


def test_a_norm_that_was_changed_afterwards_is_read_from_its_tensor(model, tmp_path):
    values, metadata = model(architecture="gemma3", keys={"gemma3.attention.sliding_window": 32})
    path = written(values, metadata, tmp_path / "out.gguf")
    info = next(tensor for tensor in read_header(path).tensors if tensor.name == "output_norm.weight")
    with path.open("r+b") as file:
        file.seek(info.start)
        file.write(np.float32([3.0]).tobytes())
    with GgufImporter().open(path) as again:
        assert again.read("model.norm.weight")[0] == 2.0


def test_text_that_is_no_unicode_is_refused(model):
    values, metadata = model()
    config = json.loads(metadata.side_file("tokenizer_config.json").read())
    files = [file for file in metadata.side_files if file.name != "tokenizer_config.json"]
    broken = SideFile("tokenizer_config.json", content=json.dumps({**config, "chat_template": "\ud83d"}).encode())
    assert "no text" in refusal(values, Metadata(metadata.config, (*files, broken), {}))


def test_fixed_codebooks_round_trip_in_a_file(model, tmp_path):
    """IQ4_NL and MXFP4, which the packer contract cannot fill: their scheme names no codebook."""
    values, metadata = model()
    for name, type in (("up", "IQ4_NL"), ("gate", "MXFP4")):
        packer = BY_TYPE[type]
        parts = {**samples.quantized(packer.scheme, (512, 256)).parts, "codebook": packer.codebook}
        packed = packer.pack(replace(samples.quantized(packer.scheme, (512, 256)), parts=parts))
        values[f"model.layers.0.mlp.{name}_proj.weight"] = packed
    with GgufImporter().open(written(values, metadata, tmp_path / "out.gguf")) as again:
        for name in ("up", "gate"):
            name = f"model.layers.0.mlp.{name}_proj.weight"
            assert bit_equal(again.read(name).buffers["blocks"], values[name].buffers["blocks"])
