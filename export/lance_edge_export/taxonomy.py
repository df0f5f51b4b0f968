"""Titles and actions of a bundle's categories, as a file describes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lance_edge.bundle import MANIFEST, Bundle, file_entry, open_bundle
from lance_edge.errors import ExportError
from lance_edge.policy import STRENGTH
from lance_edge_export.pack import card, goldens_file, json_bytes

MAPPINGS = ("mlcommons", "openai")  # what else a category may have


def read_taxonomy(path: Path, found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The categories as a JSON file describes them, in their order. Raises ExportError."""
    contents = read_text(path)
    try:
        return with_taxonomy(found, json.loads(contents))
    except (ValueError, RecursionError) as error:
        raise ExportError(f"{path} is not valid JSON ({error})") from error
    except ExportError as error:
        raise ExportError(f"{path}: {error}") from error


def with_taxonomy(found: Sequence[dict[str, Any]], given: object) -> list[dict[str, Any]]:
    """The categories as `given` describes them, in their order; what it does not say stays.

    Raises ExportError.
    """
    keys = ("name", "title", "action")
    if not isinstance(given, list) or not all(
        isinstance(e, dict) and all(isinstance(e.get(k), str) for k in keys) for e in given
    ):
        raise ExportError(
            "a taxonomy is a list of objects, each with a name, a title and an action"
        )
    for entry in given:
        for key in entry.keys() - set(keys):
            if key not in MAPPINGS:
                raise ExportError(
                    f"a category has no {key}; it has {', '.join((*keys, *MAPPINGS))}"
                )
            if not isinstance(entry[key], list) or not all(isinstance(x, str) for x in entry[key]):
                raise ExportError(f"{key} of {entry['name']} must be a list of texts")
    if odd := sorted({entry["action"] for entry in given} - set(STRENGTH)):
        raise ExportError(f"a taxonomy's actions are {', '.join(STRENGTH)}, not {', '.join(odd)}")
    by_name = {entry["name"]: entry for entry in given}
    names = [entry["name"] for entry in found]
    if set(by_name) != set(names) or len(by_name) < len(given):
        raise ExportError(
            f"the taxonomy must describe these categories, each once: {', '.join(names)}"
        )
    return [{**entry, **by_name[entry["name"]]} for entry in found]


def taxonomy_of(bundle: Bundle) -> list[dict[str, Any]]:
    """A bundle's categories as its taxonomy file has them."""
    found: list[dict[str, Any]] = json.loads(bundle.read(bundle.manifest.taxonomy))
    return found


def describe_anew(folder: Path, taxonomy: list[dict[str, Any]]) -> None:
    """Give the bundle in a folder another taxonomy, and a card and goldens that agree with it."""
    opened = open_bundle(folder)
    manifest = opened.manifest
    calibration = json.loads(opened.read(manifest.calibration))
    prompts = [golden["prompt"] for golden in json.loads(opened.read(manifest.goldens))]
    _replace_files(
        folder,
        {
            manifest.taxonomy: json_bytes(taxonomy),
            "README.md": card(manifest, taxonomy, calibration),
        },
    )
    _replace_files(folder, {manifest.goldens: goldens_file(folder, prompts)})


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
