"""File types of llama.cpp: which tensors, which types. The oracles compare every mix with llama.cpp itself."""

import pytest
import torch

from lowbit.convert import convert
from lowbit.errors import CheckpointError, OptionError
from lowbit.metadata import Metadata
from lowbit.parts import TensorSpec
from lowbit.plan import Target, make_plan
from lowbit.plugins import installed
from lowbit.recipe import Recipe, Rule
from lowbit_formats import gguf_mixes
from lowbit_formats.gguf import GgufExporter, GgufImporter
from lowbit_formats.gguf.header import read_header
from lowbit_formats.gguf.layouts import BY_TYPE

LAYERS = 8
CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": LAYERS,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "vocab_size": 32,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}


def entries(hidden=256, inner=512, head=False):
    shapes = {"model.embed_tokens.weight": (32, hidden), "model.norm.weight": (hidden,)}
    if head:
        shapes["lm_head.weight"] = (32, hidden)
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        shapes |= {
            f"{prefix}self_attn.q_proj.weight": (hidden, hidden),
            f"{prefix}self_attn.k_proj.weight": (hidden // 2, hidden),
            f"{prefix}self_attn.v_proj.weight": (hidden // 2, hidden),
            f"{prefix}self_attn.o_proj.weight": (hidden, hidden),
            f"{prefix}mlp.gate_proj.weight": (inner, hidden),
            f"{prefix}mlp.up_proj.weight": (inner, hidden),
            f"{prefix}mlp.down_proj.weight": (hidden, inner),
            f"{prefix}input_layernorm.weight": (hidden,),
            f"{prefix}self_attn.q_proj.bias": (hidden,),
        }
    return {name: TensorSpec(torch.bfloat16, shape) for name, shape in shapes.items()}


def types(name, model, config=CONFIG, calibrated=False):
    """Short names of types, by Hugging Face name."""
    by_scheme = {packer.scheme: type for type, packer in BY_TYPE.items()}
    chosen = gguf_mixes.mix(name, model, Metadata(config), calibrated)
    return {name: by_scheme[scheme] for name, scheme in chosen.items()}


def layers_with(found, module, type):
    return [i for i in range(LAYERS) if found[f"model.layers.{i}.{module}.weight"] == type]


def test_q4_k_m_gives_more_bits_to_some_layers():
    found = types("q4_k_m", entries())
    assert layers_with(found, "mlp.down_proj", "Q6_K") == [0, 3, 6, 7]  # the first and last eighth, every third between
    assert layers_with(found, "self_attn.v_proj", "Q6_K") == [0, 3, 6, 7]
    assert layers_with(found, "self_attn.q_proj", "Q4_K") == list(range(LAYERS))
    assert found["model.embed_tokens.weight"] == "Q6_K", "a tied embedding is the output"


def test_vectors_and_biases_are_left_alone():
    model = entries()
    found = types("q8_0", model)
    assert found.keys() == {name for name, spec in model.items() if len(spec.shape) == 2}


def test_an_output_of_its_own_frees_the_embedding():
    found = types("q4_k_s", entries(head=True), {**CONFIG, "tie_word_embeddings": False})
    assert (found["model.embed_tokens.weight"], found["lm_head.weight"]) == ("Q4_K", "Q6_K")


def test_rows_that_no_super_block_fits_fall_back():
    found = types("q4_k_m", entries(hidden=576, inner=1536))
    assert found["model.layers.1.self_attn.q_proj.weight"] == "Q5_0"
    assert found["model.layers.0.self_attn.v_proj.weight"] == "Q8_0"  # in place of Q6_K
    assert found["model.layers.1.mlp.down_proj.weight"] == "Q4_K"
    assert found["model.embed_tokens.weight"] == "Q8_0"


def test_rows_that_no_block_fits_are_left_alone():
    found = types("q4_0", entries(hidden=256, inner=520))
    assert "model.layers.0.mlp.down_proj.weight" not in found
    assert found["model.layers.0.mlp.up_proj.weight"] == "Q4_0"


def test_an_importance_matrix_protects_the_first_layers_of_q4_0():
    assert layers_with(types("q4_0", entries(), calibrated=True), "mlp.down_proj", "Q4_1") == [0]
    assert layers_with(types("q4_0", entries()), "mlp.down_proj", "Q4_1") == []


@pytest.mark.parametrize("name", gguf_mixes.NAMES)
def test_the_exporter_offers_every_mix(name):
    exporter = GgufExporter()
    assert name in exporter.mixes()
    chosen = exporter.mix(name, entries(), Metadata(CONFIG))
    assert len(chosen) == 1 + 7 * LAYERS
    assert all(exporter.why_not(scheme, (256, 512)) is None for scheme in chosen.values())


@pytest.mark.parametrize("name", ["q4_k_m", "q5_k_s", "q2_k", "q8_0", "q4_0", "q6_k", "iq4_nl"])
def test_the_id_of_a_file_is_found_by_its_types(name):
    model, metadata = entries(), Metadata(CONFIG)
    assert gguf_mixes.file_type(model, metadata) is None
    for tensor, scheme in gguf_mixes.mix(name, model, metadata).items():
        packer = next(packer for packer in BY_TYPE.values() if packer.scheme == scheme)
        model[tensor] = packer.spec(scheme, model[tensor].shape)
    assert gguf_mixes.file_type(model, metadata) == gguf_mixes.id_of(name)
    model["model.embed_tokens.weight"] = TensorSpec(torch.float16, (32, 256))
    assert gguf_mixes.file_type(model, metadata) is None


def test_short_names_are_llama_cpps():
    for short in ("q3_k", "q4_k", "q5_k"):
        assert types(short, entries()) == types(f"{short}_m", entries())
        assert gguf_mixes.id_of(short) == gguf_mixes.id_of(f"{short}_m")


def test_models_that_gguf_cannot_hold_are_refused_by_name():
    with pytest.raises(CheckpointError, match="'rwkv' model"):
        gguf_mixes.mix("q4_0", entries(), Metadata({**CONFIG, "model_type": "rwkv"}))


@pytest.mark.parametrize("name", ["iq2_xs", "iq4_xs", "f16", "nvfp4", "mxfp4_moe", "q8_k"])
def test_file_types_that_are_not_written_say_what_is_missing(name):
    reason = gguf_mixes.why_not(name)
    assert reason
    assert "\n" not in reason
    assert GgufExporter().why_no_variant(name) == reason


def test_names_that_nobody_knows_get_no_reason():
    assert gguf_mixes.why_not("q9_k") is None


@pytest.mark.parametrize("name", ["tq1_0", "tq2_0"])
def test_a_name_means_its_own_layout(name):
    """Both layouts hold one scheme; the tensors that fall back or get another type have the layout of theirs."""
    assert list(GgufExporter().preferred(name)) == [f"gguf-{name}"]


LINEAR = "model.layers.0.mlp.up_proj.weight"


def layout_of(path, name=LINEAR):
    with GgufImporter().open(path) as checkpoint:
        return checkpoint.entries[name].layout


@pytest.fixture
def floats(gguf_models, tmp_path):
    """A model of one block, its matrices float16."""
    recipe = gguf_models.Recipe()
    recipe.types = dict.fromkeys(recipe.shapes(), "F16") | {
        name: "F32" for name, shape in recipe.shapes().items() if len(shape) == 1
    }
    gguf_models.write(tmp_path / "floats.gguf", recipe)
    return tmp_path / "floats.gguf"


@pytest.mark.parametrize("name", list(GgufExporter().variants()))
def test_every_type_can_be_asked_for(name, floats, tmp_path):
    convert(floats, tmp_path / "out.gguf", Target.parse(f"gguf:{name}"), installed(), Recipe(Rule("*", "ggml")))
    assert layout_of(tmp_path / "out.gguf") == f"gguf-{name}"


def test_ternary_weights_move_to_the_layout_that_is_asked_for(floats, tmp_path):
    """TQ2_0 to TQ1_0 and back: the same codes, 2.06 and 1.69 bits a weight; without a name they stay where they are."""
    registry = installed()
    convert(floats, tmp_path / "two.gguf", Target.parse("gguf:tq2_0"), registry, Recipe(Rule("*", "ggml")))
    convert(tmp_path / "two.gguf", tmp_path / "plain.gguf", Target("gguf"), registry)
    report = convert(tmp_path / "two.gguf", tmp_path / "one.gguf", Target.parse("gguf:tq1_0"), registry)
    assert report.error.exact
    convert(tmp_path / "one.gguf", tmp_path / "again.gguf", Target.parse("gguf:tq2_0"), registry)
    names = ("two", "plain", "one", "again")
    assert [layout_of(tmp_path / f"{name}.gguf")[-5:] for name in names] == ["tq2_0", "tq2_0", "tq1_0", "tq2_0"]
    keys = [read_header(tmp_path / f"{name}.gguf").keys["general.file_type"] for name in ("two", "one")]
    assert keys == [37, 36]


def test_types_that_are_not_written_are_refused_with_the_reason(floats, tmp_path):
    with pytest.raises(OptionError, match=r"'iq2_xs': IQ2_XS is read here, .*; it has q8_0"):
        convert(floats, tmp_path / "out.gguf", Target.parse("gguf:iq2_xs"), installed(), Recipe(Rule("*", "ggml")))


def test_matrices_that_a_mix_leaves_out_are_kept(gguf_models, tmp_path):
    """Blocks of 128 do not divide the rows of 192 that this model has: the default quantizer does not take them either."""
    with GgufImporter().open(_narrow(gguf_models, tmp_path)) as checkpoint:
        plan = make_plan(checkpoint, Recipe(Rule("*", "ggml")), Target.parse("gguf:q1_0"), installed())
    layouts = {step.name: getattr(step.target, "layout", None) for step in plan.steps}
    assert layouts["model.layers.0.mlp.down_proj.weight"] == "gguf-q1_0"
    assert layouts[LINEAR] is None


def _narrow(gguf_models, tmp_path):
    source = tmp_path / "narrow.gguf"

    class Narrow(gguf_models.Recipe):
        def shapes(self):
            cut = {256: 192, 128: 96}
            wide = super().shapes()
            return {name: tuple(cut.get(length, length) for length in shape) for name, shape in wide.items()}

    recipe = Narrow(heads=4, keys={"llama.embedding_length": 192})
    recipe.types = {name: "F16" if len(shape) == 2 else "F32" for name, shape in recipe.shapes().items()}
    gguf_models.write(source, recipe)
    return source
