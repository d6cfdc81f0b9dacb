"""``QuantEmbedding``: rows of a packed weight, alone and in models whose head is tied to it."""

import copy

import pytest
import torch

import lowbit
from lowbit import Grid, QuantLinear, Scheme
from lowbit.convert import convert
from lowbit.errors import NoRouteError
from lowbit.plan import Target
from lowbit.recipe import Rule
from lowbit.runtime.embedding import QuantEmbedding
from lowbit.tensors import bit_equal
from lowbit.testing import samples

SCHEME = Scheme(Grid.AFFINE, 3, 8)
SHAPE = (24, 32)


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


@pytest.fixture(params=["plain", "parts"])
def embedding(request, registry):
    """One of a layout whose rows can be read alone, and one of a layout that a kernel has to unpack first."""
    full = lowbit.installed()
    packer = {"plain": full.packers["plain"], "parts": registry.packers["parts"]}[request.param]
    if request.param == "parts":
        from lowbit.runtime.cpu_rows import RowsKernel

        registry.kernels.register(RowsKernel(registry.packers))
    packed = packer.pack(samples.quantized(SCHEME, SHAPE))
    held = torch.nn.Embedding(*SHAPE, device="meta")
    return QuantEmbedding.in_place_of(held, packed, registry=registry if request.param == "parts" else full)


def test_rows_are_those_of_the_dequantized_weight(embedding):
    numbers = torch.tensor([[3, 0, 23], [3, 7, 1]])
    assert torch.equal(embedding(numbers), embedding.dequantize()[numbers])
    assert embedding(numbers[:, :0]).shape == (2, 0, 32)
    assert embedding.half()(numbers).dtype == torch.float16
    assert "3-bit g8" in repr(embedding)


def test_rows_that_are_not_there_raise(embedding):
    with pytest.raises(IndexError):
        embedding(torch.tensor([24]))


def test_state_dict_round_trip(embedding):
    other = copy.deepcopy(embedding)
    for buffer in other.packed.buffers.values():
        buffer.view(torch.uint8).zero_()
    other.load_state_dict(embedding.state_dict(), strict=True)
    assert all(bit_equal(other.packed.buffers[name], buffer) for name, buffer in embedding.packed.buffers.items())
    assert torch.equal(other(torch.tensor([5])), embedding(torch.tensor([5])))


def test_opcheck_and_compiled_without_graph_break(embedding):
    numbers = torch.tensor([[3, 0], [23, 7]])
    expected = embedding(numbers)
    operands = (numbers.flatten(), embedding._operands(), embedding._binding, torch.float16)
    torch.library.opcheck(torch.ops.lowbit.rows.default, operands)
    compiled = torch.compile(embedding, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(numbers), expected)


def test_layouts_that_mix_rows_are_refused(registry):
    packed = lowbit.installed().packers["plain"].pack(samples.quantized(Scheme(Grid.CODEBOOK, 4, 16, flat=True), SHAPE))
    made = QuantEmbedding.in_place_of(torch.nn.Embedding(*SHAPE), packed)
    with pytest.raises(NoRouteError, match="no kernel reads rows of layout 'plain' on cpu"):
        made(torch.tensor([0]))


def row_examples():
    """Return a packer and an example for each layout whose rows can be read alone; codebooks may be a layout's own."""
    found = {}
    for layout, packer in sorted(lowbit.installed().packers.items()):
        for scheme, shape in samples.REPRESENTATIVES:
            accepted = scheme.grid is Grid.AFFINE and packer.why_not(scheme, shape) is None
            if accepted and packer.row_buffers(scheme, shape):
                found[layout] = pytest.param(packer, scheme, shape, id=layout)
    return list(found.values())


@pytest.mark.parametrize(("packer", "scheme", "shape"), row_examples())
def test_no_layout_reads_values_on_the_host(packer, scheme, shape):
    """A captured CUDA graph may neither wait for the device nor copy from memory that the host may change."""
    from torch.utils._python_dispatch import TorchDispatchMode

    kernel = lowbit.ReferenceKernel(packer)
    packed = packer.pack(samples.quantized(scheme, shape))

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func.name() not in ("aten::_local_scalar_dense", "aten::lift_fresh", "aten::nonzero"), func
            return func(*args, **(kwargs or {}))

    with Watch():
        kernel.rows(packed, torch.empty(2, dtype=torch.int64).fill_(1), torch.float16)


@pytest.fixture(scope="module", params=["llama", "gemma"])
def folders(request, transformers, tmp_path_factory, tiny, tiny_gemma, quantize):
    """A native folder with a packed, tied embedding, which Gemma scales; and the same numbers as floats."""
    folder = tmp_path_factory.mktemp(request.param)
    (tiny if request.param == "llama" else tiny_gemma)().save_pretrained(folder / "base")
    rule = Rule("model.embed_tokens.weight", "autoround", {"bits": "8", "group_size": "32"})
    packed = quantize(folder / "base", folder / "packed", rules=[rule])
    convert(packed, folder / "plain", Target("hf"), lowbit.installed())
    return packed, folder / "plain"


def test_a_tied_head_shares_the_packed_bits(folders, tokens):
    model = lowbit.load(folders[0], dtype=torch.float32, keep_packed=True)
    embedding, head = model.model.embed_tokens, model.lm_head
    assert isinstance(embedding, QuantEmbedding)
    assert isinstance(head, QuantLinear)
    assert head.tied == "model.embed_tokens"
    assert all(head.packed.buffers[name] is buffer for name, buffer in embedding.packed.buffers.items())
    expected = logits(lowbit.load(folders[1]), tokens)
    torch.testing.assert_close(logits(model, tokens), expected, atol=1e-5, rtol=1e-5)


def test_transformers_loads_and_saves_it(folders, transformers, tmp_path, tokens):
    import lowbit.transformers

    assert lowbit.transformers.register
    auto = transformers.AutoModelForCausalLM
    model = auto.from_pretrained(folders[0], dtype=torch.float32)
    assert isinstance(model.model.embed_tokens, QuantEmbedding)
    expected = logits(lowbit.load(folders[0], dtype=torch.float32), tokens)
    assert torch.equal(logits(model, tokens), expected)
    model.save_pretrained(tmp_path / "saved")
    with lowbit.installed().open(folders[0]) as first, lowbit.installed().open(tmp_path / "saved") as second:
        assert first.entries == second.entries
    assert torch.equal(logits(auto.from_pretrained(tmp_path / "saved", dtype=torch.float32), tokens), expected)


def test_only_the_rows_of_a_gguf_file_are_unpacked(tmp_path, tokens, quantize, tiny, add_tokenizer):
    tiny(hidden_size=128, intermediate_size=256).save_pretrained(tmp_path / "base")
    add_tokenizer(tmp_path / "base")
    quantize(tmp_path / "base", tmp_path / "packed.gguf", "gguf:q4_0")  # with a Q8_0 embedding, as llama.cpp writes it
    model = lowbit.load(tmp_path / "packed.gguf", dtype=torch.float32)
    assert isinstance(model.model.embed_tokens, QuantEmbedding)
    convert(tmp_path / "packed.gguf", tmp_path / "plain", Target("hf"), lowbit.installed())
    expected = logits(lowbit.load(tmp_path / "plain"), tokens)
    torch.testing.assert_close(logits(model, tokens), expected, atol=1e-4, rtol=1e-4)
