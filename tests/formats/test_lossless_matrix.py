"""The lossless matrix: what becomes of every kind of packed weight in every format, exactly or not at all. No tolerance.

Each cell converts a small llama through the pipeline, reopens the result, dequantizes every weight of both checkpoints by the
layouts' plain-torch kernels and compares float32 (zeros of either sign are one number). The conditions are arithmetic, not
taste; with v = code - zero: symmetric codes widen, an integer zero needs one bit more, a minimum is -midpoint * scale where that
is a float16, and two levels take a weight whose groups are 256 wide.
"""

from dataclasses import dataclass

import pytest
import torch

from lowbit import Grid, Outliers, QuantizedTensor, Scheme, TensorSpec, Zero, installed
from lowbit.convert import convert
from lowbit.diff import floats
from lowbit.errors import NoRouteError, SchemeError
from lowbit.lift import lift
from lowbit.matrix import SCHEMES
from lowbit.plan import Action, Target
from lowbit.scheme import ScaleFormat
from lowbit.testing import samples
from lowbit_formats.bitsandbytes_layout import DOUBLE, SINGLE, TABLES
from lowbit_formats.exl3_layout import exl3_scheme
from lowbit_formats.gguf.layouts import BY_TYPE

REGISTRY = installed()
PACKED = ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight")
"""q_proj, because GGUF permutes its rows, and one that it leaves alone."""


@dataclass(frozen=True)
class Source:
    """A kind of packed weight: the format of its folder, the layout there, the scheme, and a codebook where it is fixed."""

    format: str
    layout: str
    scheme: Scheme
    codebook: torch.Tensor | None = None

    def weight(self, shape, seed):
        """Random codes, zeros over their whole range, scales of both signs."""
        quantized = samples.quantized(self.scheme, shape, seed)
        fixed = {"codebook": self.codebook} if self.codebook is not None else {}
        if self.scheme.trellis:
            fixed["scales"] = torch.ones_like(quantized.parts["scales"])  # EXL3 has its scales in the signs
        parts = {**quantized.parts, **fixed}
        return REGISTRY.packers[self.layout].pack(QuantizedTensor(self.scheme, shape, parts))


def affine(bits, group_size=128, zero=Zero.SYMMETRIC, **fields):
    return Scheme(Grid.AFFINE, bits, group_size, zero, **fields)


def flat(scales):
    return Scheme(Grid.CODEBOOK, 4, 64, scales=scales, flat=True)


def ggml(name):
    packer = BY_TYPE[name]
    return Source("gguf", packer.layout, packer.scheme, packer.codebook)


ASYM, MIN = Zero.INTEGER, Zero.MINIMUM
SOURCES = {
    "gptq 4-bit g128": Source("gptq", "gptq", affine(4)),
    "gptq 4-bit g32": Source("gptq", "gptq", affine(4, 32)),
    "gptq 4-bit row": Source("gptq", "gptq", affine(4, None)),
    "gptq 4-bit g128 bf16": Source("gptq", "gptq", affine(4, scales=ScaleFormat("bfloat16"))),
    "gptq 2-bit g64": Source("gptq", "gptq", affine(2, 64)),
    "gptq 2-bit g256 asym": Source("gptq", "gptq_v2", affine(2, 256, ASYM)),
    "gptq 3-bit g128": Source("gptq", "gptq", affine(3)),
    "gptq 3-bit g256": Source("gptq", "gptq", affine(3, 256)),
    "gptq 3-bit g128 asym": Source("gptq", "gptq_v2", affine(3, 128, ASYM)),
    "gptq 8-bit g128": Source("gptq", "gptq", affine(8)),
    "gptq 8-bit g128 asym": Source("gptq", "gptq_v2", affine(8, 128, ASYM)),
    "gptq 4-bit g128 asym": Source("gptq", "gptq_v2", affine(4, 128, ASYM)),
    "gptq 4-bit g256 asym": Source("gptq", "gptq_v2", affine(4, 256, ASYM)),
    "gptq 4-bit act-order": Source("gptq", "gptq", affine(4, permutation=True)),
    "awq 4-bit g64": Source("awq", "awq-gemm", affine(4, 64)),
    "awq 4-bit g64 asym": Source("awq", "awq-gemm", affine(4, 64, ASYM)),
    "auto-round 4-bit g128": Source("auto-round", "gptq", affine(4)),
    "ct 4-bit g16": Source("compressed-tensors", "ct-pack", affine(4, 16)),
    "ct 4-bit g128 f32": Source("compressed-tensors", "ct-pack", affine(4, scales=ScaleFormat("float32"))),
    "ct 5-bit g32": Source("compressed-tensors", "ct-pack", affine(5, 32)),
    "ct 5-bit g256 asym": Source("compressed-tensors", "ct-pack", affine(5, 256, ASYM)),
    "ct 6-bit g256": Source("compressed-tensors", "ct-pack", affine(6, 256)),
    "ct 7-bit g64 asym": Source("compressed-tensors", "ct-pack", affine(7, 64, ASYM)),
    "mlx 4-bit g64": Source("mlx", "mlx-affine", affine(4, 64, MIN)),
    "mlx 3-bit g32": Source("mlx", "mlx-affine", affine(3, 32, MIN)),
    "bnb nf4": Source("bitsandbytes", "bnb-nf4", flat(SINGLE), TABLES["nf4"][:, None]),
    "bnb fp4 double": Source("bitsandbytes", "bnb-fp4", flat(DOUBLE), TABLES["fp4"][:, None]),
    **{f"gguf {name}": ggml(name) for name in BY_TYPE},
    "hqq 4-bit g64": Source("native", "hqq", Scheme(Grid.AFFINE, 4, 64, Zero.FLOAT)),
    "exl3 2-bit": Source("native", "exl3", exl3_scheme(4, "mul1")),
    "kbit 3-bit g64": Source("native", "plain", Scheme(Grid.CODEBOOK, 3, 64)),
    "outliers 4-bit g128": Source("native", "plain", affine(4, outliers=Outliers(0.01))),
    "binary 2 planes": Source("native", "plain", SCHEMES["binary 2 planes g128"]),
}

MATRIX = """
source                | auto-round | awq      | bitsandbytes | compressed-tensors | gguf        | gptq    | mlx        | native
gptq 4-bit g128       | gptq       | awq-gemm | -            | ct-pack            | gguf-q4_0   | gptq    | mlx-affine | gptq
gptq 4-bit g32        | gptq       | awq-gemm | -            | ct-pack            | gguf-q4_0   | gptq    | mlx-affine | gptq
gptq 4-bit row        | gptq       | awq-gemm | -            | ct-pack            | gguf-q4_0   | gptq    | mlx-affine | gptq
gptq 4-bit g128 bf16  | gptq       | awq-gemm | -            | ct-pack            | gguf-q4_0   | gptq    | mlx-affine | gptq
gptq 2-bit g64        | gptq       | awq-gemm | -            | ct-pack            | gguf-q2_0   | gptq    | mlx-affine | gptq
gptq 2-bit g256 asym  | gptq       | awq-gemm | -            | ct-pack            | gguf-q2_k   | gptq_v2 | mlx-affine | gptq_v2
gptq 3-bit g128       | gptq       | awq-gemm | -            | ct-pack            | gguf-q4_0   | gptq    | mlx-affine | gptq
gptq 3-bit g256       | gptq       | awq-gemm | -            | ct-pack            | gguf-q3_k   | gptq    | mlx-affine | gptq
gptq 3-bit g128 asym  | gptq       | awq-gemm | -            | ct-pack            | gguf-q4_0   | gptq_v2 | mlx-affine | gptq_v2
gptq 8-bit g128       | gptq       | -        | -            | ct-pack            | gguf-q8_0   | gptq    | mlx-affine | gptq
gptq 8-bit g128 asym  | -          | -        | -            | ct-pack            | -           | gptq_v2 | mlx-affine | gptq_v2
gptq 4-bit g128 asym  | gptq       | awq-gemm | -            | ct-pack            | gguf-q5_0   | gptq_v2 | mlx-affine | gptq_v2
gptq 4-bit g256 asym  | gptq       | awq-gemm | -            | ct-pack            | gguf-q4_k   | gptq_v2 | mlx-affine | gptq_v2
gptq 4-bit act-order  | -          | -        | -            | -                  | -           | gptq    | -          | gptq
awq 4-bit g64         | gptq       | awq-gemm | -            | ct-pack            | gguf-q4_0   | gptq    | mlx-affine | awq-gemm
awq 4-bit g64 asym    | gptq       | awq-gemm | -            | ct-pack            | gguf-q5_0   | gptq_v2 | mlx-affine | awq-gemm
auto-round 4-bit g128 | gptq       | awq-gemm | -            | ct-pack            | gguf-q4_0   | gptq    | mlx-affine | gptq
ct 4-bit g16          | gptq       | awq-gemm | -            | ct-pack            | -           | gptq    | -          | ct-pack
ct 4-bit g128 f32     | -          | -        | -            | ct-pack            | -           | -       | -          | ct-pack
ct 5-bit g32          | gptq       | -        | -            | ct-pack            | gguf-q5_0   | gptq    | mlx-affine | ct-pack
ct 5-bit g256 asym    | gptq       | -        | -            | ct-pack            | gguf-q5_k   | gptq_v2 | mlx-affine | ct-pack
ct 6-bit g256         | gptq       | -        | -            | ct-pack            | gguf-q6_k   | gptq    | mlx-affine | ct-pack
ct 7-bit g64 asym     | gptq       | -        | -            | ct-pack            | gguf-q8_0   | gptq_v2 | mlx-affine | ct-pack
mlx 4-bit g64         | -          | -        | -            | -                  | gguf-q4_1   | -       | mlx-affine | mlx-affine
mlx 3-bit g32         | -          | -        | -            | -                  | gguf-q4_1   | -       | mlx-affine | mlx-affine
bnb nf4               | -          | -        | bnb-nf4      | -                  | -           | -       | -          | bnb-nf4
bnb fp4 double        | -          | -        | bnb-fp4      | -                  | -           | -       | -          | bnb-fp4
gguf Q4_0             | gptq       | awq-gemm | -            | ct-pack            | gguf-q4_0   | gptq    | mlx-affine | gguf-q4_0
gguf Q4_1             | -          | -        | -            | -                  | gguf-q4_1   | -       | mlx-affine | gguf-q4_1
gguf Q5_0             | gptq       | -        | -            | ct-pack            | gguf-q5_0   | gptq    | mlx-affine | gguf-q5_0
gguf Q5_1             | -          | -        | -            | -                  | gguf-q5_1   | -       | mlx-affine | gguf-q5_1
gguf Q8_0             | gptq       | -        | -            | ct-pack            | gguf-q8_0   | gptq    | mlx-affine | gguf-q8_0
gguf Q2_0             | gptq       | awq-gemm | -            | ct-pack            | gguf-q2_0   | gptq    | mlx-affine | gguf-q2_0
gguf Q1_0             | -          | -        | -            | -                  | gguf-q1_0   | -       | -          | gguf-q1_0
gguf IQ4_NL           | -          | -        | -            | -                  | gguf-iq4_nl | -       | -          | gguf-iq4_nl
gguf MXFP4            | -          | -        | -            | -                  | gguf-mxfp4  | -       | -          | gguf-mxfp4
gguf Q2_K             | -          | -        | -            | -                  | gguf-q2_k   | -       | -          | gguf-q2_k
gguf Q3_K             | -          | -        | -            | ct-pack            | gguf-q3_k   | -       | -          | gguf-q3_k
gguf Q4_K             | -          | -        | -            | -                  | gguf-q4_k   | -       | mlx-affine | gguf-q4_k
gguf Q5_K             | -          | -        | -            | -                  | gguf-q5_k   | -       | mlx-affine | gguf-q5_k
gguf Q6_K             | -          | -        | -            | ct-pack            | gguf-q6_k   | -       | -          | gguf-q6_k
gguf TQ1_0            | gptq       | awq-gemm | -            | ct-pack            | gguf-tq1_0  | gptq    | mlx-affine | gguf-tq1_0
gguf TQ2_0            | gptq       | awq-gemm | -            | ct-pack            | gguf-tq2_0  | gptq    | mlx-affine | gguf-tq2_0
hqq 4-bit g64         | -          | -        | -            | -                  | -           | -       | -          | hqq
exl3 2-bit            | -          | -        | -            | -                  | -           | -       | -          | exl3
kbit 3-bit g64        | -          | -        | -            | -                  | -           | -       | -          | plain
outliers 4-bit g128   | -          | -        | -            | -                  | -           | -       | -          | plain
binary 2 planes       | -          | -        | -            | -                  | -           | -       | -          | plain
"""
"""The layout that holds each kind of weight in each format, ``-`` where none does exactly; ``hf`` writes all of them as floats."""


def cells():
    """Yield (source, target format, layout or None for a refusal)."""
    head, *rows = [[cell.strip() for cell in line.split(" | ")] for line in MATRIX.strip().splitlines()]
    for source, *layouts in rows:
        for target, layout in zip(head[1:], layouts, strict=True):
            yield source, target, None if layout == "-" else layout


@pytest.fixture(scope="module")
def model(gguf_models, tmp_path_factory):
    """Values and metadata of a small llama with a tokenizer; its matrices are float16."""
    path = tmp_path_factory.mktemp("llama") / "model.gguf"
    names = ("token_embd", *(f"blk.0.{name}" for name in ("attn_q", "attn_k", "attn_v", "attn_output")))
    names += tuple(f"blk.0.ffn_{name}" for name in ("up", "gate", "down"))
    gguf_models.write(path, gguf_models.Recipe(types={f"{name}.weight": "F16" for name in names}))
    with REGISTRY.open(path) as checkpoint:
        return dict(checkpoint.stream()), checkpoint.metadata


@pytest.fixture(scope="module")
def written(model, tmp_path_factory):
    """A function from a source's name to its checkpoint, written once."""
    paths = {}

    def write(name):
        if name not in paths:
            source, (values, metadata) = SOURCES[name], model
            packed = {weight: source.weight(values[weight].shape, seed) for seed, weight in enumerate(PACKED)}
            changed = {**values, **packed}
            entries = {key: value.spec if key in packed else TensorSpec.of(value) for key, value in changed.items()}
            path = tmp_path_factory.mktemp("source") / f"model{REGISTRY.exporters[source.format].suffix}"
            REGISTRY.exporters[source.format].write(path, entries, iter(changed.items()), metadata)
            paths[name] = path
        return paths[name]

    return write


def same_numbers(first, second):
    """Assert that two checkpoints hold the same tensors with the same float32 values, every one of them."""
    with REGISTRY.open(first) as left, REGISTRY.open(second) as right:
        assert set(left.entries) == set(right.entries)
        for name in left.entries:
            assert torch.equal(floats(left, name, REGISTRY).float(), floats(right, name, REGISTRY).float()), name


@pytest.mark.parametrize(("source", "target", "layout"), list(cells()))
def test_every_cell_is_exact_or_refused(written, tmp_path, source, target, layout):
    path, out = written(source), tmp_path / f"out{REGISTRY.exporters[target].suffix}"
    if layout is None:
        with pytest.raises(NoRouteError, match=rf"^({'|'.join(PACKED)})[ :]") as raised:
            convert(path, out, Target(target), REGISTRY)
        assert raised.value.reasons
        assert "these formats can, exactly: " in raised.value.hint
        assert not out.exists()
        return
    report = convert(path, out, Target(target), REGISTRY)
    assert {report.plan.entries[name].layout for name in PACKED} == {layout}
    assert report.error.exact
    same_numbers(path, out)


@pytest.mark.parametrize("source", SOURCES)
def test_dequantizing_is_exact(written, tmp_path, source):
    report = convert(written(source), tmp_path / "out", Target("hf"), REGISTRY)
    assert {outcome.step.action for outcome in report.outcomes if outcome.step.name in PACKED} == {Action.DEQUANTIZE}
    assert report.error.exact
    same_numbers(written(source), tmp_path / "out")


def test_the_matrix_has_a_row_for_every_source_and_a_column_for_every_format():
    head, *rows = MATRIX.strip().splitlines()
    assert [row.split(" | ")[0].strip() for row in rows] == list(SOURCES)
    assert {cell.strip() for cell in head.split(" | ")[1:]} | {"hf"} == set(REGISTRY.exporters)
    layouts = {source.layout for source in SOURCES.values()}
    stored = {layout for exporter in REGISTRY.exporters.values() for layout in exporter.layouts or ()}
    assert stored - layouts <= {"bnb-nf4", "bnb-fp4"}


def test_a_value_that_the_target_lacks_is_an_error_not_a_rounding():
    """bfloat16 scales fit float16 unless their exponent is extreme: that only the data tells."""
    scheme = affine(4, 32, scales=ScaleFormat("bfloat16"))
    quantized = samples.quantized(scheme, (32, 64), 1)
    quantized.parts["scales"][3, 1] = 2.0**20
    with pytest.raises(SchemeError, match=r"scale 1.04858e\+06 is no float16 number"):
        lift(quantized, affine(4, 32))
