"""Format native: the same names, schemes, bytes and order back, and every contradiction refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowbit.errors import CheckpointError, OutputError
from lowbit.metadata import Metadata, SideFile
from lowbit.parts import TensorSpec
from lowbit.plugins import registry
from lowbit.scheme import Grid, Scheme, Zero
from lowbit.tensors import PackedSpec, PackedTensor, bit_equal
from lowbit.testing import ExporterContract, ImporterContract, Written, samples
from lowbit_formats import hf, native, native_manifest
from lowbit_formats.native import NativeExporter, NativeImporter
from lowbit_formats.plain import PlainPacker

IMPORTER, EXPORTER, PACKER = NativeImporter(), NativeExporter(), PlainPacker()
METADATA = Metadata(
    {"model_type": "llama", "vocab_size": 9},
    (SideFile("tokenizer.json", content=b"{}"),),
    {"source": "somewhere", "quantizer": "kbit"},
)


def packed(scheme, shape, seed=0):
    return PACKER.pack(samples.quantized(scheme, shape, seed))


def values():
    """Packed and plain tensors, in an order that is neither the alphabet's nor that of sizes."""
    asymmetric = Scheme(Grid.AFFINE, 3, 32, Zero.INTEGER)
    return {
        "model.layers.1.up_proj.weight": packed(asymmetric, (5, 64), 1),
        "model.norm.weight": torch.ones(7, dtype=torch.bfloat16),
        "model.layers.0.up_proj.weight": packed(Scheme(Grid.AFFINE, 4, 32), (5, 64), 2),
        "experts.up_proj": packed(asymmetric, (3, 32), 3),
        "a.bias": torch.arange(3.0),
    }


def entries_of(tensors):
    return {
        name: value.spec if isinstance(value, PackedTensor) else TensorSpec.of(value) for name, value in tensors.items()
    }


def write(path, tensors=None, metadata=METADATA, **options):
    tensors = values() if tensors is None else tensors
    EXPORTER.write(path, entries_of(tensors), iter(tensors.items()), metadata, **options)
    return path


def assert_equal(left, right):
    assert type(left) is type(right)
    if isinstance(left, PackedTensor):
        assert left.spec == right.spec
        assert all(bit_equal(left.buffers[name], right.buffers[name]) for name in left.buffers)
    else:
        assert bit_equal(left, right)


def assert_reads_back(folder, tensors):
    with IMPORTER.open(folder) as checkpoint:
        assert checkpoint.entries == entries_of(tensors)
        assert list(checkpoint.entries) == list(tensors)
        for name, value in checkpoint.stream():
            assert_equal(value, tensors[name])


class TestImporter(ImporterContract):
    @pytest.fixture
    def importer(self):
        return IMPORTER

    @pytest.fixture(params=[300, 10**9], ids=["shards", "one file"])
    def written(self, request, tmp_path):
        return Written(write(tmp_path / "m", shard_size=request.param), values(), METADATA)


class TestExporter(ExporterContract):
    @pytest.fixture
    def exporter(self):
        return EXPORTER

    @pytest.fixture
    def importer(self):
        return IMPORTER

    @pytest.fixture
    def packers(self):
        return [PACKER]


def test_a_layout_without_a_packer_is_stored_and_read(tmp_path):
    spec = PackedSpec("someone-elses", Scheme(Grid.AFFINE, 4, 32), (4, 32), {"tiles": TensorSpec(torch.int32, (4, 4))})
    tensors = {"a.weight": PackedTensor(spec, {"tiles": torch.arange(16, dtype=torch.int32).reshape(4, 4)})}
    assert_reads_back(write(tmp_path / "out", tensors), tensors)


def test_buffers_take_the_place_of_weight_in_the_name(tmp_path):
    folder = write(tmp_path / "out")
    stored = load_file(folder / "lowbit.safetensors")
    assert {name for name in stored if "layers.0" in name} == {
        "model.layers.0.up_proj.qweight",
        "model.layers.0.up_proj.scales",
    }
    assert "experts.up_proj.qweight" in stored


def test_equal_schemes_are_stored_once(tmp_path):
    document = json.loads((write(tmp_path / "out") / "lowbit.json").read_text())
    assert document["version"] == 1
    assert len(document["schemes"]) == 2
    assert document["tensors"]["model.norm.weight"] == {}
    assert document["tensors"]["experts.up_proj"]["buffers"]["qweight"] == {
        "tensor": "experts.up_proj.qweight",
        "dtype": "U8",
        "shape": [3, 12],
    }


def test_the_buffers_of_a_weight_stay_in_one_file(tmp_path):
    folder = write(tmp_path / "out", shard_size=1)
    places = json.loads((folder / "lowbit.safetensors.index.json").read_text())["weight_map"]
    assert len({places[name] for name in places if "layers.0" in name}) == 1


def test_the_registry_prefers_it_to_hf(tmp_path):
    found = registry(hf, native)
    with found.open(write(tmp_path / "out")) as checkpoint:
        assert isinstance(checkpoint, native.NativeCheckpoint)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, as transformers and accelerate import it
def test_transformers_refuses_the_folder_and_does_not_invent_weights(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=20, num_key_value_heads=2, **sizes)
    folder = write(tmp_path / "out", metadata=Metadata(config.to_dict()))
    with pytest.raises(OSError, match=r"no file named model.safetensors"):
        transformers.AutoModelForCausalLM.from_pretrained(folder)


# Refusing to write


def test_names_that_would_meet_are_refused_before_any_work():
    spec = PACKER.spec(Scheme(Grid.AFFINE, 4, 32), (4, 32))
    entries = {"a.weight": spec, "a.scales": TensorSpec(torch.float32, (1,))}
    with pytest.raises(CheckpointError, match=r"a.weight and a.scales would both be stored as 'a.scales'"):
        EXPORTER.check(entries, Metadata())


@pytest.mark.parametrize("name", ["lowbit.json", "config.json", "lowbit-00001-of-00002.safetensors", "../x"])
def test_side_files_stay_off_the_formats_own(name):
    with pytest.raises(CheckpointError, match="side file"):
        EXPORTER.check({}, Metadata(side_files=(SideFile(name, content=b""),)))


def test_a_packed_weight_that_contradicts_its_entry_leaves_nothing(tmp_path):
    tensors = values()
    entries = entries_of(tensors)
    tensors["experts.up_proj"] = packed(Scheme(Grid.AFFINE, 4, 32), (3, 32))
    with pytest.raises(OutputError, match=r"'experts.up_proj' was announced as"):
        EXPORTER.write(tmp_path / "out", entries, iter(tensors.items()), Metadata())
    assert not list(tmp_path.iterdir())


# Refusing to read


def damaged(folder, change):
    document = json.loads((folder / "lowbit.json").read_text())
    change(document)
    (folder / "lowbit.json").write_text(json.dumps(document))
    return folder


def refusal(folder):
    assert IMPORTER.why_not(folder) is None
    with pytest.raises(CheckpointError) as caught:
        IMPORTER.open(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def weight(document):
    return document["tensors"]["model.layers.0.up_proj.weight"]


DAMAGE = {
    "a newer version": (lambda d: d.update(version=2), "version 2, this lowbit reads 1; install a newer lowbit"),
    "no version": (lambda d: d.pop("version"), "version None"),
    "no tensors": (lambda d: d.pop("tensors"), "must hold tensors by name"),
    "odd provenance": (lambda d: d.update(provenance={"a": 1}), "provenance as strings"),
    "no schemes": (lambda d: d.pop("schemes"), "must hold a list of schemes"),
    "an unknown scheme field": (lambda d: d["schemes"][0].update(novel=1), "unknown Scheme field 'novel'"),
    "a newer scheme": (lambda d: d["schemes"][0].update(version=9), "scheme version"),
    "nonsense in a scheme": (lambda d: d["schemes"][0].update(bits="four"), "lowbit.json: "),
    "a scheme out of range": (lambda d: weight(d).update(scheme=7), "scheme 7, but the file holds 2 schemes"),
    "a scheme that is no number": (lambda d: weight(d).update(scheme=True), "scheme True"),
    "another shape of a buffer": (
        lambda d: weight(d)["buffers"]["qweight"].update(shape=[5, 33]),
        "buffer 'qweight' should be torch.uint8",
    ),
    "another dtype of a buffer": (
        lambda d: weight(d)["buffers"]["scales"].update(dtype="BF16"),
        "buffer 'scales' should be torch.bfloat16",
    ),
    "an unknown dtype": (lambda d: weight(d)["buffers"]["scales"].update(dtype="F7"), "has dtype 'F7'"),
    "a buffer that is not stored": (
        lambda d: weight(d)["buffers"]["scales"].update(tensor="gone"),
        "is missing in the weight files (as 'gone')",
    ),
    "a buffer without a name": (lambda d: weight(d)["buffers"]["scales"].update(tensor=["a"]), "buffer 'scales'"),
    "a buffer of nothing": (lambda d: weight(d)["buffers"].update(scales=None), "exactly tensor, dtype and shape"),
    "one tensor as two buffers": (
        lambda d: weight(d)["buffers"].update(
            scales=d["tensors"]["model.layers.1.up_proj.weight"]["buffers"]["scales"]
        ),
        "two tensors share the stored tensor 'model.layers.1.up_proj.scales'",
    ),
    "no buffers": (lambda d: weight(d).update(buffers={}), "at least one buffer"),
    "a missing key": (lambda d: weight(d).pop("layout"), "must have exactly layout, scheme, shape and buffers"),
    "a flat shape": (lambda d: weight(d).update(shape=[320]), "it must be [out_features, in_features]"),
    "an empty shape": (lambda d: weight(d).update(shape=[0, 64]), "it must be [out_features, in_features]"),
    "a shape far too large": (lambda d: weight(d).update(shape=[2**40, 2**40]), "no code is that small"),
    "a tensor that is not stored": (lambda d: d["tensors"].update(x={}), "tensor 'x' is missing in the weight files"),
    "a stored tensor without an owner": (
        lambda d: d["tensors"].pop("a.bias"),
        "does not know the stored tensor 'a.bias'",
    ),
}


@pytest.mark.parametrize(("change", "sentence"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_table_of_contents_is_refused(tmp_path, change, sentence):
    assert sentence in refusal(damaged(write(tmp_path / "out"), change))


def test_a_duplicate_key_is_refused(tmp_path):
    folder = write(tmp_path / "out")
    text = (folder / "lowbit.json").read_text()
    (folder / "lowbit.json").write_text(text.replace('"a.bias": {}', '"a.bias": {}, "a.bias": {}'))
    assert "'a.bias' occurs twice" in refusal(folder)


def test_missing_weights(tmp_path):
    folder = write(tmp_path / "out")
    (folder / "lowbit.safetensors").unlink()
    save_file({"a": torch.ones(1)}, folder / "other.safetensors")
    assert "has a lowbit.json, but no lowbit*.safetensors" in refusal(folder)


def test_a_truncated_shard(tmp_path):
    folder = write(tmp_path / "out")
    data = (folder / "lowbit.safetensors").read_bytes()
    (folder / "lowbit.safetensors").write_bytes(data[:-1])
    assert "is truncated: tensor" in refusal(folder)


def test_other_folders_are_not_its_own(tmp_path):
    assert IMPORTER.why_not(tmp_path) == f"{tmp_path.name} is no folder with a lowbit.json"
    (tmp_path / "file").write_text("")
    assert IMPORTER.why_not(tmp_path / "file") is not None


def test_the_document_of_a_manifest_reads_as_it_was_written():
    entries = entries_of(values())
    document = json.loads(json.dumps(native_manifest.build(entries, {"source": "x"})))
    stored = {name: spec for group in native_manifest.stored_specs(entries).values() for name, spec in group.items()}
    found = native_manifest.parse(document, stored, "lowbit.json")
    assert found.entries == entries
    assert found.provenance == {"source": "x"}
