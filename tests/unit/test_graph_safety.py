"""Graphs that try to read files, to load code, or to exhaust what reads them.

The classes of known ONNX loading flaws: external data that leaves the model's folder
(CVE-2022-25882, CVE-2024-27318, CVE-2025-51480), by a link (CVE-2026-27489), with keys that set
attributes (CVE-2026-34445); archives from a model hub (CVE-2024-5187, CVE-2026-28500).
"""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import tiny
from onnx import TensorProto, helper

import lance_edge
from lance_edge.bundle import file_entry, open_bundle
from lance_edge.errors import BundleCorrupt, BundleError
from lance_edge_engines import SessionError, open_session
from lance_edge_engines.external import HOLDS, Malformed, tensors_in_files

SECRET = np.arange(4, dtype=np.float32)


def graph(
    location: str | None = None,
    extra: Sequence[tuple[str, str]] = (),
    domain: str = "",
    opset: int = 21,
    op: str = "Add",
) -> bytes:
    """y = x + w, with w in a file of its own if a location is given."""
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4])
    if location is None:
        weight.raw_data = SECRET.tobytes()
    else:
        weight.data_location = TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", "0"), ("length", "16"), *extra):
            weight.external_data.add(key=key, value=value)
    made = helper.make_graph(
        [helper.make_node(op, ["x", "w"], ["y"], domain=domain)],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])],
        [weight],
    )
    opsets = [helper.make_opsetid("", opset)]
    if domain:
        opsets.append(helper.make_opsetid(domain, 1))
    model: bytes = helper.make_model(made, opset_imports=opsets, ir_version=10).SerializeToString()
    return model


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a weights file in it, one above it, and a link to that."""
    folder = tmp_path / "model"
    folder.mkdir()
    SECRET.tofile(tmp_path / "secret.bin")
    SECRET.tofile(folder / "local.bin")
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize(
    "location", ["../secret.bin", "a/../../secret.bin", "local.bin", "link.bin", "./local.bin"]
)
def test_a_graph_reads_no_files(here: Path, location: str) -> None:
    with pytest.raises(SessionError, match="cannot load the graph"):
        open_session(graph(location), "cpu")


def test_nor_by_an_absolute_path(here: Path) -> None:
    with pytest.raises(SessionError, match="cannot load the graph"):
        open_session(graph(str(here.parent / "secret.bin")), "cpu")


def test_nor_for_a_tensor_inside_a_node(here: Path) -> None:
    model = onnx.load_from_string(graph())
    (weight,) = onnx.load_from_string(graph("local.bin")).graph.initializer
    del model.graph.initializer[:]
    model.graph.node.insert(0, helper.make_node("Constant", [], ["w"], value=weight))
    with pytest.raises(SessionError, match="a tensor inside of it lies in a file"):
        open_session(model.SerializeToString(), "cpu", weights={"w": SECRET})


def test_every_place_of_a_tensor_is_known() -> None:
    """The fields that lead to tensors, against all messages of the installed onnx."""
    model = onnx.ModelProto.DESCRIPTOR
    messages, reached = {model.name: model}, [model]
    while reached:
        for field in reached.pop().fields:
            inner = field.message_type
            if inner and inner.name not in messages:
                messages[inner.name] = inner
                reached.append(inner)
    leading = {"TensorProto"}
    while more := {
        name
        for name, message in messages.items()
        if name not in leading
        and any(f.message_type and f.message_type.name in leading for f in message.fields)
    }:
        leading |= more
    assert {
        name.removesuffix("Proto"): {
            field.number: field.message_type.name.removesuffix("Proto")
            for field in messages[name].fields
            if field.message_type and field.message_type.name in leading
        }
        for name in leading - {"TensorProto"}
    } == HOLDS


def wrapped(path: Sequence[int], contents: bytes) -> bytes:
    """A message inside of fields of these numbers, the outermost first."""
    for number in reversed(path):
        contents = varint(number << 3 | 2) + varint(len(contents)) + contents
    return contents


def varint(value: int) -> bytes:
    made = b""
    while value >= 0x80:
        made += bytes([value & 0x7F | 0x80])
        value >>= 7
    return made + bytes([value])


@pytest.mark.parametrize("tag", [5 << 3 | 2, 13 << 3 | 2, 14 << 3])
def test_tags_that_protocol_buffers_cut_short_are_refused(here: Path, tag: int) -> None:
    """A number of a field with bits above the 32 that a parser keeps."""
    honest = graph(str(here / "local.bin"))
    hidden = honest.replace(varint(tag), varint(tag + (1 << 32)), 1)
    assert hidden != honest
    with pytest.raises(SessionError, match="cannot load the graph"):
        open_session(hidden, "cpu")
    contents = varint(tag + (1 << 32)) + b"\x00"
    with pytest.raises(Malformed, match="a number that there is not"):
        tensors_in_files(wrapped([7, 5], contents))


def test_a_name_that_only_looks_like_a_given_one_is_refused(here: Path) -> None:
    model = graph(str(here / "local.bin")).replace(b"\x42\x01w", b"\x42\x02w\xff")
    with pytest.raises(SessionError, match="cannot load the graph"):
        open_session(model, "cpu", weights={"w\ufffd": SECRET})


def test_another_format_is_not_loaded(tmp_path: Path) -> None:
    """ONNX Runtime's own, which it recognises by four bytes and which is not walked."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "graph.ort")
    onnxruntime.InferenceSession(graph(), options, providers=["CPUExecutionProvider"])
    with pytest.raises(SessionError, match="cannot load the graph"):
        open_session((tmp_path / "graph.ort").read_bytes(), "cpu")


def test_a_graph_is_not_walked_without_end() -> None:
    nested = wrapped([1, 5, 6] * 1500, b"")
    with pytest.raises(SessionError, match="cannot load the graph"):
        open_session(wrapped([7], nested), "cpu")
    with pytest.raises(SessionError, match="1,000,000 fields"):
        open_session(wrapped([7], b"\x10\x00" * 1_000_001), "cpu")


@pytest.mark.parametrize(
    "garbage", [b"\xff" * 12, b"\x3b\x00", b"\x3a\x7f\x00", b"\x0a", b"\x02\x00"]
)
def test_what_is_no_model_is_refused(garbage: bytes) -> None:
    with pytest.raises(SessionError, match="cannot load the graph"):
        open_session(garbage, "cpu")


def test_external_data_must_be_given(here: Path) -> None:
    session = open_session(graph("anywhere.bin"), "cpu", weights={"w": SECRET})
    x = np.ones(4, np.float32)
    np.testing.assert_array_equal(session.run({"x": x})["y"], x + SECRET)


@pytest.mark.parametrize("key", ["__class__", "basepath", "raw_data", "location"])
def test_odd_keys_of_external_data_set_nothing(here: Path, key: str) -> None:
    with pytest.raises(SessionError, match="cannot load the graph"):
        open_session(graph("local.bin", [(key, "../secret.bin")]), "cpu")


def test_custom_operators_are_not_loaded() -> None:
    with pytest.raises(SessionError, match=r"unknown\.example"):
        open_session(graph(domain="unknown.example", op="Steal"), "cpu")


def test_an_opset_too_new_is_named() -> None:
    with pytest.raises(SessionError, match=r"(?i)opset"):
        open_session(graph(opset=99), "cpu")


@pytest.mark.parametrize("cut", [0, 1, 40, -1])
def test_a_damaged_graph_is_an_error(cut: int) -> None:
    with pytest.raises(SessionError, match="cannot load the graph"):
        open_session(graph()[:cut], "cpu")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle of this test's own."""
    return tiny.write_bundle(tmp_path / "bundle")


def replaced(bundle: Path, name: str, contents: bytes) -> None:
    """A file of a bundle with other contents, and the manifest's hash to match."""
    (bundle / name).write_bytes(contents)
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"][name] = vars(file_entry(contents))
    path.write_text(json.dumps(manifest))


def test_a_bundle_s_graph_reads_no_files(bundle: Path, here: Path) -> None:
    model = onnx.load_model_from_string((bundle / "screener.onnx").read_bytes())
    table = next(tensor for tensor in model.graph.initializer if tensor.name == "table")
    (here / "table.bin").write_bytes(table.raw_data)
    (bundle / "table.bin").write_bytes(table.raw_data)
    table.ClearField("raw_data")
    table.data_location = TensorProto.EXTERNAL
    table.external_data.add(key="location", value="table.bin")
    replaced(bundle, "screener.onnx", model.SerializeToString())
    with pytest.raises(SessionError, match="cannot load the graph"):
        lance_edge.load(bundle, device="cpu")


def test_a_bundle_holds_no_links(bundle: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.onnx"
    (bundle / "screener.onnx").rename(outside)
    (bundle / "screener.onnx").symlink_to(outside)
    with pytest.raises(BundleCorrupt, match="symbolic link"):
        lance_edge.load(bundle, device="cpu")


@pytest.mark.parametrize("name", ["../outside.onnx", "/etc/hostname", "a/b.onnx", ".."])
def test_a_manifest_names_plain_files_only(bundle: Path, name: str) -> None:
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"][name] = manifest["files"]["screener.onnx"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="not a plain file name"):
        open_bundle(bundle)


def test_loading_and_screening_open_no_socket(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    with lance_edge.load(bundle, device="cpu") as guard:
        assert guard.screen("the bomb").flagged == ("violence",)
