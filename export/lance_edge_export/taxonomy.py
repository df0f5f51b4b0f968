"""Titles and actions of a bundle's categories, as a file describes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lance_edge.bundle import MANIFEST, file_entry, open_bundle
from lance_edge.errors import ExportError
from lance_edge.pipeline import load
from lance_edge.policy import STRENGTH
from lance_edge_export.pack import card, goldens, json_bytes


def read_taxonomy(path: Path, found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The categories as a JSON file describes them, in their order. Raises ExportError."""
    try:
        given = json.loads(read_text(path))
    except ValueError as error:
        raise ExportError(f"{path} is not valid JSON ({error})") from error
    return with_taxonomy(found, given)


def with_taxonomy(found: Sequence[dict[str, Any]], given: object) -> list[dict[str, Any]]:
    """The categories as `given` describes them, in their order. Raises ExportError."""
    keys = ("name", "title", "action")
    if not isinstance(given, list) or not all(
        isinstance(e, dict) and all(isinstance(e.get(k), str) for k in keys) for e in given
    ):
        raise ExportError(
            "a taxonomy is a list of objects, each with a name, a title and an action"
        )
    if odd := sorted({entry["action"] for entry in given} - set(STRENGTH)):
        raise ExportError(f"a taxonomy's actions are {', '.join(STRENGTH)}, not {', '.join(odd)}")
    by_name = {entry["name"]: entry for entry in given}
    names = [entry["name"] for entry in found]
    if set(by_name) != set(names) or len(by_name) < len(given):
        raise ExportError(
            f"the taxonomy must describe these categories, each once: {', '.join(names)}"
        )
    return [by_name[name] for name in names]


def describe_anew(folder: Path, path: Path) -> None:
    """Give the bundle in a folder the taxonomy of a file, and a card and goldens that agree with it.

    Raises ExportError for a taxonomy of other categories.
    """
    opened = open_bundle(folder)
    manifest = opened.manifest
    taxonomy = read_taxonomy(path, json.loads(opened.read(manifest.taxonomy)))
    calibration = json.loads(opened.read(manifest.calibration))
    prompts = [golden["prompt"] for golden in json.loads(opened.read(manifest.goldens))]
    _replace_files(
        folder,
        {
            manifest.taxonomy: json_bytes(taxonomy),
            "README.md": card(manifest, taxonomy, calibration),
        },
    )
    with load(folder, device="cpu") as pipeline:
        kept = goldens(pipeline, prompts)
    _replace_files(folder, {manifest.goldens: json_bytes(kept)})


def read_text(path: Path) -> str:
    """Raises ExportError for a file that is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ExportError(f"{path} is not valid UTF-8 (byte {error.start + 1})") from error


def _replace_files(folder: Path, files: dict[str, bytes]) -> None:
    values = json.loads((folder / MANIFEST).read_bytes())
    for name, contents in files.items():
        (folder / name).write_bytes(contents)
        values["files"][name] = asdict(file_entry(contents))
    (folder / MANIFEST).write_bytes(json_bytes(values))
