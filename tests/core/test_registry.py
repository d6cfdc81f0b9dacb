import itertools

import pytest
import torch

from lowbit import (
    Checkpoint,
    Exporter,
    Grid,
    Importer,
    Kernel,
    MatmulProblem,
    PackedTensor,
    Packer,
    Quantizer,
    Registry,
    Scheme,
    TensorSpec,
)
from lowbit.errors import (
    CheckpointError,
    DuplicateComponentError,
    NoRouteError,
    PluginError,
    UnknownComponentError,
)
from lowbit.registry import INSTALL_HINTS, Route
from lowbit.tensors import PackedSpec

SCHEME, SHAPE = Scheme(Grid.AFFINE, 4, 32), (8, 64)


class ToyQuantizer(Quantizer):
    Options = object

    def __init__(self, name):
        self.name = name

    def scheme(self, options):
        return SCHEME

    def quantize(self, weight, options, calibration=None):
        raise NotImplementedError


class ToyPacker(Packer):
    def __init__(self, layout, priority=0, reason=None):
        self.layout, self.priority, self.reason = layout, priority, reason

    def why_not(self, scheme, shape):
        return self.reason

    def specs(self, scheme, shape):
        return {}

    def pack(self, quantized):
        return PackedTensor(self.spec(quantized.scheme, quantized.shape), {})

    def unpack(self, packed):
        raise NotImplementedError


class ToyKernel(Kernel):
    def __init__(self, name, layout="plain", priority=0, reason=None):
        self.name, self.layout, self.priority, self.reason = name, layout, priority, reason

    def why_not(self, problem):
        if problem.layout != self.layout:
            return f"runs layout {self.layout!r}, not {problem.layout!r}"
        return self.reason

    def dequantize(self, packed, dtype=torch.float32):
        raise NotImplementedError


class ToyExporter(Exporter):
    def __init__(self, format, layouts, reason=None):
        self.format, self.layouts, self.reason = format, layouts, reason

    def why_not(self, scheme, shape):
        return self.reason

    def write(self, path, entries, stream, metadata, shard_size=0):
        raise NotImplementedError


class ToyCheckpoint(Checkpoint):
    closed = False

    def __init__(self, path, entries):
        self.path, self.entries = path, entries

    def read(self, name):
        raise NotImplementedError

    def close(self):
        self.closed = True


class ToyImporter(Importer):
    def __init__(self, format, priority=0, reason=None, entries=None):
        self.format, self.priority, self.reason = format, priority, reason
        self.checkpoint = ToyCheckpoint(format, entries or {})

    def why_not(self, path):
        return self.reason

    def open(self, path):
        return self.checkpoint


def registry(*components):
    found = Registry()
    tables = {
        Quantizer: found.quantizers,
        Packer: found.packers,
        Kernel: found.kernels,
        Exporter: found.exporters,
        Importer: found.importers,
    }
    for component in components:
        next(table for kind, table in tables.items() if isinstance(component, kind)).register(component)
    return found


def orders(components):
    """Yield a registry for every order in which the components could have been installed."""
    return [registry(*order) for order in itertools.permutations(components)]


def test_duplicates_name_both_modules():
    other = type("Other", (ToyQuantizer,), {"__module__": "someone_elses_plugin"})
    with pytest.raises(DuplicateComponentError) as raised:
        registry(ToyQuantizer("kbit"), other("kbit"))
    assert str(raised.value) == (
        f"two quantizers are named 'kbit': one in {ToyQuantizer.__module__}, one in someone_elses_plugin; rename one"
    )


def test_unknown_names_list_the_known():
    found = registry(ToyQuantizer("kbit"), ToyQuantizer("autoround"))
    with pytest.raises(UnknownComponentError, match=r"no quantizer named 'zip'; installed: autoround, kbit$"):
        found.quantizers["zip"]
    with pytest.raises(UnknownComponentError, match=r"installed: .*; did you mean 'kbit'\?"):
        found.quantizers["kbits"]
    with pytest.raises(UnknownComponentError, match="no layout named 'plain'; installed: none"):
        found.packers["plain"]


@pytest.mark.parametrize("name", INSTALL_HINTS)
def test_names_of_known_plugins_say_what_to_install(name):
    with pytest.raises(UnknownComponentError, match=rf"no quantizer named '{name}'.*\(pip install lowbit-{name}\)"):
        registry().quantizers[name]


@pytest.mark.parametrize("wrong", [ToyQuantizer, object(), ToyPacker("x"), "kbit", None])
def test_only_instances_of_the_kind_are_registered(wrong):
    with pytest.raises(PluginError, match=r"is no Quantizer instance; register an instance, not a class \(quantizer\)"):
        registry().quantizers.register(wrong)


def test_tables_are_sorted_mappings():
    found = registry(ToyQuantizer("b"), ToyQuantizer("a"))
    assert list(found.quantizers) == ["a", "b"]
    assert len(found.quantizers) == 2
    assert "a" in found.quantizers
    assert "c" not in found.quantizers
    assert found.quantizers.get("a") is found.quantizers["a"]


def test_the_most_specific_importer_opens_a_path_whatever_was_installed_first(tmp_path):
    importers = [ToyImporter("general"), ToyImporter("special", 5), ToyImporter("best", 9, "holds no best.json")]
    assert {found.open(tmp_path).path for found in orders(importers)} == {"special"}


def test_a_path_that_nobody_reads_gets_every_reason(tmp_path):
    found = registry(ToyImporter("a", 0, "is no a"), ToyImporter("b", 1, "is no b"))
    with pytest.raises(CheckpointError, match=r"that an installed format can read \(b: is no b; a: is no a\)"):
        found.open(tmp_path)
    with pytest.raises(CheckpointError, match=r"nothing does not exist; give a model folder"):
        found.open(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="none installed"):
        registry().open(tmp_path)


class CodesPacker(ToyPacker):
    def specs(self, scheme, shape):
        return {"codes": TensorSpec(torch.uint8, shape)}


@pytest.mark.parametrize(
    ("buffers", "reason", "words"),
    [
        ({}, None, "it has no codes"),
        ({"codes": (8, 64), "scales": (8,)}, None, "such a weight has no scales"),
        ({"codes": (8, 32)}, None, r"codes is uint8 \[8, 32\], and such a weight needs uint8 \[8, 64\]"),
        ({"codes": (8, 64)}, "holds no such scheme", "holds no such scheme"),
    ],
)
def test_buffers_that_do_not_fit_the_declared_scheme_are_refused(buffers, reason, words, tmp_path):
    spec = PackedSpec("codes", SCHEME, SHAPE, {name: TensorSpec(torch.uint8, shape) for name, shape in buffers.items()})
    importer = ToyImporter("toy", entries={"a.weight": spec})
    with pytest.raises(
        CheckpointError, match=f"toy: a.weight is declared as an affine .* in layout 'codes', but {words}"
    ):
        registry(importer, CodesPacker("codes", reason=reason)).open(tmp_path)
    assert importer.checkpoint.closed
    assert registry(importer).open(tmp_path) is importer.checkpoint  # nobody here knows the layout


def test_a_format_that_stores_anything_takes_the_best_packer():
    components = [
        ToyPacker("plain", 10),
        ToyPacker("special", 20),
        ToyPacker("sulky", 90, "not today"),
        ToyPacker("also", 20),
        ToyExporter("native", None),
    ]
    for found in orders(components):
        assert found.route(SCHEME, SHAPE, "native").packer.layout == "also"


def test_a_format_s_own_order_beats_priority():
    components = [ToyPacker("second", 90), ToyPacker("first"), ToyExporter("file", ("first", "second"))]
    for found in orders(components):
        assert found.route(SCHEME, SHAPE, "file").packer.layout == "first"


def test_a_format_without_layouts_stores_dequantized_weights():
    route = registry(ToyExporter("hf", ())).route(SCHEME, SHAPE, "hf")
    assert isinstance(route, Route)
    assert route.packer is None


def test_no_route_lists_every_reason_and_the_formats_that_can():
    found = registry(
        ToyPacker("a", 0, "bits must be 2"),
        ToyPacker("b", 0, "no groups of 32"),
        ToyPacker("plain"),
        ToyExporter("file", ("b", "a")),
        ToyExporter("native", None),
        ToyExporter("hf", ()),
    )
    with pytest.raises(NoRouteError) as raised:
        found.route(SCHEME, SHAPE, "file")
    assert list(raised.value.reasons.items()) == [("b", "no groups of 32"), ("a", "bits must be 2")]
    assert str(raised.value) == (
        "format 'file' cannot hold an affine 4-bit g32 weight of 8x64 (b: no groups of 32; a: bits must be 2); "
        "these formats can: native"
    )
    assert found.formats_for(SCHEME, SHAPE) == ["native"]


def test_a_format_s_own_refusal_comes_first():
    found = registry(ToyPacker("a"), ToyExporter("file", ("a",), "no trellis in this file"))
    with pytest.raises(NoRouteError) as raised:
        found.route(SCHEME, SHAPE, "file")
    assert raised.value.reasons == {"file": "no trellis in this file"}
    assert raised.value.hint == "no installed format can"
    assert found.ask(SCHEME, SHAPE, "file") == {"file": "no trellis in this file"}


def test_unknown_formats_are_no_route():
    with pytest.raises(UnknownComponentError, match="no export format named 'tar'"):
        registry().route(SCHEME, SHAPE, "tar")


PROBLEM = MatmulProblem("plain", SCHEME, SHAPE)


def test_the_fastest_willing_kernel_serves_whatever_was_installed_first():
    kernels = [
        ToyKernel("torch-plain"),
        ToyKernel("fast-b", priority=5),
        ToyKernel("fast-a", priority=5),
        ToyKernel("cuda", priority=9, reason="layout 'plain' needs a GPU"),
    ]
    for found in orders(kernels):
        assert found.kernel_for(PROBLEM).name == "fast-a"
        assert found.reference_kernel(PROBLEM).name == "torch-plain"


def test_no_kernel_lists_the_reasons_that_concern_the_layout():
    found = registry(
        ToyKernel("qtip-cuda", "qtip", 5, "layout 'qtip' needs compute capability 8.0, this device is cpu"),
        ToyKernel("torch-other", "other"),
    )
    with pytest.raises(NoRouteError) as raised:
        found.kernel_for(MatmulProblem("qtip", SCHEME, SHAPE))
    assert "qtip-cuda" in raised.value.reasons
    assert str(raised.value).startswith("no kernel runs layout 'qtip' (affine 4-bit g32) on cpu")
    assert str(raised.value).endswith("pip install lowbit-qtip")


def test_a_layout_without_a_reference_kernel_is_said():
    found = registry(ToyKernel("fast", "odd", 5))
    with pytest.raises(NoRouteError, match="layout 'odd' has no plain-torch kernel; install the plugin"):
        found.reference_kernel(MatmulProblem("odd", SCHEME, SHAPE))
