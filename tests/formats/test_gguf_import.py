"""Reading GGUF models that the gguf package wrote: names, rows, config, and refusals."""

import json

import gguf
import numpy as np
import pytest
import torch

from lowbit.errors import CheckpointError
from lowbit.parts import TensorSpec
from lowbit.tensors import PackedSpec, PackedTensor, bit_equal
from lowbit.testing import ImporterContract, Written
from lowbit_formats.gguf import GgufExporter, GgufImporter
from lowbit_formats.gguf.header import read_header
from lowbit_formats.gguf.layouts import BY_TYPE
from lowbit_formats.gguf.rope import llama3_factors

ROWS = "model.layers.0.self_attn.{}_proj.weight"


def halves(rows, heads):
    """Undo llama.cpp's row order, written independently: ggml row (h, i, half) is Hugging Face's (h, half, i)."""
    out = np.empty_like(rows)
    length = len(rows) // heads
    for head in range(heads):
        for index in range(length):
            place = head * length + (index % 2) * (length // 2) + index // 2
            out[place] = rows[head * length + index]
    return out


def expected(recipe, arrays):
    """Return what must come back of a llama model, by Hugging Face name."""
    names = {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "output": "lm_head",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    values = {}
    for ggml_name, array in arrays.items():
        stem = ggml_name.removesuffix(".weight").removeprefix("blk.0.")
        name = ("model.layers.0." if ggml_name.startswith("blk.0.") else "") + names[stem] + ".weight"
        if stem in ("attn_q", "attn_k"):
            array = halves(array, recipe.heads if stem == "attn_q" else 2)
        type = recipe.types.get(ggml_name, "F32" if array.ndim == 1 else "Q8_0")
        if type in BY_TYPE:
            packer = BY_TYPE[type]
            shape = (array.shape[0], array.shape[1] // packer.type.nbytes * packer.type.weights)
            values[name] = PackedTensor(packer.spec(packer.scheme, shape), {"blocks": torch.from_numpy(array.copy())})
        elif type == "BF16":
            values[name] = torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
        else:
            values[name] = torch.from_numpy(array.copy())
    return values


@pytest.fixture
def written(gguf_models, tmp_path):
    blocks = {
        "attn_q": "Q4_0",
        "attn_k": "Q5_1",
        "attn_v": "BF16",
        "attn_output": "F16",
        "ffn_gate": "Q4_K",
        "ffn_up": "IQ4_NL",
        "ffn_down": "F32",
    }
    recipe = gguf_models.Recipe(types={f"blk.0.{stem}.weight": type for stem, type in blocks.items()})
    path = tmp_path / "model.gguf"
    arrays = gguf_models.write(path, recipe)
    return Written(path, expected(recipe, arrays))


class TestGgufImporter(ImporterContract):
    @pytest.fixture
    def importer(self):
        return GgufImporter()

    @pytest.fixture
    def written(self, written):
        return written


def opened(gguf_models, tmp_path, **changes):
    path = tmp_path / "model.gguf"
    path.unlink(missing_ok=True)
    gguf_models.write(path, gguf_models.Recipe(**changes))
    return GgufImporter().open(path)


def refusal(gguf_models, tmp_path, **changes):
    with pytest.raises(CheckpointError) as raised:
        opened(gguf_models, tmp_path, **changes)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_llama_config(gguf_models, tmp_path):
    with opened(gguf_models, tmp_path) as checkpoint:
        config = checkpoint.metadata.config
    wanted = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-05,
        "vocab_size": len(gguf_models.byte_tokens),
        "rope_theta": 500000.0,
        "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
        "tie_word_embeddings": True,
        "attention_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
        "torch_dtype": "float32",
    }
    assert {name: config[name] for name in wanted} == wanted


def test_an_output_matrix_means_that_embeddings_are_not_tied(gguf_models, tmp_path):
    with opened(gguf_models, tmp_path, tied=False) as checkpoint:
        assert "lm_head.weight" in checkpoint.entries
        assert checkpoint.metadata.config["tie_word_embeddings"] is False


def test_types_without_a_packer_are_dequantized(gguf_models, tmp_path):
    types = {"blk.0.ffn_up.weight": "IQ4_XS", "blk.0.attn_q.weight": "IQ3_S"}
    path = tmp_path / "model.gguf"
    arrays = gguf_models.write(path, gguf_models.Recipe(types=types))
    with GgufImporter().open(path) as checkpoint:
        assert checkpoint.entries["model.layers.0.mlp.up_proj.weight"] == TensorSpec(torch.float32, (512, 256))
        up = gguf.dequantize(arrays["blk.0.ffn_up.weight"], gguf.GGMLQuantizationType.IQ4_XS)
        assert bit_equal(checkpoint.read("model.layers.0.mlp.up_proj.weight"), torch.from_numpy(up))
        query = gguf.dequantize(arrays["blk.0.attn_q.weight"], gguf.GGMLQuantizationType.IQ3_S)
        assert bit_equal(checkpoint.read(ROWS.format("q")), torch.from_numpy(halves(query, 4)))


@pytest.mark.parametrize("type", sorted(BY_TYPE.keys() - {"Q2_0", "Q1_0"}))
def test_every_packed_type_stays_packed(gguf_models, tmp_path, type):
    with opened(gguf_models, tmp_path, types={"blk.0.ffn_down.weight": type}) as checkpoint:
        entry = checkpoint.entries["model.layers.0.mlp.down_proj.weight"]
        assert isinstance(entry, PackedSpec)
        assert entry.layout == f"gguf-{type.lower()}"
        assert isinstance(checkpoint.read("model.layers.0.mlp.down_proj.weight"), PackedTensor)


@pytest.mark.parametrize(
    ("architecture", "hf_class", "model_type"),
    [
        ("qwen2", "Qwen2ForCausalLM", "qwen2"),
        ("qwen3", "Qwen3ForCausalLM", "qwen3"),
        ("phi3", "Phi3ForCausalLM", "phi3"),
        ("gemma3", "Gemma3ForCausalLM", "gemma3_text"),
    ],
)
def test_other_architectures(gguf_models, tmp_path, architecture, hf_class, model_type):
    path = tmp_path / "model.gguf"
    recipe = gguf_models.Recipe(architecture=architecture, types={"blk.0.attn_q.weight": "F32"})
    arrays = gguf_models.write(path, recipe)
    with GgufImporter().open(path) as checkpoint:
        config = checkpoint.metadata.config
        assert (config["architectures"], config["model_type"]) == ([hf_class], model_type)
        if architecture != "phi3":
            assert torch.equal(checkpoint.read(ROWS.format("q")), torch.from_numpy(arrays["blk.0.attn_q.weight"]))
        norm = torch.from_numpy(arrays["output_norm.weight"])
        assert torch.equal(checkpoint.read("model.norm.weight"), norm - 1 if architecture == "gemma3" else norm)
        assert config["attention_bias"] is (architecture == "qwen2")


def test_gemma3_config(gguf_models, tmp_path):
    keys = {
        "gemma3.attention.sliding_window": 32,
        "gemma3.rope.scaling.type": "linear",
        "gemma3.rope.scaling.factor": 8.0,
    }
    with opened(gguf_models, tmp_path, architecture="gemma3", vocabulary="llama", keys=keys) as checkpoint:
        config = checkpoint.metadata.config
    assert config["rope_parameters"] == {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 500000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    }
    assert config["layer_types"] == ["sliding_attention"]
    assert (config["sliding_window"], config["query_pre_attn_scalar"], config["head_dim"]) == (32, 64, 64)
    assert config["hidden_activation"] == "gelu_pytorch_tanh"


@pytest.mark.parametrize(
    ("factor", "low", "high", "context"), [(8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192), (16.0, 1.0, 2.5, 2048)]
)
def test_llama_3_rope_scaling_is_found_again(gguf_models, tmp_path, factor, low, high, context):
    parameters = {"factor": factor, "low_freq_factor": low, "high_freq_factor": high}
    parameters |= {"original_max_position_embeddings": context, "rope_theta": 500000.0}
    extra = {"rope_freqs.weight": llama3_factors(parameters, 64).numpy()}
    with opened(gguf_models, tmp_path, extra=extra) as checkpoint:
        assert "rope_freqs.weight" not in checkpoint.entries
        config = checkpoint.metadata.config
    assert config["rope_parameters"] == {"rope_type": "llama3", **parameters}
    assert config["rope_scaling"]["rope_type"] == "llama3"


def test_other_rope_factors_are_refused(gguf_models, tmp_path):
    extra = {"rope_freqs.weight": np.linspace(1, 9, 32, dtype=np.float32)}
    assert "rope_freqs.weight" in refusal(gguf_models, tmp_path, extra=extra)


def test_yarn_and_linear_rope_scaling(gguf_models, tmp_path):
    keys = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}
    keys |= {"llama.rope.scaling.original_context_length": 32, "llama.rope.scaling.yarn_beta_fast": 16.0}
    with opened(gguf_models, tmp_path, keys=keys) as checkpoint:
        scaling = checkpoint.metadata.config["rope_scaling"]
    wanted = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 16.0}
    assert scaling == wanted
    with opened(gguf_models, tmp_path, keys={"llama.rope.scale_linear": 2.0}) as checkpoint:
        assert checkpoint.metadata.config["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}


def test_phi3_long_rope(gguf_models, tmp_path):
    extra = {f"rope_factors_{name}.weight": np.arange(1, 33, dtype=np.float32) for name in ("long", "short")}
    keys = {"phi3.rope.scaling.original_context_length": 64}
    with opened(gguf_models, tmp_path, architecture="phi3", extra=extra, keys=keys) as checkpoint:
        config = checkpoint.metadata.config
    assert config["rope_parameters"]["rope_type"] == "longrope"
    assert config["rope_parameters"]["long_factor"] == [float(value) for value in range(1, 33)]
    assert config["original_max_position_embeddings"] == 64


def test_provenance_keeps_what_people_wrote(gguf_models, tmp_path):
    keys = {"general.name": "Tiny", "general.author": "Ann", "lowbit.quantizer": "kbit", "general.rank": 3}
    with opened(gguf_models, tmp_path, keys=keys) as checkpoint:
        provenance = checkpoint.metadata.provenance
    assert provenance == {"general.name": "Tiny", "general.author": "Ann", "quantizer": "kbit"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architecture": "falcon"}, "falcon"),
        ({"keys": {"llama.expert_count": 8}}, "mixture of experts"),
        ({"without": ("llama.block_count",)}, "llama.block_count"),
        ({"without": ("llama.attention.layer_norm_rms_epsilon",)}, "llama.attention.layer_norm_rms_epsilon"),
        ({"without": ("blk.0.ffn_up.weight",)}, "blk.0.ffn_up.weight"),
        ({"without": ("token_embd.weight",)}, "token_embd.weight"),
        ({"keys": {"llama.block_count": 2**31 - 1}}, "blocks"),
        ({"keys": {"llama.block_count": 2}}, "blk.1."),
        ({"keys": {"llama.block_count": "one"}}, "must be an integer"),
        ({"keys": {"llama.attention.head_count_kv": [2, 2]}}, "differs between layers"),
        ({"keys": {"llama.attention.head_count": 0}}, "heads"),
        ({"keys": {"llama.attention.head_count": 3}}, "3 heads"),
        ({"keys": {"llama.attention.layer_norm_rms_epsilon": float("nan")}}, "finite"),
        ({"keys": {"llama.attention.value_length": 32}}, "different lengths"),
        ({"keys": {"llama.rope.scaling.type": "longrope"}}, "longrope"),
        ({"extra": {"blk.0.attn_sinks.weight": np.ones(4, np.float32)}}, "blk.0.attn_sinks.weight"),
        ({"extra": {"blk.1.attn_norm.weight": np.ones(4, np.float32)}}, "blk.1.attn_norm.weight"),
        ({"extra": {"blk.0.attn_q.scale": np.ones(4, np.float32)}}, "blk.0.attn_q.scale"),
        ({"types": {"blk.0.ffn_up.weight": "Q8_K"}}, "Q8_K"),
        ({"types": {"blk.0.ffn_up.weight": "NVFP4"}}, "NVFP4"),
        ({"keys": {"tokenizer.ggml.scores": [0.5]}}, "scores has 1 elements"),
        ({"keys": {"tokenizer.ggml.tokens": ["a"] * 266}}, "'a' is in tokenizer.ggml.tokens twice"),
        ({"keys": {"tokenizer.ggml.merges": ["h", "e"]}}, "does not join"),
        ({"keys": {"tokenizer.ggml.merges": [1, 2]}}, "must be an array of str"),
    ],
)
def test_models_that_are_refused(gguf_models, tmp_path, changes, words):
    assert words in refusal(gguf_models, tmp_path, **changes)


def split(gguf_models, tmp_path, parts=2):
    """Write a model split over files, as llama-gguf-split does, and return the first."""
    whole = tmp_path / "whole.gguf"
    gguf_models.write(whole, gguf_models.Recipe())
    reader = gguf.GGUFReader(whole)
    cut = -(-len(reader.tensors) // parts)
    for index in range(parts):
        path = tmp_path / f"model-{index + 1:05}-of-{parts:05}.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        if index == 0:
            for name, field in reader.fields.items():
                if not name.startswith("GGUF.") and name != "general.architecture":
                    writer.add_key_value(
                        name, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None
                    )
        writer.add_uint16("split.no", index)
        writer.add_uint16("split.count", parts)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for tensor in reader.tensors[index * cut : (index + 1) * cut]:
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return whole, tmp_path / f"model-00001-of-{parts:05}.gguf"


def test_split_models_open_by_their_first_file(gguf_models, tmp_path):
    whole, first = split(gguf_models, tmp_path, 3)
    with GgufImporter().open(whole) as one, GgufImporter().open(first) as many:
        assert one.entries == many.entries
        assert one.metadata.config == many.metadata.config
        for name, value in one.stream():
            other = many.read(name)
            if isinstance(value, PackedTensor):
                value, other = value.buffers["blocks"], other.buffers["blocks"]
            assert bit_equal(value, other)


def test_split_models_must_be_whole(gguf_models, tmp_path):
    _, first = split(gguf_models, tmp_path)
    second = tmp_path / "model-00002-of-00002.gguf"
    with pytest.raises(CheckpointError, match="open the one named"):
        GgufImporter().open(second)
    content = second.read_bytes()
    second.write_bytes(first.read_bytes())
    with pytest.raises(CheckpointError, match="part 2 of 2"):
        GgufImporter().open(first)
    second.unlink()
    with pytest.raises(CheckpointError, match="is not beside it"):
        GgufImporter().open(first)
    second.write_bytes(content)
    with pytest.raises(CheckpointError, match="open the one named"):
        GgufImporter().open(first.rename(tmp_path / "renamed.gguf"))


def test_a_file_that_shrinks_while_open_is_told(gguf_models, tmp_path):
    checkpoint = opened(gguf_models, tmp_path)
    path = tmp_path / "model.gguf"
    content = path.read_bytes()
    with checkpoint, path.open("r+b") as file:
        file.truncate(len(content) // 2)
        with pytest.raises(CheckpointError, match="shorter"):
            dict(checkpoint.stream())


def test_unknown_pre_tokenizer_leaves_the_tokenizer_out_and_says_so(gguf_models, tmp_path):
    with opened(gguf_models, tmp_path, pre="klingon") as checkpoint:
        assert checkpoint.metadata.side_files == ()
        assert "'klingon'" in checkpoint.metadata.provenance["tokenizer"]
        assert checkpoint.metadata.config["eos_token_id"] == 1
        with pytest.raises(CheckpointError, match="klingon"):
            GgufExporter().check(checkpoint.entries, checkpoint.metadata)


def test_roles_of_tokens_that_do_not_exist_are_left_out(gguf_models, tmp_path):
    keys = {"tokenizer.ggml.padding_token_id": 10**6}
    with opened(gguf_models, tmp_path, keys=keys) as checkpoint:
        assert checkpoint.metadata.config["pad_token_id"] is None


def test_no_vocabulary_at_all(gguf_models, tmp_path):
    with opened(gguf_models, tmp_path, vocabulary="none") as checkpoint:
        assert "no vocabulary" in checkpoint.metadata.provenance["tokenizer"]
        assert json.dumps(dict(checkpoint.metadata.config))


@pytest.mark.parametrize(
    ("type", "at", "raw", "value"),
    [
        ("Q8_0", 0, 0x7C00, "inf"),
        ("Q4_K", 2, 0xFC00, "-inf"),
        ("Q6_K", 208, 0x7E00, "nan"),
        ("MXFP4", 0, 0x00FF, "nan"),
    ],
)
def test_scales_that_are_not_finite_are_named(gguf_models, tmp_path, type, at, raw, value):
    """The third row of q: the message counts rows as the file has them, and names its tensor."""
    path = tmp_path / "model.gguf"
    gguf_models.write(path, gguf_models.Recipe(types={"blk.0.attn_q.weight": type}))
    info = next(info for info in read_header(path).tensors if info.name == "blk.0.attn_q.weight")
    with path.open("r+b") as file:
        file.seek(info.start + 2 * info.type.row_bytes(256) + at)
        file.write(raw.to_bytes(2, "little"))
    with GgufImporter().open(path) as checkpoint:
        with pytest.raises(CheckpointError, match=rf"blk\.0\.attn_q\.weight: row 2 has the scale {value}; "):
            checkpoint.read("model.layers.0.self_attn.q_proj.weight")
        checkpoint.read("model.layers.0.self_attn.k_proj.weight")
