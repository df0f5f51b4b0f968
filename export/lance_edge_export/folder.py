"""A checkpoint folder as it was given: what is in it is checked before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lance_edge.errors import ExportError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")


def read_config(folder: Path) -> dict[str, Any]:
    """The contents of config.json, once the folder has all that a Hugging Face checkpoint needs.

    Raises ExportError for what is missing, what is pickled, and what leads out of the folder.
    """
    if not folder.is_dir():
        raise ExportError(f"{folder} is not a folder; give the folder that holds config.json")
    config = read_json(folder, "config.json")
    if not isinstance(config.get("model_type"), str):
        raise ExportError(f"{folder / 'config.json'} names no model_type")
    weight_files(folder)
    if not (folder / "tokenizer.json").is_file():
        raise ExportError(
            f"{folder} has no tokenizer.json; write one with "
            f"`AutoTokenizer.from_pretrained(...).save_pretrained({str(folder)!r})`"
        )
    within(folder, "tokenizer.json")
    return config


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, in the order of their names."""
    if (folder / WEIGHTS).is_file():
        return [within(folder, WEIGHTS)]
    if (folder / INDEX).is_file():
        shards = read_json(folder, INDEX).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise ExportError(f"{folder / INDEX} names no weights")
        names = sorted({str(name) for name in shards.values()})
        if missing := [name for name in names if not within(folder, name).is_file()]:
            raise ExportError(f"{folder} lacks {', '.join(missing)}; download the checkpoint again")
        return [within(folder, name) for name in names]
    pickled = sorted(path.name for pattern in PICKLED for path in folder.glob(pattern))
    if pickled:
        raise ExportError(
            f"{folder} has its weights in {pickled[0]}, a pickle, which can run code when it is "
            "loaded; save them as safetensors (`save_pretrained(..., safe_serialization=True)`)"
        )
    raise ExportError(f"{folder} has no {WEIGHTS}")


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object in the folder. Raises ExportError."""
    path = within(folder, name)
    if not path.is_file():
        raise ExportError(f"{folder} has no {name}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ExportError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise ExportError(f"{path} holds a {type(value).__name__}, not an object")
    return value


def within(folder: Path, name: str) -> Path:
    """A file of the folder. Raises ExportError if its name, or a link, leads elsewhere.

    In the Hugging Face cache a checkpoint's files are links into the `blobs` folder next to it;
    those may be followed.
    """
    path = folder / name
    home = folder.resolve()
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    if not any(path.resolve().is_relative_to(place) for place in allowed):
        raise ExportError(f"{path} leads out of the checkpoint's folder; copy the file into it")
    return path
