"""Malformed GGUF headers: one sentence each, never a crash, never memory that the file did not pay for."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowbit.errors import CheckpointError
from lowbit_formats.gguf.header import read_header
from lowbit_formats.gguf.keys import Key, encode, flag, shortest, text, texts, u32


def string(value):
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def key(name, kind, payload):
    return string(name) + struct.pack("<I", kind) + payload


def info(name, lengths=(32,), type=0, offset=0):
    return string(name) + struct.pack(f"<I{len(lengths)}QIQ", len(lengths), *lengths, type, offset)


def file_of(tmp_path, keys=(), infos=(), data=b"", magic=b"GGUF", version=3, tensors=None, count=None, alignment=32):
    head = magic + struct.pack(
        "<IQQ", version, len(infos) if tensors is None else tensors, len(keys) if count is None else count
    )
    head += b"".join(keys) + b"".join(infos)
    path = tmp_path / "model.gguf"
    path.write_bytes(head + bytes(-len(head) % alignment) + data)
    return path


def refused(path):
    with pytest.raises(CheckpointError) as raised:
        read_header(path)
    message = str(raised.value)
    assert "\n" not in message
    assert "model.gguf" in message
    return message


NAME = key("general.name", 8, string("x"))


def test_a_good_file_is_read(tmp_path):
    keys = [
        NAME,
        key("a.b", 9, struct.pack("<IQ3i", 5, 3, 1, -2, 3)),
        key("flag", 7, b"\x01"),
        key("r", 6, struct.pack("<f", 0.5)),
    ]
    header = read_header(file_of(tmp_path, keys, [info("one", (32, 2)), info("two", (64,), 8, 256)], bytes(256 + 68)))
    assert header.keys == {"general.name": "x", "a.b": [1, -2, 3], "flag": True, "r": 0.5}
    one, two = header.tensors
    assert (one.shape, one.type.name, one.nbytes) == ((2, 32), "F32", 256)
    assert (two.type.name, two.start - one.start, two.nbytes) == ("Q8_0", 256, 68)


def test_version_2_is_read(tmp_path):
    assert read_header(file_of(tmp_path, [NAME], version=2)).keys == {"general.name": "x"}


def test_alignment_is_the_files_own(tmp_path):
    keys = [key("general.alignment", 4, struct.pack("<I", 64))]
    path = file_of(tmp_path, keys, [info("one"), info("two", offset=128)], bytes(256), alignment=64)
    assert [tensor.start % 64 for tensor in read_header(path).tensors] == [0, 0]


def test_keys_are_written_as_they_are_read(tmp_path):
    written = [u32("n", 7), text("s", "ä"), flag("f", False), texts("l", ["a", ""]), Key("i", "i32[]", [-1, 2])]
    assert read_header(file_of(tmp_path, [encode([item]) for item in written])).keys == {
        "n": 7,
        "s": "ä",
        "f": False,
        "l": ["a", ""],
        "i": [-1, 2],
    }


@pytest.mark.parametrize(
    ("faults", "words"),
    [
        ({"magic": b"GGML"}, "GGML"),
        ({"version": 1}, "version 1"),
        ({"version": 4}, "version 4"),
        ({"version": 0x03000000}, "big-endian"),
        ({"tensors": 2**60}, "claims"),
        ({"count": 2**63}, "claims"),
        ({"keys": [key("a", 9, struct.pack("<IQ", 4, 2**61))]}, "elements of a"),
        ({"keys": [key("a", 9, struct.pack("<IQ", 8, 2**40))]}, "elements of a"),
        ({"keys": [key("a", 9, struct.pack("<IQ", 9, 1))]}, "kind 9"),
        ({"keys": [key("a", 13, b"")]}, "kind 13"),
        ({"keys": [key("a", 8, struct.pack("<Q", 2**62))]}, "truncated"),
        ({"keys": [key("a", 8, string(b"\xff\xfe"))]}, "not UTF-8"),
        ({"keys": [key(b"\xc3", 4, bytes(4))]}, "not UTF-8"),
        ({"keys": [NAME, NAME]}, "general.name"),
        ({"keys": [key("", 4, bytes(4))]}, "named ''"),
        ({"keys": [key("general.alignment", 4, struct.pack("<I", 24))]}, "power of two"),
        ({"keys": [key("general.alignment", 4, struct.pack("<I", 0))]}, "power of two"),
        ({"infos": [info("")]}, "1 to 63 printable bytes"),
        ({"infos": [info("x" * 64)]}, "1 to 63 printable bytes"),
        ({"infos": [info("a\nb")]}, "1 to 63 printable bytes"),
        ({"keys": [key("a\nb", 4, bytes(4))]}, "named 'a"),
        ({"infos": [info("one", ())]}, "0 dimensions"),
        ({"infos": [info("one", (1,) * 5)]}, "5 dimensions"),
        ({"infos": [info("one", (32, 0))]}, "empty"),
        ({"infos": [info("one", type=99)]}, "type 99"),
        ({"infos": [info("one", (48,), 2)]}, "no multiple"),
        ({"infos": [info("one"), info("one", offset=128)], "data": bytes(256)}, "two tensors named one"),
        ({"infos": [info("one"), info("two", offset=160)], "data": bytes(512)}, "has offset 160, expected 128"),
        ({"infos": [info("one"), info("two", offset=96)], "data": bytes(512)}, "has offset 96, expected 128"),
        ({"infos": [info("one", (32, 2**50))]}, "truncated"),
        ({"infos": [info("one", (2**62, 2**62, 2**62))]}, "truncated"),
        ({"infos": [info("one")], "data": bytes(127)}, "truncated"),
    ],
)
def test_malformed_headers_are_one_sentence(tmp_path, faults, words):
    assert words in refused(file_of(tmp_path, **faults))


def test_every_cut_of_a_header_is_refused(tmp_path):
    path = file_of(tmp_path, [NAME, key("l", 9, struct.pack("<IQ", 8, 1) + string("v"))], [info("one")], bytes(128))
    whole = path.read_bytes()
    for length in range(len(whole) - 1):
        path.write_bytes(whole[:length])
        refused(path)


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_float32_keys_come_back_with_few_digits(stored):
    assert struct.pack("<f", shortest(stored)) == struct.pack("<f", stored)
    assert len(repr(shortest(stored))) <= len(repr(stored))


def test_the_usual_constants_look_usual():
    assert [shortest(value) for value in (9.999999747378752e-06, 0.10000000149011612, 1e5)] == [1e-05, 0.1, 1e5]
