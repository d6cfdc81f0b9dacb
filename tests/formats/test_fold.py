"""Act-order of down_proj folded into gate_proj and up_proj: the same model, and no other permutation touched."""

import pytest
import torch

from lowbit import Grid, Metadata, PackedTensor, Scheme, TensorSpec, Zero, dequantize, installed
from lowbit.convert import convert
from lowbit.diff import floats
from lowbit.errors import NoRouteError
from lowbit.plan import Target
from lowbit.testing import samples

REGISTRY = installed()
MLP = "model.layers.0.mlp"
GATE, UP, DOWN = (f"{MLP}.{name}_proj.weight" for name in ("gate", "up", "down"))
HIDDEN, INNER = 64, 128


def packed(scheme, shape, seed, permutation=False):
    """Return a weight in one of the layouts of GPTQ."""
    scheme = Scheme(Grid.AFFINE, 4, 32, scheme, permutation=permutation)
    packer = REGISTRY.packers["gptq" if scheme.symmetric else "gptq_v2"]
    return packer.pack(samples.quantized(scheme, shape, seed))


def model(zero=Zero.SYMMETRIC, **changes):
    """Return an MLP whose down_proj has act-order, a bias of up_proj among the rest."""
    values = {
        DOWN: packed(zero, (HIDDEN, INNER), 1, permutation=True),
        GATE: packed(zero, (INNER, HIDDEN), 2),
        UP: torch.randn(INNER, HIDDEN, generator=torch.Generator().manual_seed(3)).half(),
        UP.replace("weight", "bias"): torch.randn(INNER, generator=torch.Generator().manual_seed(4)).half(),
        "model.norm.weight": torch.ones(HIDDEN).half(),
    }
    return {name: value for name, value in {**values, **changes}.items() if value is not None}


def write(path, values):
    entries = {
        name: value.spec if isinstance(value, PackedTensor) else TensorSpec.of(value) for name, value in values.items()
    }
    REGISTRY.exporters["gptq"].write(path, entries, iter(values.items()), Metadata({"model_type": "llama"}))
    return path


def weights(path):
    with REGISTRY.open(path) as checkpoint:
        return {name: floats(checkpoint, name, REGISTRY).double() for name in checkpoint.entries}


def outputs(found, x):
    gate, up = x @ found[GATE].T, x @ found[UP].T + found[UP.replace("weight", "bias")]
    return (torch.nn.functional.silu(gate) * up) @ found[DOWN].T


@pytest.mark.parametrize("zero", [Zero.SYMMETRIC, Zero.INTEGER])
@pytest.mark.parametrize("target", ["awq", "compressed-tensors", "mlx"])
def test_the_model_computes_the_same(zero, target, tmp_path):
    values = model(zero)
    source = write(tmp_path / "source", values)
    report = convert(source, tmp_path / "out", Target(target), REGISTRY)
    assert report.error.exact
    first, second = weights(source), weights(tmp_path / "out")
    order = REGISTRY.packers[values[DOWN].layout].unpack(values[DOWN]).parts["group_index"].argsort(stable=True)
    assert torch.equal(second[DOWN], first[DOWN][:, order])
    for name in (GATE, UP, UP.replace("weight", "bias")):
        assert torch.equal(second[name], first[name][order]), name
    assert torch.equal(second["model.norm.weight"], first["model.norm.weight"])
    x = torch.randn(5, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    assert torch.allclose(outputs(first, x), outputs(second, x), rtol=1e-12, atol=1e-12)
    assert report.plan.metadata.provenance["act_order"] == "folded into the rows of gate_proj and up_proj, 1 times"


@pytest.mark.parametrize("target", ["gptq", "native", "hf"])
def test_formats_that_have_a_place_keep_it(target, tmp_path):
    source = write(tmp_path / "source", model())
    report = convert(source, tmp_path / "out", Target(target), REGISTRY)
    assert report.error.exact
    assert "act_order" not in report.plan.metadata.provenance
    first, second = weights(source), weights(tmp_path / "out")
    assert all(torch.equal(first[name], second[name]) for name in first)


UNEQUAL = packed(Zero.SYMMETRIC, (HIDDEN, INNER), 1, permutation=True)
UNEQUAL.buffers["g_idx"][UNEQUAL.buffers["g_idx"] == 1] = 0


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({GATE: None}, DOWN),
        ({f"{MLP}.ffn_norm.weight": torch.ones(INNER).half()}, DOWN),
        ({DOWN: UNEQUAL}, DOWN),
        ({UP: packed(Zero.SYMMETRIC, (INNER, HIDDEN), 3, permutation=True)}, UP),
    ],
    ids=["no gate", "a norm between", "groups of other sizes", "act-order of the residual stream"],
)
def test_what_cannot_be_folded_is_refused_with_the_reason(changes, name, tmp_path):
    source = write(tmp_path / "source", model(**changes))
    with pytest.raises(NoRouteError, match=f"{name}: .*act-order") as raised:
        convert(source, tmp_path / "out", Target("awq"), REGISTRY)
    assert "of act-order only that of down_proj can be folded, into gate_proj and up_proj" in raised.value.hint
    assert not (tmp_path / "out").exists()


def test_a_folded_weight_dequantizes_by_the_same_products():
    """Not a rounding more: every element of the reordered weight is one of the original, bit for bit."""
    value = model()[DOWN]
    quantized = REGISTRY.packers["gptq"].unpack(value)
    order = quantized.parts["group_index"].argsort(stable=True)
    parts = {"codes": quantized.parts["codes"][:, order], "scales": quantized.parts["scales"]}
    again = type(quantized)(Scheme(Grid.AFFINE, 4, 32), quantized.shape, parts)
    assert torch.equal(dequantize(again), dequantize(quantized)[:, order])
