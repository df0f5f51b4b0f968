"""What `open_bundle` refuses, and that its errors name the file and say what to do."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx
import pytest
import tiny
from onnx import numpy_helper

import lance_edge
from lance_edge.bundle import file_entry, open_bundle
from lance_edge.errors import BundleCorrupt, BundleError, BundleFileMissing

FILES = (
    "screener.onnx",
    "tokenizer.json",
    "taxonomy.json",
    "calibration.json",
    "goldens.json",
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny bundle of the test's own."""
    return tiny.write_bundle(tmp_path / "own")


def check_all(folder: Path) -> None:
    open_bundle(folder).verify()


def replace(folder: Path, name: str, contents: bytes) -> None:
    """Other contents for a file, and the manifest's entry with them."""
    (folder / name).write_bytes(contents)

    def change(manifest: dict[str, Any]) -> None:
        manifest["files"][name] = asdict(file_entry(contents))

    edit_manifest(folder, change)


def edit(folder: Path, name: str, change: Callable[[Any], None]) -> None:
    """Change a JSON file, and the manifest's entry with it."""
    values = json.loads((folder / name).read_bytes())
    change(values)
    replace(folder, name, json.dumps(values).encode())


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "manifest.json"
    values = json.loads(path.read_bytes())
    change(values)
    path.write_text(json.dumps(values), encoding="utf-8")


def refusal(folder: Path, kind: type[BundleError] = BundleError) -> str:
    """What `open_bundle` says when it refuses."""
    with pytest.raises(BundleError) as caught:
        open_bundle(folder)
    assert type(caught.value) is kind
    return str(caught.value)


# A bundle that is whole


def test_an_opened_bundle_holds_what_the_files_say(folder: Path) -> None:
    bundle = open_bundle(str(folder))
    assert bundle.path == folder
    assert bundle.sha256 == hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
    assert (bundle.manifest.name, bundle.manifest.screener.window) == ("tiny", 16)
    assert [category.name for category in bundle.categories] == list(tiny.CATEGORIES)
    assert [category.action for category in bundle.categories] == list(tiny.ACTIONS)
    assert bundle.categories[0].mlcommons == ("S1",)
    assert {name: item.threshold for name, item in bundle.calibration.items()} == dict.fromkeys(
        tiny.CATEGORIES, tiny.THRESHOLD
    )


def test_verify_names_every_file(folder: Path) -> None:
    assert open_bundle(folder).verify() == list(FILES)


def test_files_that_the_manifest_does_not_name_are_ignored(folder: Path) -> None:
    (folder / "README").write_text("ours", encoding="utf-8")
    assert "README" not in open_bundle(folder).verify()


# Files


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(BundleFileMissing) as caught:
        check_all(folder)
    assert str(caught.value).startswith(f"{folder / name} is missing; copy the whole bundle again")
    assert isinstance(caught.value, FileNotFoundError)


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_named(folder: Path, name: str) -> None:
    contents = (folder / name).read_bytes()
    (folder / name).write_bytes(contents[:-1])
    with pytest.raises(BundleCorrupt) as caught:
        check_all(folder)
    assert str(caught.value).startswith(
        f"{folder / name} has {len(contents) - 1} bytes and the manifest says {len(contents)}"
    )


@pytest.mark.parametrize("name", FILES)
def test_an_edited_file_of_the_same_length_is_named(folder: Path, name: str) -> None:
    contents = bytearray((folder / name).read_bytes())
    contents[len(contents) // 2] ^= 1
    (folder / name).write_bytes(contents)
    with pytest.raises(BundleCorrupt) as caught:
        check_all(folder)
    assert str(caught.value).startswith(
        f"{folder / name} does not have the SHA-256 that the manifest says"
    )


@pytest.mark.parametrize("name", FILES)
def test_a_symbolic_link_is_refused(folder: Path, name: str) -> None:
    """Even one to the right contents: they could change between two reads."""
    (folder / name).rename(folder.parent / name)
    (folder / name).symlink_to(folder.parent / name)
    with pytest.raises(BundleCorrupt) as caught:
        check_all(folder)
    assert str(caught.value).startswith(f"{folder / name} is a symbolic link")


@pytest.mark.parametrize("name", ["screener.onnx", "tokenizer.json"])
def test_load_reads_no_unverified_file(folder: Path, name: str) -> None:
    (folder / name).write_bytes((folder / name).read_bytes() + b" ")
    with pytest.raises(BundleCorrupt, match=name):
        lance_edge.load(folder)


def test_a_file_edited_after_opening_is_refused(folder: Path) -> None:
    bundle = open_bundle(folder)
    (folder / "goldens.json").write_bytes(b"[]")
    with pytest.raises(BundleCorrupt, match=r"goldens\.json has 2 bytes"):
        bundle.read("goldens.json")


def test_only_named_files_can_be_read(folder: Path) -> None:
    (folder / "extra.json").write_bytes(b"{}")
    with pytest.raises(BundleError, match=r"names extra\.json but has no hash for it"):
        open_bundle(folder).read("extra.json")


# The manifest


def test_a_folder_without_manifest_is_no_bundle(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        assert refusal(path, BundleFileMissing).startswith(f"{path / 'manifest.json'} is missing")


@pytest.mark.parametrize(
    "contents",
    [b"", b'{"format": 1', b"\xff\xfe{}", b"PK\x03\x04", b"[" * 100_000],
    ids=["empty", "cut", "utf16", "zip", "nested"],
)
def test_a_manifest_that_is_not_json_is_corrupt(folder: Path, contents: bytes) -> None:
    (folder / "manifest.json").write_bytes(contents)
    message = refusal(folder, BundleCorrupt)
    assert message.startswith(f"{folder / 'manifest.json'} is not valid JSON")


def test_a_manifest_is_an_object(folder: Path) -> None:
    (folder / "manifest.json").write_bytes(b"[1]")
    assert "manifest.json holds a list, not a dict" in refusal(folder, BundleCorrupt)


@pytest.mark.parametrize(
    ("found", "remedy"),
    [
        (2, "install a newer lance-edge"),
        (0, "export the bundle again"),
        ("1", "export the bundle again"),
        (None, "export the bundle again"),
    ],
)
def test_other_formats_are_refused_with_a_remedy(folder: Path, found: object, remedy: str) -> None:
    edit_manifest(folder, lambda manifest: manifest.update(format=found))
    assert refusal(folder).endswith(
        f"manifest.json has bundle format {found!r} and this version reads 1; {remedy}"
    )


def test_a_manifest_without_format_is_refused(folder: Path) -> None:
    edit_manifest(folder, lambda manifest: manifest.pop("format"))
    assert "has bundle format None and this version reads 1" in refusal(folder)


def test_a_newer_format_is_named_before_its_new_keys(folder: Path) -> None:
    edit_manifest(folder, lambda manifest: manifest.update(format=2, decoder={}))
    assert refusal(folder).endswith("install a newer lance-edge")


@pytest.mark.parametrize(
    ("change", "keys"),
    [
        (lambda manifest: manifest.update(surprise=1, another=2), "another, surprise"),
        (lambda manifest: manifest["screener"].update(surprise=1), "surprise"),
        (lambda manifest: manifest["files"]["goldens.json"].update(md5="0"), "md5"),
    ],
    ids=["manifest", "screener", "file"],
)
def test_unknown_keys_are_refused(
    folder: Path, change: Callable[[dict[str, Any]], None], keys: str
) -> None:
    edit_manifest(folder, change)
    assert refusal(folder).endswith(f" has keys this version does not know: {keys}")


@pytest.mark.parametrize(
    ("owner", "key"),
    [
        ("manifest", "name"),
        ("manifest", "taxonomy"),
        ("manifest", "files"),
        ("manifest", "screener"),
        ("screener", "tolerance"),
        ("screener", "graph"),
    ],
)
def test_missing_keys_are_named(folder: Path, owner: str, key: str) -> None:
    def change(manifest: dict[str, Any]) -> None:
        del (manifest if owner == "manifest" else manifest[owner])[key]

    edit_manifest(folder, change)
    message = refusal(folder)
    assert "manifest.json" in message
    assert message.endswith((f"has no '{key}'", f" lacks {key}"))


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/passwd", "deep/x", "./x", "x/..", "..", "."],
)
def test_file_names_that_leave_the_folder_are_refused(folder: Path, name: str) -> None:
    def change(manifest: dict[str, Any]) -> None:
        manifest["files"][name] = manifest["files"]["goldens.json"]

    edit_manifest(folder, change)
    assert refusal(folder).endswith(f"manifest.json names {name!r}, which is not a plain file name")


@pytest.mark.parametrize("key", ["taxonomy", "calibration"])
def test_a_part_without_hash_is_refused(folder: Path, key: str) -> None:
    (folder.parent / "x.json").write_bytes((folder / f"{key}.json").read_bytes())
    edit_manifest(folder, lambda manifest: manifest.update({key: "../x.json"}))
    assert "manifest.json names ../x.json but has no hash for it" in refusal(folder)


@pytest.mark.parametrize("key", ["graph", "tokenizer"])
def test_load_needs_a_hash_for_what_it_runs(folder: Path, key: str) -> None:
    edit_manifest(folder, lambda manifest: manifest["screener"].update({key: "other.bin"}))
    with pytest.raises(BundleError, match=r"names other\.bin but has no hash for it"):
        lance_edge.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"precision": "int4"}, "precision 'int4' is not one of fp32, fp16, int8"),
        ({"overlap": 14}, "an overlap of 14 does not fit a window of 16"),
        ({"overlap": -1}, "an overlap of -1 does not fit a window of 16"),
        ({"window": 2, "overlap": 0}, "an overlap of 0 does not fit a window of 2"),
        ({"window": "16"}, "window must be a whole number, not '16'"),
        ({"window": None}, "window must be a whole number, not None"),
        ({"window": 16.5}, "window must be a whole number, not 16.5"),
        ({"tolerance": "1e-5"}, "tolerance must be a number, not '1e-5'"),
    ],
    ids=str,
)
def test_screener_settings_are_checked(folder: Path, change: dict[str, Any], message: str) -> None:
    edit_manifest(folder, lambda manifest: manifest["screener"].update(change))
    assert message in refusal(folder)


@pytest.mark.parametrize("value", [5, ["taxonomy.json"]], ids=str)
@pytest.mark.parametrize("key", ["taxonomy", "calibration"])
def test_parts_are_named_by_strings(folder: Path, key: str, value: object) -> None:
    edit_manifest(folder, lambda manifest: manifest.update({key: value}))
    assert "manifest.json" in refusal(folder)


@pytest.mark.parametrize("entry", [None, "0" * 64, [], {"sha256": "0" * 64}], ids=str)
def test_file_entries_are_checked(folder: Path, entry: object) -> None:
    def change(manifest: dict[str, Any]) -> None:
        manifest["files"]["goldens.json"] = entry

    edit_manifest(folder, change)
    assert "files.goldens.json: FileEntry" in refusal(folder)


# Taxonomy and calibration


@pytest.mark.parametrize("name", ["taxonomy.json", "calibration.json"])
def test_broken_json_with_the_right_hash_is_corrupt(folder: Path, name: str) -> None:
    replace(folder, name, b'{"a": ')
    assert refusal(folder, BundleCorrupt).startswith(f"{folder / name} is not valid JSON")


def test_taxonomy_is_a_list_and_calibration_an_object(folder: Path) -> None:
    calibration = (folder / "calibration.json").read_bytes()
    replace(folder, "calibration.json", b"[]")
    assert "calibration.json holds a list, not a dict" in refusal(folder, BundleCorrupt)
    replace(folder, "calibration.json", calibration)
    replace(folder, "taxonomy.json", b"{}")
    assert "taxonomy.json holds a dict, not a list" in refusal(folder, BundleCorrupt)


def test_taxonomy_and_calibration_must_agree(folder: Path) -> None:
    def rename(calibration: dict[str, Any]) -> None:
        calibration["violance"] = calibration.pop("violence")

    edit(folder, "calibration.json", rename)
    assert refusal(folder) == (f"taxonomy and calibration of {folder} differ in violance, violence")


@pytest.mark.parametrize(
    "change",
    [lambda taxonomy: taxonomy.append(taxonomy[0]), lambda taxonomy: taxonomy.clear()],
    ids=["twice", "none"],
)
def test_each_category_is_named_once(
    folder: Path, change: Callable[[list[dict[str, Any]]], None]
) -> None:
    edit(folder, "taxonomy.json", change)
    assert refusal(folder) == (
        f"{folder / 'taxonomy.json'} must name at least one category, each once"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "none"}, "a category may not be called `none`"),
        (
            {"action": "shrug"},
            "action must be one of allow, advise, rewrite, review, block, not 'shrug'",
        ),
        ({"action": ["block"]}, "action must be one of"),
        ({"colour": "red"}, "taxonomy.json has keys this version does not know: colour"),
        ({"name": 5}, "taxonomy.json"),
        ({"mlcommons": "S1"}, "taxonomy.json"),
    ],
    ids=str,
)
def test_categories_are_checked(folder: Path, change: dict[str, Any], message: str) -> None:
    edit(folder, "taxonomy.json", lambda taxonomy: taxonomy[0].update(change))
    assert message in refusal(folder)


@pytest.mark.parametrize("entry", ["violence", 5, None, ["name"]], ids=str)
def test_a_category_is_an_object(folder: Path, entry: object) -> None:
    edit(folder, "taxonomy.json", lambda taxonomy: taxonomy.append(entry))
    assert "taxonomy.json: Category must be an object" in refusal(folder)


NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slope": 0}, "a finite slope above 0 and a finite intercept, not 0"),
        ({"slope": -1.0}, "a finite slope above 0 and a finite intercept, not -1.0"),
        ({"slope": NAN}, "a finite slope above 0 and a finite intercept, not nan"),
        ({"slope": INFINITY}, "slope"),
        ({"slope": "1"}, "slope must be a number, not '1'"),
        ({"intercept": NAN}, "intercept"),
        ({"intercept": INFINITY}, "intercept"),
        ({"intercept": "0"}, "intercept must be a number, not '0'"),
        ({"threshold": 0}, "a threshold must be between 0 and 1, not 0"),
        ({"threshold": 1}, "a threshold must be between 0 and 1, not 1"),
        ({"threshold": NAN}, "a threshold must be between 0 and 1, not nan"),
        ({"threshold": None}, "threshold must be a number, not None"),
        ({"bias": 1}, "calibration.json has keys this version does not know: bias"),
    ],
    ids=str,
)
def test_calibrations_are_checked(folder: Path, change: dict[str, Any], message: str) -> None:
    """Severities that are not a number are below every threshold: they would allow all."""
    edit(folder, "calibration.json", lambda calibration: calibration["privacy"].update(change))
    assert message in refusal(folder)


# What is behind a right hash, and only `load` can see


def with_graph(folder: Path, graph: onnx.ModelProto) -> None:
    replace(folder, "screener.onnx", graph.SerializeToString())


def test_a_graph_with_other_outputs_is_refused(folder: Path) -> None:
    graph = tiny.graph()
    del graph.graph.output[1]  # deviation
    with_graph(folder, graph)
    with pytest.raises(BundleError) as caught:
        lance_edge.load(folder, device="cpu")
    assert str(caught.value) == (
        "the screener's graph has outputs ['contributions', 'mean'], "
        "not mean, deviation and contributions"
    )


def test_a_graph_of_other_categories_is_refused(folder: Path) -> None:
    graph = tiny.graph()
    for tensor in graph.graph.initializer:
        if tensor.name in ("table", "bias"):
            narrow = numpy_helper.to_array(tensor)[..., :2]
            tensor.CopyFrom(numpy_helper.from_array(narrow, tensor.name))
    for output in graph.graph.output:
        output.type.tensor_type.shape.dim[-1].dim_value = 2
    with_graph(folder, graph)
    with pytest.raises(BundleError) as caught:
        lance_edge.load(folder, device="cpu")
    assert str(caught.value) == "the screener's graph knows 2 categories and the taxonomy 3"


def test_a_graph_that_is_none_is_refused(folder: Path) -> None:
    replace(folder, "screener.onnx", b"no graph")
    with pytest.raises(RuntimeError, match="cannot load the graph"):
        lance_edge.load(folder, device="cpu")


@pytest.mark.parametrize("contents", [b"{}", b"no JSON", b"\xff"], ids=ascii)
def test_a_tokenizer_that_is_none_is_refused(folder: Path, contents: bytes) -> None:
    replace(folder, "tokenizer.json", contents)
    with pytest.raises(BundleError, match=r"tokenizer"):
        lance_edge.load(folder, device="cpu")
