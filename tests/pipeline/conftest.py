"""A registry of small components that live in memory, so that the pipeline is tested without any file format."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch

from lowbit import (
    Checkpoint,
    Exporter,
    Grid,
    Importer,
    Metadata,
    PackedSpec,
    PackedTensor,
    Packer,
    QuantizedTensor,
    Quantizer,
    ReferenceKernel,
    Registry,
    ScaleFormat,
    Scheme,
    TensorSpec,
)
from lowbit.errors import CheckpointError, OptionError, WeightError


@dataclass(frozen=True)
class RoundOptions:
    bits: int = 4
    group_size: int | None = 8
    symmetric: bool = True
    kind: Literal["floor", "round"] = "round"

    def __post_init__(self):
        if self.bits > 8:
            raise OptionError(f"bits must be at most 8, got {self.bits}")


class RoundQuantizer(Quantizer[RoundOptions]):
    name = "round"
    Options = RoundOptions

    def scheme(self, options):
        return Scheme(Grid.AFFINE, options.bits, options.group_size, scales=ScaleFormat("float32"))

    def quantize(self, weight, options, calibration=None):
        if not torch.isfinite(weight).all():
            raise WeightError("the weight holds NaN or infinity")
        scheme = self.scheme(options)
        groups = weight.float().reshape(weight.shape[0], -1, options.group_size or weight.shape[1])
        scales = groups.abs().amax(-1) / (scheme.midpoint - 1)
        codes = (groups / scales.unsqueeze(-1).clamp(min=1e-9)).round() + scheme.midpoint
        parts = {"codes": codes.reshape(weight.shape).to(torch.uint8), "scales": scales}
        return QuantizedTensor(scheme, tuple(weight.shape), parts)


class PartsPacker(Packer):
    """Stores parts as they are; ``wide`` stores codes as int32."""

    def __init__(self, layout, dtype=torch.uint8, refuse=None):
        self.layout = layout
        self.dtype = dtype
        self.refuse = refuse

    def why_not(self, scheme, shape):
        if scheme.grid is not Grid.AFFINE:
            return f"{self.layout} stores affine codes, not {scheme.grid.value}"
        return self.refuse

    def specs(self, scheme, shape):
        groups = scheme.groups(shape)
        return {"codes": TensorSpec(self.dtype, shape), "scales": TensorSpec(torch.float32, (shape[0], groups))}

    def pack(self, quantized):
        buffers = {"codes": quantized.parts["codes"].to(self.dtype), "scales": quantized.parts["scales"]}
        return PackedTensor(self.spec(quantized.scheme, quantized.shape), buffers)

    def unpack(self, packed):
        parts = {"codes": packed.buffers["codes"].to(torch.uint8), "scales": packed.buffers["scales"]}
        return QuantizedTensor(packed.scheme, packed.shape, parts)


class MemoryCheckpoint(Checkpoint):
    def __init__(self, path, entries, values, metadata):
        self.path, self.entries, self.values, self.metadata = path, entries, values, metadata

    def read(self, name):
        return self.values[name]


class MemoryFormat(Importer, Exporter):
    """Keeps checkpoints in a dict beside a marker file that says which one it is."""

    def __init__(self, format, layouts, variants=None):
        self.format, self.layouts, self.kept, self._variants = format, layouts, {}, variants or {}

    def variants(self):
        return self._variants

    def why_not(self, path, shape=None):
        if isinstance(path, Scheme):
            return None
        return None if path.read_text().startswith(self.format) else "another format"

    def open(self, path):
        key = json.loads(path.read_text().partition(" ")[2])
        entries, values, metadata = self.kept[key]
        return MemoryCheckpoint(path, entries, values, metadata)

    def write(self, path, entries, stream, metadata, shard_size=0):
        values = dict(stream)
        if values.keys() != entries.keys():
            raise CheckpointError("the stream does not hold what was announced")
        key = str(len(self.kept))
        self.kept[key] = (dict(entries), values, metadata)
        path.write_text(f"{self.format} {json.dumps(key)}")


WIDE = Scheme(Grid.AFFINE, 4, 8, scales=ScaleFormat("float32"))


@pytest.fixture
def registry():
    registry = Registry()
    registry.quantizers.register(RoundQuantizer())
    for packer in (PartsPacker("narrow"), PartsPacker("wide", torch.int32)):
        registry.packers.register(packer)
        registry.kernels.register(ReferenceKernel(packer))
    formats = [
        MemoryFormat("any", None),
        MemoryFormat("wide-only", ("wide",), {"four": WIDE}),
        MemoryFormat("floats", ()),
    ]
    for format in formats:
        registry.importers.register(format)
        registry.exporters.register(format)
    return registry


@pytest.fixture
def source(registry, tmp_path) -> Path:
    """A checkpoint with two linears, an embedding, a norm and a side value."""
    generator = torch.Generator().manual_seed(0)
    values = {
        "model.embed_tokens.weight": torch.randn(10, 16, generator=generator),
        "model.layers.0.mlp.up_proj.weight": torch.randn(24, 16, generator=generator).bfloat16(),
        "model.layers.0.mlp.down_proj.weight": torch.randn(16, 24, generator=generator).bfloat16(),
        "model.norm.weight": torch.ones(16),
        "counts": torch.arange(5),
    }
    entries = {name: TensorSpec.of(value) for name, value in values.items()}
    path = tmp_path / "source"
    registry.exporters["any"].write(path, entries, values.items(), Metadata({"model_type": "toy"}))
    return path


@pytest.fixture
def packed_source(registry, source, tmp_path) -> Path:
    """The same checkpoint with its linears quantized to 4 bits in layout narrow."""
    from lowbit.convert import convert
    from lowbit.plan import Target
    from lowbit.recipe import Recipe, Rule

    destination = tmp_path / "packed"
    convert(source, destination, Target("any"), registry, Recipe(Rule("*", "round")))
    with registry.open(destination) as checkpoint:
        assert isinstance(checkpoint.entries["model.layers.0.mlp.up_proj.weight"], PackedSpec)
    return destination
