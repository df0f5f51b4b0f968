"""A trained screener on disk: a Hugging Face encoder folder plus our head.

config.json, model.safetensors, tokenizer.json   the encoder
head.safetensors                                 pooling and prior
screener.json                                    head kind, window, provenance
taxonomy.json, calibration.json
"""

from __future__ import annotations

import inspect
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModel

from lance_edge_training.data import DataError
from lance_edge_training.model import Screener

# What a network may leave out: the pooler and the heads of pretraining, and tables of indices.
_PRETRAINING = r"pooler|cls|head|decoder|lm_head|\w+_predictions|generator_\w+|vocab_\w+|\w+_ids"
PRETRAINING = re.compile(rf"(^|\.)({_PRETRAINING})(\.|$)")
# An encoder, the heads of all tasks.
HEADS = re.compile(rf"(^|\.)({_PRETRAINING}|classifier|pre_classifier|qa_outputs)(\.|$)")


def new_screener(encoder: Path, categories: int, kind: str, attention: str = "sdpa") -> Screener:
    """A screener with a fresh head on a pretrained encoder. Raises DataError as `check_loaded` does."""
    return Screener(_load_encoder(encoder, attention), categories, kind)  # type: ignore[arg-type]


def save_screener(
    screener: Screener,
    folder: Path,
    tokenizer: Path,
    taxonomy: list[dict[str, Any]],
    description: dict[str, Any],
) -> None:
    """Write a trained screener; `description` holds window, overlap and provenance."""
    folder.mkdir(parents=True, exist_ok=True)
    screener.encoder.save_pretrained(folder)  # type: ignore[operator]
    save_file(screener.head.state_dict(), folder / "head.safetensors")
    shutil.copyfile(tokenizer, folder / "tokenizer.json")
    write_json(folder / "taxonomy.json", taxonomy)
    write_json(folder / "screener.json", {"head": screener.head.kind, **description})


def load_screener(folder: Path) -> tuple[Screener, dict[str, Any]]:
    """The screener in evaluation mode, and the contents of screener.json.

    Raises DataError if its weights are not those that config.json describes.
    """
    description = json.loads((folder / "screener.json").read_text())
    taxonomy = json.loads((folder / "taxonomy.json").read_text())
    # Eager attention: the exporter turns it into plain MatMul and Softmax nodes.
    screener = new_screener(folder, len(taxonomy), description["head"], attention="eager")
    screener.head.load_state_dict(load_file(folder / "head.safetensors"))
    return screener.eval(), description


@dataclass(frozen=True)
class EarlierRun:
    """What an earlier run left in its training.pt.

    origin    its settings and the step it reached
    networks  state dicts by name
    """

    origin: dict[str, Any]
    networks: dict[str, Any]


def earlier_run(path: Path, networks: Sequence[str]) -> EarlierRun:
    """The networks of these names. Raises DataError if the file is none of such a run."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        origin = {"settings": saved["settings"], "step": saved["step"]}
        found = {name: saved[name] for name in networks}
    except (OSError, KeyError, TypeError, RuntimeError, UnpicklingError) as error:
        raise DataError(f"{path} is not what such a run leaves: {error}") from error
    if lacking := [name for name, state in found.items() if not isinstance(state, dict)]:
        raise DataError(f"{path} is of another kind of run: it has no {', '.join(lacking)}")
    return EarlierRun(origin, found)


def interrupted_run(
    path: Path, device: str, settings: Any, started_from: dict[str, Any] | None
) -> dict[str, Any]:
    """What a run of these settings left in its training.pt. Raises DataError if it had others."""
    saved: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    if (saved["settings"], saved.get("started_from")) != (asdict(settings), started_from):
        raise DataError(
            f"{path} was written with other settings, rows or start; give them again, or remove it to "
            "start afresh"
        )
    return saved


def take_over(network: nn.Module, state: dict[str, Any], strict: bool = True) -> None:
    """Give a network the weights of an earlier run. Raises DataError if they do not fit."""
    try:
        network.load_state_dict(state, strict=strict)
    except RuntimeError as error:
        raise DataError(f"the earlier run's weights do not fit: {str(error)[:300]}") from error


def check_loaded(folder: Path, told: Mapping[str, Any], surplus: re.Pattern[str]) -> None:
    """Raise DataError if weights were missing, and so are random, or were left out.

    told     what transformers says of the loading
    surplus  names that may be left out: PRETRAINING or HEADS
    """
    if missing := sorted(told["missing_keys"]):
        raise DataError(
            f"{folder} has no weights for {', '.join(missing[:3])}; they would be random"
        )
    if odd := sorted(name for name in told["unexpected_keys"] if not surplus.search(name)):
        raise DataError(
            f"{folder} has weights for {', '.join(odd[:3])}, of which config.json says nothing"
        )


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _load_encoder(folder: Path, attention: str) -> Any:
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    config.attention_probs_dropout_prob = 0.0  # fused attention is slow with dropout
    config.reference_compile = False  # ModernBERT would compile itself
    kind: Any = AutoModel._model_mapping[type(config)]
    # Families that end in a pooler need none; the others know no such option.
    has_pooler = "add_pooling_layer" in inspect.signature(kind).parameters
    encoder, told = AutoModel.from_pretrained(
        folder,
        config=config,
        attn_implementation=attention if kind._supports_sdpa else "eager",
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
        **({"add_pooling_layer": False} if has_pooler else {}),
    )
    check_loaded(folder, told, HEADS)
    return encoder
