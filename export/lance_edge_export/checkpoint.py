"""What a screener's checkpoint holds: one of ours, or any sequence classifier of Hugging Face's.

Both become the same thing: a network that gives per category a latent mean and deviation and what
each token adds to it, with its tokenizer, taxonomy and calibration.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from lance_edge.bundle import Calibration
from lance_edge.errors import ExportError, LanceError
from lance_edge.screener import PAD_MULTIPLE
from lance_edge_export.folder import read_config
from lance_edge_export.tensors import check_vocabulary, inside
from lance_edge_training.checkpoint import PRETRAINING, check_loaded, load_screener
from lance_edge_training.data import DataError
from lance_edge_training.model import Served

# Encoders whose graphs are compared with torch in tests, by their config's model_type.
ENCODERS = ("bert", "deberta-v2", "distilbert", "electra", "modernbert", "roberta", "xlm-roberta")

BENIGN = ("safe", "benign", "neutral", "none", "normal", "harmless", "ok")  # labels of no category
LONGEST_WINDOW = 512  # tokens
OVERLAP = 4  # a window's share that neighbours have in common is 1 / OVERLAP
MOST_BYTES = 2**31  # of a protocol buffer
NEUTRAL = Calibration(slope=1.0, intercept=0.0, threshold=0.5)


@dataclass(frozen=True)
class Checkpoint:
    """A screener to export.

    network  (ids, mask) [B, T] -> mean, deviation [B, C], contributions [B, T, C]
    window   tokens it reads at once, and `overlap` what neighbouring windows share
    """

    network: nn.Module
    tokenizer: bytes
    window: int
    overlap: int
    taxonomy: list[dict[str, Any]]
    calibration: list[Calibration]
    provenance: dict[str, Any]


def read_checkpoint(
    folder: Path, benign: Sequence[str] = (), window: int | None = None
) -> Checkpoint:
    """The screener in a folder; which kind it is follows from its files.

    benign  a classifier's labels that stand for no category
    window  tokens it reads at once, in place of what the checkpoint says

    Raises ExportError, which names what the folder lacks or what is not supported.
    """
    config = read_config(folder)
    if config["model_type"] not in ENCODERS:
        raise ExportError(
            f"{folder} is a {config['model_type']!r} and the encoders that can be exported are "
            f"{', '.join(ENCODERS)}"
        )
    if config.get("quantization_config"):
        raise ExportError(f"{folder} is quantised; export the checkpoint it was made from")
    classes = config.get("architectures") or ["an unnamed model"]
    ours = (folder / "screener.json").is_file()
    if not ours and not str(classes[0]).endswith("ForSequenceClassification"):
        raise ExportError(
            f"{folder} holds {classes[0]}: neither a screener of `lance_edge_training` (it has no "
            "screener.json) nor a ...ForSequenceClassification"
        )
    try:
        found = _ours(folder, window) if ours else _classifier(folder, benign, window)
        check_network(folder, found, int(config.get("vocab_size", 0)))
    except LanceError:
        raise
    except DataError as error:
        raise ExportError(str(error)) from error
    except Exception as error:  # what torch, transformers and safetensors say of damaged files
        raise ExportError(
            f"{folder} cannot be read ({type(error).__name__}: {error}); copy the checkpoint again, or "
            "save it anew"
        ) from error
    return found


def check_network(folder: Path, found: Checkpoint, vocabulary: int) -> None:
    """Raise ExportError for weights that are not finite or too many, and a tokenizer of another network."""
    weights = dict(found.network.named_parameters())
    for name, values in weights.items():
        if not torch.isfinite(values).all():
            raise ExportError(
                f"{name} in {folder} holds a value that is not finite; such a network computes "
                "nothing, train or convert it again"
            )
    size = sum(4 * values.numel() for values in weights.values())
    if size >= MOST_BYTES:
        raise ExportError(
            f"{folder} has {size / 2**30:.1f} GiB of weights in fp32, and an ONNX file holds less than 2"
        )
    tokens = Tokenizer.from_buffer(found.tokenizer).get_vocab(with_added_tokens=True)
    if vocabulary:
        check_vocabulary(folder / "tokenizer.json", max(tokens.values(), default=0), vocabulary)


class ClassifierGraph(nn.Module):
    """A sequence classifier as a screener: logits as means, no deviation, no contributions.

    single  whether its labels exclude each other: then a label's mean is its logit less the
            logsumexp of the others', so that sigmoid gives what softmax did
    kept    indices of the labels that are categories
    """

    def __init__(
        self, classifier: nn.Module, labels: int, kept: Sequence[int], single: bool
    ) -> None:
        super().__init__()
        self.classifier = classifier
        self.single = single
        self.register_buffer("itself", torch.eye(labels) * -1e9)
        self.register_buffer("kept", torch.tensor(kept))

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean = self.classifier(input_ids=ids, attention_mask=mask).logits
        if self.single:
            mean = mean - (mean.unsqueeze(1) + self.itself).logsumexp(-1)
        mean = mean.index_select(1, self.kept)
        nothing = torch.zeros_like(mean)
        return mean, nothing, mask.unsqueeze(-1) * nothing.unsqueeze(1)


def _ours(folder: Path, window: int | None) -> Checkpoint:
    for name, remedy in (
        ("screener.json", "train the screener again"),
        ("head.safetensors", "train the screener again"),
        ("taxonomy.json", "train the screener again"),
        ("calibration.json", "run `python -m lance_edge_training.calibrate`"),
    ):
        if not (folder / name).is_file():
            raise ExportError(f"{folder} has no {name}; {remedy}")
        inside(folder, name)
    screener, description = load_screener(folder)
    taxonomy = json.loads((folder / "taxonomy.json").read_text(encoding="utf-8"))
    values = json.loads((folder / "calibration.json").read_text(encoding="utf-8"))
    if lacking := [entry["name"] for entry in taxonomy if entry["name"] not in values]:
        raise ExportError(
            f"{folder / 'calibration.json'} lacks {', '.join(lacking)}; "
            "run `python -m lance_edge_training.calibrate` again"
        )
    window = _fitting(window or description["window"], screener.encoder.config)
    return Checkpoint(
        Served(screener).eval(),
        (folder / "tokenizer.json").read_bytes(),
        window,
        min(description["overlap"], window // OVERLAP),
        taxonomy,
        [Calibration(**values[entry["name"]]) for entry in taxonomy],
        description["provenance"],
    )


def _classifier(folder: Path, benign: Sequence[str], window: int | None) -> Checkpoint:
    config: Any = AutoConfig.from_pretrained(folder, local_files_only=True)
    config.reference_compile = False  # ModernBERT would compile itself
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network, told = AutoModelForSequenceClassification.from_pretrained(
            folder,
            config=config,
            attn_implementation="eager",
            use_safetensors=True,
            local_files_only=True,
            dtype=torch.float32,
            output_loading_info=True,
        )
    check_loaded(folder, told, PRETRAINING)
    if sorted(config.id2label) != list(range(config.num_labels)):
        raise ExportError(
            f"{folder / 'config.json'}: id2label must number the labels from 0 to {config.num_labels - 1}"
        )
    labels = [str(config.id2label[index]) for index in range(config.num_labels)]
    if config.problem_type == "regression":
        raise ExportError(f"{folder} is a regression: it has a value, and no categories")
    single = config.problem_type != "multi_label_classification" and len(labels) > 1
    kept = categories_among(labels, benign, single)
    names = [slug(labels[index]) for index in kept]
    if len(set(names)) < len(names) or "none" in names:
        raise ExportError(f"{folder}: the labels {', '.join(labels)} make no distinct names")
    window = _fitting(window or LONGEST_WINDOW, config, cut=window is None)
    return Checkpoint(
        ClassifierGraph(network, len(labels), kept, single).eval(),
        (folder / "tokenizer.json").read_bytes(),
        window,
        window // OVERLAP,
        [
            {"name": name, "title": labels[index], "action": "block"}
            for name, index in zip(names, kept, strict=True)
        ],
        [NEUTRAL] * len(kept),
        {"classifier": str(config.architectures[0]), "labels": labels},
    )


def categories_among(labels: Sequence[str], benign: Sequence[str], single: bool) -> list[int]:
    """The indices of the labels that are categories, not the name of "nothing is wrong".

    Raises ExportError if labels exclude each other and none is known to be benign.
    """
    if unknown := sorted(set(benign) - set(labels)):
        raise ExportError(
            f"there is no label {unknown[0]!r} to be benign; there are {', '.join(labels)}"
        )
    harmless = set(benign) or {label for label in labels if label.casefold() in BENIGN}
    if single and not harmless:
        raise ExportError(
            f"of the labels {', '.join(labels)} one must stand for a harmless prompt; "
            "name it with --benign"
        )
    kept = [index for index, label in enumerate(labels) if label not in harmless]
    if not kept:
        raise ExportError(f"all labels are benign: {', '.join(labels)}")
    return kept


def slug(label: str) -> str:
    """A label as a category's name: "Sexual/Minors" -> "sexual_minors"."""
    return re.sub(r"[^a-z0-9]+", "_", label.casefold()).strip("_") or "label"


def _fitting(window: int, config: Any, cut: bool = False) -> int:
    """The window, if the encoder has a position for each of its tokens; with `cut`, the longest that
    it has. Raises ExportError."""
    reserved = config.pad_token_id + 1 if "roberta" in config.model_type else 0
    positions = (int(config.max_position_embeddings) - reserved) // PAD_MULTIPLE * PAD_MULTIPLE
    if window > positions and not cut:
        raise ExportError(f"a window of {window} tokens does not fit an encoder for {positions}")
    return min(window, positions)
