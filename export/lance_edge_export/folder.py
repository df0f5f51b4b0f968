"""A checkpoint folder as it was given: what is in it is checked before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lance_edge.errors import ExportError
from lance_edge_export.tensors import inside, read_json, refuse_other_weights, weight_files


def read_config(folder: Path) -> dict[str, Any]:
    """The contents of config.json, once the folder has all that a Hugging Face checkpoint needs.

    Raises ExportError for what is missing, what is pickled, and what leads out of the folder.
    """
    if not folder.is_dir():
        raise ExportError(f"{folder} is not a folder; give the folder that holds config.json")
    config = read_json(inside(folder, "config.json"))
    if not isinstance(config.get("model_type"), str):
        raise ExportError(f"{folder / 'config.json'} names no model_type")
    refuse_other_weights(config, folder)
    for name in weight_files(folder):
        inside(folder, name)
    if not (folder / "tokenizer.json").is_file():
        raise ExportError(
            f"{folder} has no tokenizer.json; write one with "
            f"`AutoTokenizer.from_pretrained(...).save_pretrained({str(folder)!r})`"
        )
    inside(folder, "tokenizer.json")
    return config
