"""File types: each tensor of a model gets the type that llama.cpp's own ``llama_model_quantize`` gives it."""

import gguf
import numpy as np
import pytest

from lowbit_formats import gguf_mixes
from lowbit_formats.gguf.header import read_header

HEAD = 64
MODELS = {
    "tied-gqa": {"hidden": 256, "inner": 512, "layers": 9, "heads": 4, "kv_heads": 1},
    "untied": {"hidden": 256, "inner": 256, "layers": 16, "heads": 4, "kv_heads": 4, "output": True},
    "odd-rows": {"hidden": 192, "inner": 320, "layers": 3, "heads": 3, "kv_heads": 3, "output": True},
    "odd-rows-tied": {"hidden": 96, "inner": 272, "layers": 2, "heads": 3, "kv_heads": 1, "head": 32},
    "qwen2-70b": {"arch": "qwen2", "hidden": 256, "inner": 256, "layers": 80, "heads": 2, "kv_heads": 2, "head": 128},
    "llama-70b": {"hidden": 256, "inner": 256, "layers": 80, "heads": 2, "kv_heads": 1, "head": 128, "output": True},
}
VOCABULARY = 32


def matrices(hidden, inner, layers, heads, kv_heads, output=False, head=HEAD, **ignored):
    """Shapes (out, in) of every matrix by ggml's name."""
    shapes = {"token_embd.weight": (VOCABULARY, hidden)}
    if output:
        shapes["output.weight"] = (VOCABULARY, hidden)
    for layer in range(layers):
        block = {
            "attn_q": (heads * head, hidden),
            "attn_k": (kv_heads * head, hidden),
            "attn_v": (kv_heads * head, hidden),
            "attn_output": (hidden, heads * head),
            "ffn_gate": (inner, hidden),
            "ffn_up": (inner, hidden),
            "ffn_down": (hidden, inner),
        }
        shapes |= {f"blk.{layer}.{stem}.weight": shape for stem, shape in block.items()}
    return shapes


def write_model(path, arch="llama", **sizes):
    """Write a model of random weights, without a tokenizer: llama_model_quantize does not look for one."""
    generator = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(128)
    writer.add_embedding_length(sizes["hidden"])
    writer.add_block_count(sizes["layers"])
    writer.add_feed_forward_length(sizes["inner"])
    writer.add_head_count(sizes["heads"])
    writer.add_head_count_kv(sizes["kv_heads"])
    writer.add_key_length(sizes.get("head", HEAD))
    writer.add_value_length(sizes.get("head", HEAD))
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    shapes = matrices(**sizes)
    for name, shape in shapes.items():
        writer.add_tensor(name, generator.standard_normal(shape, np.float32).astype(np.float16))
    writer.add_tensor("output_norm.weight", np.ones(sizes["hidden"], np.float32))
    writer.add_tensor("blk.0.attn_norm.weight", np.ones(sizes["hidden"], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return shapes


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory):
    """The path of a model, and its sizes and shapes."""
    path = tmp_path_factory.mktemp("mixes") / f"{request.param}.gguf"
    return path, MODELS[request.param], write_model(path, **MODELS[request.param])


def facts(sizes):
    """What ``types`` asks besides the matrices."""
    gqa = sizes["heads"] // sizes["kv_heads"]
    large = sizes["layers"] == 80 and (sizes.get("arch") == "qwen2" or gqa > 1)
    return {"blocks": sizes["layers"], "gqa": gqa, "large": large}


LONG_NAMES = [name for name in gguf_mixes.NAMES if name not in ("q3_k", "q4_k", "q5_k")]


@pytest.mark.parametrize("calibrated", [False, True], ids=["plain", "imatrix"])
@pytest.mark.parametrize("name", LONG_NAMES)
def test_same_types_as_llama_quantize(name, calibrated, model, llama):
    path, sizes, shapes = model
    columns = {tensor: shape[1] for tensor, shape in shapes.items()}
    importance = {tensor: np.ones(count, np.float32) for tensor, count in columns.items()} if calibrated else None
    expected = llama.planned_types(path, gguf_mixes.id_of(name), importance)
    if expected is None:
        assert name == "q1_0", "llama.cpp has no fallback for rows that no block of Q1_0 fits, but all others"
        return
    # what stays float16 is not quantized here
    expected = {tensor: type for tensor, type in expected.items() if type != "F16"}
    assert gguf_mixes.types(name, columns, **facts(sizes), calibrated=calibrated) == expected


@pytest.mark.parametrize("name", ["q4_0", "q4_k_m", "q2_k", "q6_k"])
def test_planned_types_are_those_it_writes(name, llama, tmp_path):
    """The log of a dry run is what the tests above read: here beside files."""
    write_model(tmp_path / "source.gguf", **MODELS["tied-gqa"])
    assert llama.quantize(tmp_path / "source.gguf", tmp_path / "theirs.gguf", gguf_mixes.id_of(name))
    header = read_header(tmp_path / "theirs.gguf")
    written = {info.name: info.type.name for info in header.tensors if len(info.shape) == 2}
    assert written == llama.planned_types(tmp_path / "source.gguf", gguf_mixes.id_of(name))
    assert header.keys["general.file_type"] == gguf_mixes.id_of(name)
