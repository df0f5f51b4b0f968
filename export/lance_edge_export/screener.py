"""A trained screener to a bundle: torch -> fp32 ONNX -> int8, each stage compared with the one before."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from lance_edge.bundle import Calibration, ScreenerSpec
from lance_edge.errors import ExportError
from lance_edge.screener import pad
from lance_edge.tokenizer import Tokenizer, Window
from lance_edge_engines import open_session
from lance_edge_export.optimise import merge_projections
from lance_edge_export.pack import write_bundle
from lance_edge_export.parity import BOUNDS, compare, gate, severities
from lance_edge_export.quantise import Feed, row_wise_int8
from lance_edge_export.to_onnx import export_screener
from lance_edge_training.checkpoint import load_screener
from lance_edge_training.evaluate import torch_session

# Between machines: the order of sums, and with int8 the roundings it flips (5.7e-3 between
# onnxruntime 1.23 and 1.31).
TOLERANCE = {"fp32": 1e-4, "int8": 2e-2}

CALIBRATION_PROMPTS = 256  # whose activations the quantiser looks at; no labels are used


def export_bundle(
    checkpoint: Path,
    out: Path,
    prompts: Sequence[str],
    precision: str,
    name: str,
    version: str,
    encoder: str,
    golden: Sequence[str],
    tell: Callable[[str], None],
) -> None:
    """Write a bundle with a screener.

    prompts  real ones, on which the stages are compared and the quantiser looks at activations
    encoder  what the encoder was made from, for the model card
    golden   prompts whose verdicts every machine must reproduce
    tell     is given a line per stage

    Raises ExportError, and ParityError if a stage computes something else than the one before.
    """
    if not (checkpoint / "calibration.json").is_file():
        raise ExportError(
            f"{checkpoint} has no calibration.json; run `python -m lance_edge_training.calibrate`"
        )
    model, description = load_screener(checkpoint)
    tokenizer = Tokenizer(
        (checkpoint / "tokenizer.json").read_bytes(), description["window"], description["overlap"]
    )
    values = json.loads((checkpoint / "calibration.json").read_text(encoding="utf-8"))
    taxonomy = json.loads((checkpoint / "taxonomy.json").read_text(encoding="utf-8"))
    calibration = [Calibration(**values[entry["name"]]) for entry in taxonomy]
    thresholds = np.array([item.threshold for item in calibration])
    encoded = [tokenizer.encode(prompt) for prompt in prompts]

    graph = merge_projections(export_screener(model))
    stages = {"fp32": graph}
    if precision == "int8":
        stages["int8"] = row_wise_int8(graph, calibration_feeds(encoded))
    before = severities(torch_session(model), encoded, calibration)
    parity: dict[str, Any] = {}
    for stage, stage_graph in stages.items():
        session = open_session(stage_graph.SerializeToString(), "cpu")
        after = severities(session, encoded, calibration)
        session.close()
        figures = compare(before, after, thresholds)
        tell(f"{stage}: {figures}")
        gate(stage, figures, BOUNDS[stage])
        parity[stage] = {
            **figures.to_dict(),
            "nodes": len(stage_graph.graph.node),
            "bytes": stage_graph.ByteSize(),
        }
        before = after

    spec = ScreenerSpec(
        "screener.onnx",
        "tokenizer.json",
        precision,
        description["window"],
        description["overlap"],
        TOLERANCE[precision],
    )
    provenance = {"encoder": encoder, "onnx": onnx.__version__, **description["provenance"]}
    write_bundle(
        out,
        name,
        version,
        stages[precision].SerializeToString(),
        spec,
        checkpoint,
        parity,
        provenance,
        list(golden),
    )


def calibration_feeds(prompts: list[list[Window]]) -> list[Feed]:
    """The first windows of prompts spread over the file, as inputs for the quantiser."""
    chosen = prompts[:: max(1, len(prompts) // CALIBRATION_PROMPTS)][:CALIBRATION_PROMPTS]
    return [pad([windows[0]], len(windows[0].ids)) for windows in chosen]
