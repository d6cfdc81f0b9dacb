"""The safetensors reader and writer: against the safetensors library, and against malformed files."""

import errno
import json
import os
import struct
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lowbit.errors import CheckpointError, OutputError
from lowbit.parts import TensorSpec
from lowbit.tensors import bit_equal
from lowbit_formats import safetensors_header
from lowbit_formats.safetensors_files import (
    SafetensorsReader,
    SafetensorsWriter,
    ShardedWriter,
    plan_shards,
    shard_names,
)
from lowbit_formats.safetensors_header import DTYPES, build_header, why_not_storable


def tensor_of(dtype, shape, seed=0):
    nbytes = TensorSpec(dtype, shape).nbytes
    high = 2 if dtype is torch.bool else 256
    raw = torch.randint(high, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return raw.view(dtype).reshape(shape)


def open_files():
    return len(list(Path("/proc/self/fd").iterdir()))


def specs_of(tensors):
    return {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}


def write(path, tensors, order=None):
    writer = SafetensorsWriter(path, specs_of(tensors))
    for name in order or tensors:
        writer.write(name, tensors[name])
    writer.close()
    return path


def read(path):
    with SafetensorsReader(path) as reader:
        return {name: reader.read(name) for name in reader.tensors}


def assert_equal(left, right):
    assert left.keys() == right.keys()
    assert all(bit_equal(left[name], right[name]) for name in left)


def every_dtype():
    return {name: tensor_of(dtype, (3, 5), number) for number, (name, dtype) in enumerate(DTYPES.items())}


def test_reads_every_dtype_that_the_library_writes(tmp_path):
    tensors = every_dtype()
    save_file(tensors, tmp_path / "a.safetensors")
    assert_equal(read(tmp_path / "a.safetensors"), tensors)


def test_the_library_reads_what_is_written(tmp_path):
    tensors = {name: tensor for name, tensor in every_dtype().items() if name not in ("F4", "F8_E8M0")}
    assert_equal(load_file(write(tmp_path / "a.safetensors", tensors)), tensors)


def test_every_dtype_is_described_as_the_library_describes_it(tmp_path):
    tensors = every_dtype()
    save_file(tensors, tmp_path / "library", {"format": "pt"})
    write(tmp_path / "own", tensors)
    assert kinds_of(tmp_path / "own") == kinds_of(tmp_path / "library")


def kinds_of(path):
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    assert header.pop("__metadata__") == {"format": "pt"}
    return {name: (record["dtype"], record["shape"]) for name, record in header.items()}


shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
storable = st.sampled_from([dtype for name, dtype in DTYPES.items() if name != "F4"])
tensor_sets = st.dictionaries(
    st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__" and name.isprintable()),
    st.builds(tensor_of, storable, shapes, st.integers(0, 9)),
    max_size=6,
)


@settings(max_examples=60, deadline=None)
@given(tensors=tensor_sets, data=st.data())
def test_what_is_written_in_any_order_reads_back(tmp_path_factory, tensors, data):
    path = tmp_path_factory.mktemp("any") / "a.safetensors"
    write(path, tensors, data.draw(st.permutations(list(tensors))))
    assert_equal(read(path), tensors)


@settings(max_examples=60, deadline=None)
@given(tensors=tensor_sets)
def test_every_tensor_is_aligned_to_its_item_size(tensors):
    header, stored = build_header(specs_of(tensors))
    assert len(header) % 8 == 0
    assert all(tensor.begin % tensor.spec.dtype.itemsize == 0 for tensor in stored.values())


def test_the_order_of_the_stream_is_kept_where_it_aligns():
    specs = {
        "b": TensorSpec(torch.uint8, (8,)),
        "a": TensorSpec(torch.float32, (1,)),
        "c": TensorSpec(torch.uint8, (1,)),
    }
    assert list(build_header(specs)[1]) == ["b", "a", "c"]


def test_tensors_that_are_no_contiguous_cpu_leaf_are_written_by_value(tmp_path):
    tensor = torch.arange(12.0).reshape(3, 4).T.requires_grad_()
    path = write(tmp_path / "a.safetensors", {"a": tensor})
    assert torch.equal(load_file(path)["a"], tensor)


def test_a_single_element_of_another_stride(tmp_path):
    tensor = torch.arange(4.0)[1::2][:1]
    assert tensor.stride() == (2,)
    assert load_file(write(tmp_path / "a.safetensors", {"a": tensor}))["a"].tolist() == [1.0]


def test_calls_that_move_less_than_asked_are_continued(tmp_path, monkeypatch):
    monkeypatch.setattr("lowbit_formats.safetensors_files._CALL_BYTES", 7)
    tensors = {"a": tensor_of(torch.float32, (5, 5))}
    assert_equal(read(write(tmp_path / "a.safetensors", tensors)), tensors)


def test_names_and_dtypes_that_have_no_place():
    assert "complex128" in why_not_storable("a", TensorSpec(torch.complex128, (1,)))
    assert "__metadata__" in why_not_storable("__metadata__", TensorSpec(torch.uint8, (1,)))
    assert why_not_storable("a", TensorSpec(torch.uint8, (1,))) is None


# Malformed files


def raw_file(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def record(begin, end, dtype="U8", shape=None):
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


MALFORMED = {
    "an unknown dtype": (
        {"x": record(0, 4, "F6_E2M3")},
        4,
        "tensor 'x' has dtype 'F6_E2M3', which lowbit does not read",
    ),
    "overlap": ({"x": record(0, 4), "y": record(2, 6)}, 6, "tensors 'x' and 'y' overlap at byte 2"),
    "a hole": ({"x": record(0, 4), "y": record(6, 8)}, 8, "2 bytes before tensor 'y' belong to no tensor"),
    "a hole in front": ({"x": record(1, 4)}, 4, "1 bytes before tensor 'x' belong to no tensor"),
    "bytes at the end": ({"x": record(0, 4)}, 9, "the last 5 bytes belong to no tensor"),
    "a truncated tensor": ({"x": record(0, 4), "y": record(4, 8)}, 7, "is truncated: tensor 'y' ends at byte 8"),
    "a wrong size": ({"x": record(0, 4, "F32", [2])}, 4, "tensor 'x' has 4 bytes .*, but F32 .2. takes 8"),
    "offsets backwards": ({"x": {"dtype": "U8", "shape": [0], "data_offsets": [4, 0]}}, 4, "'x' has -4 bytes"),
    "negative offsets": ({"x": {"dtype": "U8", "shape": [1], "data_offsets": [-1, 0]}}, 0, "non-negative integers"),
    "three offsets": ({"x": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1, 2]}}, 1, "two non-negative integers"),
    "a negative shape": ({"x": record(0, 1, shape=[-1])}, 1, r"tensor 'x' has shape \[-1\]"),
    "a boolean shape": ({"x": record(0, 1, shape=[True])}, 1, r"tensor 'x' has shape \[True\]"),
    "an odd F4": ({"x": record(0, 1, "F4", [3])}, 1, "two F4 values share a byte"),
    "a missing key": ({"x": {"dtype": "U8", "shape": [1]}}, 1, "tensor 'x' must have exactly dtype, shape and"),
    "a list": ({"x": [1]}, 1, "tensor 'x' must have exactly"),
    "odd metadata": ({"__metadata__": {"a": 1}}, 0, "__metadata__ must map strings to strings"),
    "no JSON": (b'{"x": ', 0, "is no valid JSON"),
    "no UTF-8": (b'{"\xff": 1}', 0, "is no valid JSON"),
    "a deep document": (b'{"a":' + b"[" * 10**5, 0, "is no valid JSON"),
    "no object": (b"[1, 2]  ", 0, "does not begin with '{'"),
    "a duplicate tensor": (b'{"x": {}, "x": {}}', 0, "'x' occurs twice"),
}


@pytest.mark.parametrize(("header", "size", "sentence"), MALFORMED.values(), ids=MALFORMED)
def test_malformed_headers_are_refused(tmp_path, header, size, sentence):
    path = raw_file(tmp_path / "bad.safetensors", header, bytes(size))
    with pytest.raises(CheckpointError, match=sentence) as caught:
        SafetensorsReader(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_header_larger_than_the_file(tmp_path):
    with pytest.raises(CheckpointError, match="its header should take 1000 bytes, the file has 10"):
        SafetensorsReader(raw_file(tmp_path / "a.safetensors", b"{}", length=1000))


def test_a_header_above_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr("lowbit_formats.safetensors_files.MAX_HEADER", 10)
    with pytest.raises(CheckpointError, match="has a header of 12 bytes; at most 10"):
        SafetensorsReader(raw_file(tmp_path / "a.safetensors", b'{"a":1     }'))
    with pytest.raises(OutputError, match="too many for one header"):
        SafetensorsWriter(tmp_path / "b.safetensors", {})


@pytest.mark.parametrize("content", [b"", b"\1\0\0"])
def test_a_file_too_short_for_anything(tmp_path, content):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"it has {len(content)} bytes"):
        SafetensorsReader(tmp_path / "a.safetensors")


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="not a regular file"):
        SafetensorsReader(tmp_path / "a.safetensors")


def test_a_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match="No such file"):
        SafetensorsReader(tmp_path / "a.safetensors")


def test_a_file_that_shrinks_while_it_is_open(tmp_path):
    path = write(tmp_path / "a.safetensors", {"x": tensor_of(torch.uint8, (100,))})
    with SafetensorsReader(path) as reader:
        os.truncate(path, path.stat().st_size - 1)
        with pytest.raises(CheckpointError, match="ends inside tensor 'x'"):
            reader.read("x")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_damaged_header_is_read_or_refused_but_never_crashes(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("damaged") / "a.safetensors"
    write(path, {"x": tensor_of(torch.float16, (4, 4)), "y": tensor_of(torch.uint8, (3,))})
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, 150))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    with suppress(CheckpointError):  # any other exception fails
        read(path)


# Shards


def write_shards(folder, tensors, shard_size, groups=None):
    groups = groups or [{name: TensorSpec.of(tensor)} for name, tensor in tensors.items()]
    with ShardedWriter(folder, "model", groups, shard_size) as shards:
        for name, tensor in tensors.items():
            shards.write(name, tensor)
        shards.finish()
    return sorted(path.name for path in folder.iterdir())


def test_shards_and_index_are_named_as_hugging_face_names_them(tmp_path):
    tensors = {f"t{number}": tensor_of(torch.uint8, (40,), number) for number in range(5)}
    files = write_shards(tmp_path, tensors, 100)
    assert files == [*shard_names("model", 3), "model.safetensors.index.json"]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 200}
    assert index["weight_map"]["t4"] == "model-00003-of-00003.safetensors"
    assert_equal({name: load_file(tmp_path / file)[name] for name, file in index["weight_map"].items()}, tensors)


def test_one_shard_has_no_index(tmp_path):
    assert write_shards(tmp_path, {"a": tensor_of(torch.uint8, (4,))}, 4) == ["model.safetensors"]


def test_no_tensors_make_an_empty_file(tmp_path):
    assert write_shards(tmp_path, {}, 4, [{}]) == ["model.safetensors"]
    assert load_file(tmp_path / "model.safetensors") == {}


def test_groups_stay_together():
    spec = TensorSpec(torch.uint8, (40,))
    shards = plan_shards([{"a": spec}, {"b": spec, "c": spec}, {"d": spec, "e": spec, "f": spec}], 100)
    assert [list(shard) for shard in shards] == [["a"], ["b", "c"], ["d", "e", "f"]]


def test_a_shard_is_closed_with_its_last_tensor(tmp_path):
    before = open_files()
    specs = {f"t{number}": TensorSpec(torch.uint8, (4,)) for number in range(6)}
    with ShardedWriter(tmp_path, "model", ({name: spec} for name, spec in specs.items()), 4) as shards:
        for name in specs:
            shards.write(name, torch.zeros(4, dtype=torch.uint8))
            assert open_files() == before
        shards.finish()


@pytest.mark.parametrize(
    ("names", "dtype", "sentence"),
    [
        (["a"], torch.uint8, "1 announced tensors never came, the first is 'b'"),
        (["a", "a"], torch.uint8, "'a' came twice"),
        (["a", "c"], torch.uint8, "'c' was not announced"),
        (["a"], torch.int8, "'a' was announced as torch.uint8 .4,., but came as torch.int8"),
    ],
)
def test_a_stream_that_contradicts_the_header(tmp_path, names, dtype, sentence):
    def write_all(shards):
        for name in names:
            shards.write(name, torch.zeros(4, dtype=dtype))
        shards.finish()

    specs = [{name: TensorSpec(torch.uint8, (4,))} for name in "ab"]
    with ShardedWriter(tmp_path, "model", specs) as shards, pytest.raises(OutputError, match=sentence):
        write_all(shards)


def test_a_failed_header_closes_the_file(tmp_path, monkeypatch):
    before = open_files()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space"):
        SafetensorsWriter(tmp_path / "a.safetensors", {"a": TensorSpec(torch.uint8, (4,))})
    assert open_files() == before


@pytest.mark.parametrize(("excess", "refused_as_large"), [(0, False), (1, True)])
def test_the_limit_is_the_librarys(tmp_path, excess, refused_as_large):
    path = raw_file(tmp_path / "a.safetensors", b"{}", length=safetensors_header.MAX_HEADER + excess)
    with pytest.raises(SafetensorError) as caught:
        load_file(path)
    assert ("too large" in str(caught.value)) == refused_as_large
