"""Every installed layout: a model that runs it by its plain-torch kernel has the perplexity of its dequantized ``hf`` export."""

import math
from dataclasses import replace

import pytest
import torch

import lowbit
from lowbit import Grid, Metadata, ReferenceKernel, Registry, Rotation, Scheme, TensorSpec, Trellis
from lowbit.convert import convert
from lowbit.evaluation.scores import evaluate
from lowbit.evaluation.windows import Windows
from lowbit.plan import Target
from lowbit.testing import samples

SIDE = 256
SHAPE = (SIDE, SIDE)
LAYOUTS = sorted(lowbit.installed().packers)
EXL3 = Scheme(
    Grid.TRELLIS, 0, flat=True, trellis=Trellis("mul1", (2,), order="mma_b"), rotation=Rotation(128, 128, "float16")
)


def schemes():
    """Yield the whole vocabulary, and what named variants of formats use."""
    yield EXL3
    yield from (replace(scheme) for scheme, _ in samples.REPRESENTATIVES)
    for exporter in lowbit.installed().exporters.values():
        yield from exporter.variants().values()


def sample(packer, seed):
    """Return a random weight in the first scheme that the layout holds, with the codebook that the layout fixes, if it does."""
    scheme = next(scheme for scheme in schemes() if packer.why_not(scheme, SHAPE) is None)
    quantized = samples.quantized(scheme, SHAPE, seed)
    if scheme == EXL3:  # which has no place for a scale of the whole tensor
        return replace(quantized, parts={**quantized.parts, "scales": torch.ones_like(quantized.parts["scales"])})
    fixed = getattr(packer, "table", None) if scheme.grid is Grid.CODEBOOK else None
    fixed = getattr(packer, "codebook", None) if fixed is None else fixed
    if fixed is None:
        return quantized
    return replace(quantized, parts={**quantized.parts, "codebook": fixed.reshape(quantized.parts["codebook"].shape)})


@pytest.fixture(scope="module")
def reference():
    """Everything installed, but no kernels except the plain-torch ones."""
    registry, full = Registry(), lowbit.installed()
    for table in ("packers", "importers", "exporters"):
        for component in getattr(full, table).values():
            getattr(registry, table).register(component)
    for packer in full.packers.values():
        registry.kernels.register(ReferenceKernel(packer))
    return registry


@pytest.fixture(scope="module")
def plain(tiny):
    """The tensors of a model of one layer whose linears are all square, and its config."""
    model = tiny(hidden_size=SIDE, intermediate_size=SIDE, num_hidden_layers=1, num_key_value_heads=4)
    return {
        name: value for name, value in model.state_dict().items() if name != "lm_head.weight"
    }, model.config.to_dict()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_perplexity_is_that_of_the_dequantized_export(layout, reference, plain, tmp_path):
    tensors, config = plain
    packer = reference.packers[layout]
    values = {
        name: packer.pack(sample(packer, seed)) if name.endswith("_proj.weight") else value
        for seed, (name, value) in enumerate(tensors.items())
    }
    entries = {name: TensorSpec.of(v) if isinstance(v, torch.Tensor) else v.spec for name, v in values.items()}
    reference.exporters["native"].write(tmp_path / "packed", entries, iter(values.items()), Metadata(config))
    convert(tmp_path / "packed", tmp_path / "plain", Target("hf"), reference)
    packed, dense = (
        lowbit.load(tmp_path / name, dtype=torch.float32, registry=reference) for name in ("packed", "plain")
    )
    kernels = {layer.kernel for layer in lowbit.explain(packed).layers}
    assert kernels == {f"torch-{layout}"}
    windows = Windows(torch.randint(257, (64,), generator=torch.Generator().manual_seed(3)), 32, 32)
    first, second = evaluate([packed, dense], windows)[0]
    assert math.isfinite(second.perplexity)
    assert first.perplexity == pytest.approx(second.perplexity, rel=1e-3)
