"""A bundle of a few kilobytes whose verdicts can be worked out by hand.

Each known word adds a fixed amount to each category's latent mean; the mean starts at -4 and the
deviation is 1. The tokenizer splits at white space and punctuation and knows only WORDS.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from lance_edge.bundle import file_entry

CATEGORIES = ("violence", "privacy", "child")
ACTIONS = ("rewrite", "rewrite", "block")
BIAS, DEVIATION, THRESHOLD = -4.0, 1.0, 0.5

# word -> what it adds to each category
WORDS: dict[str, tuple[float, float, float]] = {
    "bomb": (8.0, 0.0, 0.0),
    "kill": (6.0, 0.0, 0.0),
    "spy": (0.0, 8.0, 0.0),
    "minor": (0.0, 0.0, 9.0),
    "safely": (-3.0, -3.0, -3.0),
    "hello": (0.0, 0.0, 0.0),
    "the": (0.1, 0.1, 0.1),
    "cake": (-1.0, -1.0, -1.0),
    "[": (0.0, 0.0, 0.0),
    "]": (0.0, 0.0, 0.0),
}
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


def tokenizer() -> Tokenizer:
    vocabulary = {word: index for index, word in enumerate((*SPECIAL, *WORDS))}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.add_special_tokens(list(SPECIAL))
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")],
    )
    return made


def graph() -> onnx.ModelProto:
    """ids, mask -> mean, deviation, contributions, by the table above."""
    table = np.array([(0.0,) * 3] * len(SPECIAL) + list(WORDS.values()), dtype=np.float32)
    rows_tokens, width = ["rows", "tokens"], len(CATEGORIES)
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["all"]),
        helper.make_node("Cast", ["mask"], ["kept"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["kept", "last"], ["column"]),
        helper.make_node("Mul", ["all", "column"], ["contributions"]),
        helper.make_node("ReduceSum", ["contributions", "middle"], ["sum"], keepdims=0),
        helper.make_node("Add", ["sum", "bias"], ["mean"]),
        helper.make_node("Mul", ["mean", "zero"], ["zeros"]),
        helper.make_node("Add", ["zeros", "one"], ["deviation"]),
    ]
    constants = {
        "table": table,
        "last": np.array([-1], dtype=np.int64),
        "middle": np.array([1], dtype=np.int64),
        "bias": np.full(width, BIAS, dtype=np.float32),
        "zero": np.zeros(1, dtype=np.float32),
        "one": np.full(1, DEVIATION, dtype=np.float32),
    }
    made = helper.make_graph(
        nodes,
        "tiny",
        [
            helper.make_tensor_value_info(name, TensorProto.INT64, rows_tokens)
            for name in ("ids", "mask")
        ],
        [
            helper.make_tensor_value_info("mean", TensorProto.FLOAT, ["rows", width]),
            helper.make_tensor_value_info("deviation", TensorProto.FLOAT, ["rows", width]),
            helper.make_tensor_value_info(
                "contributions", TensorProto.FLOAT, [*rows_tokens, width]
            ),
        ],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 17)]
    return helper.make_model(made, opset_imports=opsets, ir_version=8)


def severity_of(latent_mean: float) -> float:
    """sigmoid(mean / sqrt(1 + pi deviation^2 / 8)), written out."""
    return 1 / (1 + np.exp(-latent_mean / np.sqrt(1 + np.pi * DEVIATION**2 / 8)))


def write_bundle(
    folder: Path, window: int = 16, overlap: int = 4, changes: dict[str, Any] | None = None
) -> Path:
    """Write the tiny bundle; `changes` replace or add manifest keys."""
    folder.mkdir(parents=True, exist_ok=True)
    taxonomy = [
        {"name": name, "title": name.title(), "action": action, "mlcommons": ["S1"], "openai": []}
        for name, action in zip(CATEGORIES, ACTIONS, strict=True)
    ]
    calibration = {
        name: {"slope": 1.0, "intercept": 0.0, "threshold": THRESHOLD} for name in CATEGORIES
    }
    bomb = {"violence": severity_of(BIAS + 8), "privacy": severity_of(BIAS)}
    goldens = [
        {"prompt": "bomb", "decision": "rewrite", "severity": bomb},
        {"prompt": "minor", "decision": "block", "severity": {"child": severity_of(BIAS + 9)}},
    ]
    files = {
        "screener.onnx": graph().SerializeToString(),
        "tokenizer.json": tokenizer().to_str().encode(),
        "taxonomy.json": json.dumps(taxonomy).encode(),
        "calibration.json": json.dumps(calibration).encode(),
        "goldens.json": json.dumps(goldens).encode(),
    }
    for name, contents in files.items():
        (folder / name).write_bytes(contents)
    manifest = {
        "format": 1,
        "name": "tiny",
        "version": "1",
        "files": {name: asdict(file_entry(contents)) for name, contents in files.items()},
        "taxonomy": "taxonomy.json",
        "calibration": "calibration.json",
        "goldens": "goldens.json",
        "screener": {
            "graph": "screener.onnx",
            "tokenizer": "tokenizer.json",
            "precision": "fp32",
            "window": window,
            "overlap": overlap,
            "tolerance": 1e-5,
        },
        "parity": {},
        "provenance": {},
        **(changes or {}),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder
