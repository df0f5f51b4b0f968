"""Our GGUF reader against the `gguf` package, and what it says of files that are damaged."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny_refiner
from gguf import GGMLQuantizationType as Kind

from lance_edge.errors import BaseCorrupt, PullError
from lance_edge.gguf import Gguf
from lance_edge.llama import LINEARS, NORMS, GgufLlama

U32, STRING, ARRAY, UNKNOWN = 4, 8, 9, 13  # types of metadata values
MANY = 2**63

Fill = Callable[[gguf.GGUFWriter], object]


def read(contents: bytes) -> Gguf:
    return Gguf(memoryview(contents))


def read_all(contents: bytes) -> dict[str, Any]:
    """Every tensor by name."""
    opened = read(contents)
    return {name: opened.tensor(name) for name in opened.names}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """A file that the `gguf` package writes."""

    def written(fill: Fill, **options: Any) -> Path:
        path = tmp_path / "some.gguf"
        writer = gguf.GGUFWriter(path, "llama", **options)
        fill(writer)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return written


def tensor(name: str, kind: Kind, shape: tuple[int, ...], scale: float = 1.0) -> Fill:
    weight = scale * np.random.default_rng(5).standard_normal(shape).astype(np.float32)
    stored = gguf.quants.quantize(weight, kind)
    return lambda writer: writer.add_tensor(name, stored, raw_dtype=kind)


# What is in a file


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.Q8_0, Kind.Q4_1], ids=lambda k: k.name)
@pytest.mark.parametrize("shape", [(32,), (1, 32), (5, 96), (2, 3, 64)], ids=str)
@pytest.mark.parametrize("scale", [0.0, 1e-3, 300.0])
def test_tensors_are_what_the_gguf_package_makes_of_them(
    write: Callable[..., Path], kind: Kind, shape: tuple[int, ...], scale: float
) -> None:
    path = write(tensor("some.weight", kind, shape, scale))
    (theirs,) = gguf.GGUFReader(path).tensors
    ours = read(path.read_bytes())
    found = ours.tensor("some.weight")
    assert dict(ours.names) == {"some.weight": shape}
    assert (str(found.dtype), found.shape) == ("float32", shape)
    np.testing.assert_array_equal(found, gguf.dequantize(theirs.data, kind).reshape(shape))


def test_metadata_of_every_type_is_read(write: Callable[..., Path]) -> None:
    def fill(writer: gguf.GGUFWriter) -> None:
        writer.add_uint8("u8", 2**8 - 1)
        writer.add_int8("i8", -(2**7))
        writer.add_uint16("u16", 2**16 - 1)
        writer.add_int16("i16", -(2**15))
        writer.add_uint32("u32", 2**32 - 1)
        writer.add_int32("i32", -(2**31))
        writer.add_uint64("u64", 2**64 - 1)
        writer.add_int64("i64", -(2**63))
        writer.add_float32("f32", 0.15625)
        writer.add_float64("f64", 0.1)
        writer.add_bool("yes", True)
        writer.add_bool("no", False)
        writer.add_string("text", "Ġ日本語")
        writer.add_array("texts", ["a", "", "Ġb"])
        writer.add_array("numbers", [1, -2, 3])

    assert read(write(fill).read_bytes()).metadata == {
        "general.architecture": "llama",
        "u8": 2**8 - 1,
        "i8": -(2**7),
        "u16": 2**16 - 1,
        "i16": -(2**15),
        "u32": 2**32 - 1,
        "i32": -(2**31),
        "u64": 2**64 - 1,
        "i64": -(2**63),
        "f32": 0.15625,
        "f64": 0.1,
        "yes": True,
        "no": False,
        "text": "Ġ日本語",
        "texts": ["a", "", "Ġb"],
        "numbers": [1, -2, 3],
    }


@pytest.mark.parametrize("alignment", [32, 64, 4096])
def test_tensors_are_found_behind_any_alignment(write: Callable[..., Path], alignment: int) -> None:
    weights = {name: np.full((2, 32), value, np.float32) for value, name in enumerate("abc")}

    def fill(writer: gguf.GGUFWriter) -> None:
        writer.add_custom_alignment(alignment)
        for name, weight in weights.items():
            writer.add_tensor(name, weight)

    found = read_all(write(fill).read_bytes())
    for name, weight in weights.items():
        np.testing.assert_array_equal(found[name], weight)


def test_the_network_is_the_one_that_was_written() -> None:
    network, checkpoint = tiny_refiner.network(), tiny_refiner.checkpoint()
    assert network.shape == tiny_refiner.SHAPE
    np.testing.assert_array_equal(network.embedding(), checkpoint["model.embed_tokens"])
    np.testing.assert_array_equal(network.final_norm(), checkpoint["model.norm"])
    for layer in range(tiny_refiner.SHAPE.layers):
        for name in LINEARS:
            expected = checkpoint[f"model.layers.{layer}.{name}"]
            np.testing.assert_array_equal(network.linear(layer, name), expected)
        for name in NORMS:
            expected = checkpoint[f"model.layers.{layer}.{name}"]
            np.testing.assert_array_equal(network.norm(layer, name), expected)


# What is no such file


@pytest.mark.parametrize(
    "contents",
    [
        b"",
        b"GGUF",
        b"GGML" + bytes(100),
        b"PK\x03\x04" + bytes(100),
        struct.pack("<4sIQQ", b"GGUF", 1, 0, 0),
        struct.pack("<4sIQQ", b"GGUF", 4, 0, 0),
    ],
    ids=["empty", "magic alone", "ggml", "zip", "version 1", "version 4"],
)
def test_what_is_no_gguf_file_is_refused(contents: bytes) -> None:
    with pytest.raises(BaseCorrupt, match="GGUF file"):
        read(contents)


def test_a_file_of_the_other_byte_order_is_refused(write: Callable[..., Path]) -> None:
    path = write(tensor("a", Kind.F32, (32,)), endianess=gguf.GGUFEndian.BIG)
    with pytest.raises(BaseCorrupt, match="no GGUF file of version 2 or 3"):
        read(path.read_bytes())


def test_a_file_cut_short_anywhere_is_corrupt() -> None:
    """Only the last tensor's padding may be missing."""
    whole = tiny_refiner.base_gguf()
    expected = read_all(whole)
    header = whole.index(b"token_embd.weight") + 1000
    rng = random.Random(3)
    lengths = {*range(100), *rng.sample(range(header), 300), *rng.sample(range(len(whole)), 100)}
    refused = 0
    for length in sorted(lengths):
        try:
            found = read_all(whole[:length])
        except BaseCorrupt:
            refused += 1
        else:
            assert length >= len(whole) - 32
            assert found.keys() == expected.keys()
    assert refused >= len(lengths) - 2


def test_bytes_changed_anywhere_raise_nothing_else() -> None:
    """Its hash is checked first, but a reader must not depend on that."""
    whole = tiny_refiner.base_gguf()
    header = whole.index(b"token_embd.weight") + 1000
    rng = random.Random(4)
    refused = 0
    for _ in range(400):
        changed = bytearray(whole)
        for _ in range(rng.choice([1, 1, 4])):
            changed[rng.randrange(header)] = rng.choice([0, 1, 0x7F, 0xFF, rng.randrange(256)])
        try:
            GgufLlama(read(bytes(changed)))
            with np.errstate(all="ignore"):  # a scale may be infinite now
                read_all(bytes(changed))
        except BaseCorrupt:
            refused += 1
    assert refused > 20  # most bytes are the tokens' own


def string(text: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


def pair(kind: int, value: bytes, key: bytes = b"some.key") -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def entry(*shape: int, kind: int = 0, offset: int = 0, dimensions: int | None = None) -> bytes:
    count = len(shape) if dimensions is None else dimensions
    return string(b"a") + struct.pack(f"<I{len(shape)}QIQ", count, *shape, kind, offset)


def file(pairs: bytes = b"", entries: bytes = b"", counts: tuple[int, int] | None = None) -> bytes:
    """A file with one metadata pair or tensor, or none, before 4 KiB of zeros."""
    if counts is None:
        counts = int(bool(entries)), int(bool(pairs))
    return struct.pack("<4sIQQ", b"GGUF", 3, *counts) + pairs + entries + bytes(4096)


def array(kind: int, count: int, values: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + values


def test_a_file_written_by_hand_is_read() -> None:
    """What the damaged files below are made from."""
    assert read(file(pair(U32, struct.pack("<I", 7)))).metadata == {"some.key": 7}
    assert read(file(pair(ARRAY, array(U32, 2, bytes(8))))).metadata == {"some.key": [0, 0]}
    assert read_all(file(entries=entry(4, 2)))["a"].tolist() == [[0.0] * 4] * 2


ALIGNMENT = b"general.alignment"
DAMAGED = {
    "many tensors": file(counts=(MANY, 0)),
    "many pairs": file(counts=(0, MANY)),
    "a long key": file(string(b"k", MANY)),
    "a long string": file(pair(STRING, string(b"x", MANY))),
    "a long array": file(pair(ARRAY, array(U32, MANY))),
    "an array of long strings": file(pair(ARRAY, array(STRING, 2, string(b"x", MANY)))),
    "an unknown type": file(pair(UNKNOWN, bytes(8))),
    "an array of an unknown type": file(pair(ARRAY, array(UNKNOWN, 1, bytes(8)))),
    "arrays in arrays in arrays": file(pair(ARRAY, array(ARRAY, 1) * 20_000)),
    "a key that is no text": file(string(b"\xff") + struct.pack("<II", U32, 7), counts=(0, 1)),
    "an alignment of 0": file(pair(U32, bytes(4), ALIGNMENT)),
    "an alignment in words": file(pair(STRING, string(b"wide"), ALIGNMENT)),
    "a list of alignments": file(pair(ARRAY, array(U32, 1, bytes(4)), ALIGNMENT)),
    "a tensor of many dimensions": file(entries=entry(4, dimensions=2**32 - 1)),
    "a long tensor": file(entries=entry(MANY)),
    "the longest tensor": file(entries=entry(2**64 - 1)),
    "a tensor whose size overflows": file(entries=entry(2**32, 2**32)),
    "a tensor whose size is below 0": file(entries=entry(2**32, 2**31)),
    "a tensor beyond the file": file(entries=entry(4, offset=MANY)),
    "a tensor of half a block": file(entries=entry(16, kind=8)),
}


@pytest.mark.parametrize("contents", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_file_is_corrupt_and_nothing_else(contents: bytes) -> None:
    with pytest.raises(BaseCorrupt, match="GGUF file"):
        read_all(contents)


def test_a_last_string_that_ends_early_is_no_shorter_string() -> None:
    whole = struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + pair(STRING, string(b"abcdef"))
    assert read(whole).metadata == {"some.key": "abcdef"}
    with pytest.raises(BaseCorrupt):
        read(whole[:-2])


@pytest.mark.parametrize("kind", [2, 6, 10, 30, 2**32 - 1])
def test_a_tensor_of_another_type_is_named(kind: int) -> None:
    opened = read(file(entries=entry(32, kind=kind)))
    assert dict(opened.names) == {"a": (32,)}
    with pytest.raises(BaseCorrupt) as caught:
        opened.tensor("a")
    assert f"tensor 'a' of the GGUF file is damaged (its type {kind} is" in str(caught.value)


def test_a_missing_tensor_is_named() -> None:
    with pytest.raises(BaseCorrupt, match=r"has no tensor 'blk\.9\.attn_q\.weight'"):
        tiny_refiner.network().linear(9, "self_attn.q_proj")


def test_a_corrupt_base_is_a_failed_pull() -> None:
    with pytest.raises(PullError):
        read(b"")


@pytest.mark.parametrize("key", ["llama.block_count", "tokenizer.ggml.tokens"])
def test_metadata_without_a_network_is_refused(key: str) -> None:
    opened = read(tiny_refiner.base_gguf())
    del opened.metadata[key]
    with pytest.raises(BaseCorrupt, match=f"has no '{key}'; it is no Llama network"):
        GgufLlama(opened)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.block_count", "two"),
        ("llama.embedding_length", [96]),
        ("tokenizer.ggml.tokens", 259),
        ("llama.attention.layer_norm_rms_epsilon", "small"),
    ],
)
def test_metadata_of_another_type_is_refused(key: str, value: object) -> None:
    opened = read(tiny_refiner.base_gguf())
    opened.metadata[key] = value
    with pytest.raises(BaseCorrupt):
        GgufLlama(opened)
