"""Folders that appear whole, and never in the place of somebody else's."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny

from lance_edge.errors import InvalidOption
from lance_edge_export.place import check_replaceable, is_bundle, is_repository, whole


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_takes_the_place_of_the_old_one_when_it_is_whole(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    for text in ("first", "second"):
        with whole(out) as partial:
            (partial / text).write_text(text)
            assert partial.parent == out.parent
        assert names(out) == [text]
    assert names(out.parent) == ["out"]


def test_an_error_leaves_the_old_one(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "kept").touch()

    def write() -> None:
        with whole(out) as partial:
            (partial / "new").touch()
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        write()
    assert names(tmp_path) == ["out"]
    assert names(out) == ["kept"]


def test_neighbours_with_similar_names_stay(tmp_path: Path) -> None:
    for name in ("out.old", "out.partial", ".out", ".other.partial-1"):
        (tmp_path / name).mkdir()
    with whole(tmp_path / "out") as partial:
        (partial / "new").touch()
    assert names(tmp_path) == [".other.partial-1", ".out", "out", "out.old", "out.partial"]


def test_a_bundle_is_known_by_what_its_manifest_names(tmp_path: Path) -> None:
    bundle = tiny.write_bundle(tmp_path / "bundle")
    assert is_bundle(bundle)
    (bundle / "bundle.sig").touch()
    assert is_bundle(bundle)
    (bundle / "notes.txt").touch()
    assert not is_bundle(bundle)
    for contents in ("{}", '{"files": 3, "format": 1}', "no JSON"):
        site = tmp_path / "site"
        site.mkdir(exist_ok=True)
        (site / "manifest.json").write_text(contents)
        assert not is_bundle(site)


def test_a_repository_holds_what_pack_writes_alone(tmp_path: Path) -> None:
    models = ("screener", "pipeline")
    for name in ("screener/1/model.onnx", "pipeline/config.pbtxt", "pipeline/1/bundle/a.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert is_repository(tmp_path, models)
    assert not is_repository(tmp_path, models[:1])
    (tmp_path / "pipeline/1/policy.json").touch()  # an operator's own
    assert not is_repository(tmp_path, models)


def test_only_what_is_ours_is_replaced(tmp_path: Path) -> None:
    check_replaceable(tmp_path / "new", False, "a bundle")
    check_replaceable(tmp_path, False, "a bundle")  # an empty folder
    (tmp_path / "thesis.txt").touch()
    check_replaceable(tmp_path, True, "a bundle")
    for place in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(InvalidOption, match="something else than a bundle; name a new folder"):
            check_replaceable(place, False, "a bundle")
