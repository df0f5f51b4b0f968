"""Checkpoint folders that are not what they should be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lance_edge.errors import ExportError
from lance_edge_export.folder import read_config
from lance_edge_export.tensors import inside, weight_files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "checkpoint"
    made.mkdir()
    (made / "config.json").write_text('{"model_type": "bert"}')
    (made / "model.safetensors").write_bytes(b"")
    (made / "tokenizer.json").write_text("{}")
    return made


def test_a_whole_folder_is_read(folder: Path) -> None:
    (folder / "notes.txt").write_text("other files do no harm")
    assert read_config(folder) == {"model_type": "bert"}
    assert list(weight_files(folder)) == ["model.safetensors"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.json", r"config\.json is missing"),
        (
            "model.safetensors",
            r"has neither model\.safetensors nor model\.safetensors\.index\.json",
        ),
        ("tokenizer.json", r"has no tokenizer\.json; write one with .*save_pretrained"),
    ],
)
def test_a_missing_file_is_named(folder: Path, name: str, message: str) -> None:
    (folder / name).unlink()
    with pytest.raises(ExportError, match=message):
        read_config(folder)


def test_pickled_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    with pytest.raises(ExportError, match=r"weights in pytorch_model\.bin: pickled files can run"):
        read_config(folder)


def test_pickles_next_to_safetensors_are_left_alone(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    assert list(weight_files(folder)) == ["model.safetensors"]


@pytest.mark.parametrize("config", ["{", "[]", "{}", '{"model_type": 3}', "\xff"])
def test_a_config_that_says_nothing_is_refused(folder: Path, config: str) -> None:
    (folder / "config.json").write_bytes(config.encode("latin-1"))
    with pytest.raises(ExportError, match=r"config\.json"):
        read_config(folder)


def test_no_folder_at_all(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="is not a folder"):
        read_config(tmp_path / "nothing")


def shards(folder: Path, names: dict[str, str]) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_shards_are_found_and_missing_ones_named(folder: Path) -> None:
    shards(folder, {"b": "2.safetensors", "a": "1.safetensors", "c": "1.safetensors"})
    (folder / "1.safetensors").write_bytes(b"")
    with pytest.raises(ExportError, match=r"2\.safetensors is missing"):
        read_config(folder)
    (folder / "2.safetensors").write_bytes(b"")
    assert weight_files(folder) == {"2.safetensors": {"b"}, "1.safetensors": {"a", "c"}}
    assert read_config(folder)


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd"])
def test_an_index_may_not_lead_out_of_the_folder(folder: Path, name: str) -> None:
    (folder.parent / "other.safetensors").write_bytes(b"")
    shards(folder, {"a": name})
    with pytest.raises(ExportError, match="not a plain file name"):
        read_config(folder)


def test_an_index_that_names_nothing_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ExportError, match="has no weight_map"):
        weight_files(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_link_may_not_lead_out_of_the_folder(folder: Path, name: str) -> None:
    (folder / name).replace(folder.parent / name)
    (folder / name).symlink_to(folder.parent / name)
    with pytest.raises(ExportError, match="a link that leaves its folder"):
        read_config(folder)


def test_the_links_of_the_hugging_face_cache_are_followed(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    (blobs / "123").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/123")
    assert inside(snapshot, "config.json").read_text() == "{}"
    (tmp_path / "secret").write_text("")
    (snapshot / "tokenizer.json").symlink_to("../../secret")
    with pytest.raises(ExportError, match="leaves its folder"):
        inside(snapshot, "tokenizer.json")


def test_a_config_may_not_name_other_weights(folder: Path) -> None:
    config = {"model_type": "bert", "transformers_weights": "../outside/model.safetensors"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match=r"weights in '\.\./outside/model\.safetensors'"):
        read_config(folder)


def test_an_index_does_not_hide_the_whole_file(folder: Path) -> None:
    """transformers reads the whole file where there are both, so that is the one to check."""
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "1.safetensors"}}')
    (folder / "1.safetensors").write_bytes(b"")
    assert list(weight_files(folder)) == ["model.safetensors"]
