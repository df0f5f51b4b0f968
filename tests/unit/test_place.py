"""Folders that appear whole, and never in the place of somebody else's."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import tiny

from lance_edge.errors import InvalidOption
from lance_edge_export.place import (
    check_replaceable,
    is_bundle,
    is_repository,
    move_into_place,
    whole,
)

needs_locks = pytest.mark.skipif(sys.platform == "win32", reason="Windows locks no folders")


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


class Interrupted(KeyboardInterrupt):
    pass


def test_an_interruption_while_folders_are_moved_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, partial = tmp_path / "out", tmp_path / "partial"
    for folder, name in ((out, "kept"), (partial, "new")):
        folder.mkdir()
        (folder / name).touch()
    moves = Path.replace

    def replace(path: Path, target: Path) -> Path:
        if path == partial:
            raise Interrupted
        return moves(path, target)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(Interrupted):
        move_into_place(partial, out)
    assert names(out) == ["kept"]
    assert names(tmp_path) == ["out", "partial"]


def test_an_interruption_after_the_move_leaves_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, partial = tmp_path / "out", tmp_path / "partial"
    for folder, name in ((out, "old"), (partial, "new")):
        folder.mkdir()
        (folder / name).touch()
    moves = Path.replace

    def replace(path: Path, target: Path) -> Path:
        moved = moves(path, target)
        if path == partial:
            raise Interrupted
        return moved

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(Interrupted):
        move_into_place(partial, out)
    assert names(out) == ["new"]
    assert names(tmp_path) == ["out"]


@needs_locks
def test_only_what_nobody_works_on_is_removed(tmp_path: Path) -> None:
    """Of a process that was killed, and of a run that goes on beside."""
    out = tmp_path / "plans[1]"
    (tmp_path / ".plans1.partial-x").mkdir()  # the name is no pattern
    (tmp_path / ".plans[1].partial-killed").mkdir()
    with whole(out) as running:
        assert names(tmp_path) == [".plans1.partial-x", running.name]
        with whole(out) as beside:
            (beside / "second").touch()
        assert running.is_dir()
        (running / "first").touch()
    assert names(out) == ["first"]
    assert names(tmp_path) == [".plans1.partial-x", "plans[1]"]


@needs_locks
def test_what_was_set_aside_stays_if_it_is_all_there_is(tmp_path: Path) -> None:
    (tmp_path / ".out.old-killed").mkdir()
    with pytest.raises(Interrupted), whole(tmp_path / "out"):
        raise Interrupted
    assert names(tmp_path) == [".out.old-killed"]
    for _ in range(2):
        with whole(tmp_path / "out"):
            pass
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("holds", [[], ["theirs"]])
def test_a_new_folder_replaces_none_that_appeared_meanwhile(
    tmp_path: Path, holds: list[str]
) -> None:
    out = tmp_path / "out"
    refused = pytest.raises(InvalidOption, match="out exists; name another folder")
    with refused, whole(out, new=True) as partial:
        (partial / "ours").touch()
        out.mkdir()
        for name in holds:
            (out / name).touch()
    assert names(out) == holds
    assert names(tmp_path) == ["out"]


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
