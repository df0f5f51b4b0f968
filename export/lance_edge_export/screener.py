"""A screener's checkpoint to a bundle: torch -> fp32 ONNX -> int8 or fp16, stage by stage compared."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from lance_edge.bundle import CloseReading, ScreenerSpec
from lance_edge.errors import ParityError
from lance_edge.tokenizer import Tokenizer, Window
from lance_edge.verify import TOLERANCE
from lance_edge_engines import open_session
from lance_edge_export.checkpoint import Checkpoint
from lance_edge_export.fused import fuse
from lance_edge_export.fusion import fusion
from lance_edge_export.half import half_products
from lance_edge_export.layers import (
    CALIBRATION_PROMPTS,
    REPORTED_PROMPTS,
    WORST,
    Feed,
    first_windows,
    layer_errors,
    set_apart,
)
from lance_edge_export.optimise import merge_projections
from lance_edge_export.pack import write_bundle
from lance_edge_export.parity import BOUNDS, compare, gate, severities
from lance_edge_export.quantise import int8_products
from lance_edge_export.to_onnx import export_screener
from lance_edge_training.evaluate import network_session


@dataclass(frozen=True)
class Wishes:
    """What is to be made of a checkpoint.

    encoder        what the encoder was made from, for the model card
    keep_fp32      layers that stay in fp32; the report of an int8 or fp16 export names the worst
    close_reading  whether windows that leave open what they hold are read again
    """

    precision: str
    name: str
    version: str
    encoder: str = ""
    keep_fp32: tuple[str, ...] = ()
    close_reading: bool = False


def export_bundle(
    checkpoint: Checkpoint,
    out: Path,
    wishes: Wishes,
    prompts: Sequence[str],
    golden: Sequence[str],
    tell: Callable[[str], None],
) -> None:
    """Write a bundle with a screener.

    prompts  real ones: of some, the quantiser looks at the activations; on the others, if there are
             any, the stages are compared
    golden   prompts whose verdicts every machine must reproduce
    tell     is given a line per stage

    Raises ParityError if a stage computes something else than the one before; nothing is written.
    """
    tokenizer = Tokenizer(checkpoint.tokenizer, checkpoint.window, checkpoint.overlap)
    encoded = [tokenizer.encode(prompt) for prompt in prompts]
    # The scales fit the prompts that they were chosen on; others judge them, where there are others.
    chosen, others = set_apart(encoded, CALIBRATION_PROMPTS)
    feeds = first_windows(chosen)
    plain = export_screener(checkpoint.network, checkpoint.window)
    stages = {"fp32": fuse(merge_projections(plain))}
    if wishes.precision == "int8":
        stages["int8"] = int8_products(stages["fp32"], feeds, wishes.keep_fp32)
    if wishes.precision == "fp16":
        stages["fp16"] = half_products(stages["fp32"], wishes.keep_fp32)
    parity = compare_stages(checkpoint, stages, others or encoded, feeds[:REPORTED_PROMPTS], tell)
    graph = stages[wishes.precision]
    spec = ScreenerSpec(
        "screener.onnx",
        "tokenizer.json",
        wishes.precision,
        checkpoint.window,
        checkpoint.overlap,
        TOLERANCE[wishes.precision],
        CloseReading(checkpoint.window // 2, min(checkpoint.overlap // 2, checkpoint.window // 4))
        if wishes.close_reading
        else None,
    )
    names = [entry["name"] for entry in checkpoint.taxonomy]
    calibration = dict(zip(names, map(asdict, checkpoint.calibration), strict=True))
    described = {
        "tokenizer.json": checkpoint.tokenizer,
        "taxonomy.json": json.dumps(checkpoint.taxonomy, indent=2).encode(),
        "calibration.json": json.dumps(calibration, indent=2).encode(),
    }
    provenance = {
        "encoder": wishes.encoder,
        "onnx": onnx.__version__,
        "kept in fp32": list(wishes.keep_fp32),
        **checkpoint.provenance,
    }
    write_bundle(
        out,
        wishes.name,
        wishes.version,
        graph.SerializeToString(),
        spec,
        described,
        parity,
        provenance,
        list(golden),
    )


def compare_stages(
    checkpoint: Checkpoint,
    stages: dict[str, onnx.ModelProto],
    encoded: list[list[Window]],
    feeds: Sequence[Feed],
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """What each stage changed, for the manifest. Raises ParityError, which names the worst layers."""
    calibration = checkpoint.calibration
    thresholds = np.array([item.threshold for item in calibration])
    network = network_session(checkpoint.network, len(calibration))
    before = severities(network, encoded, calibration)
    parity: dict[str, Any] = {}
    for stage, graph in stages.items():
        session = open_session(graph.SerializeToString(), "cpu")
        after = severities(session, encoded, calibration)
        session.close()
        figures = compare(before, after, thresholds)
        merged = fusion(graph)
        size = {"nodes": merged.before, "bytes": graph.ByteSize()}
        parity[stage] = {**figures.to_dict(), **size}
        tell(f"{stage}: {parity[stage]}")
        tell(f"{stage}: {merged.after} nodes once loaded; fused: {counted(merged.fused)}")
        tell(f"{stage}: left as they are: {counted(merged.left)}")
        worst: list[str] = []
        if stage != "fp32":
            errors = layer_errors(stages["fp32"], graph, feeds)
            parity[stage]["worst_layers"] = dict(list(errors.items())[:WORST])
            worst = [f"{name} ({error:.3f})" for name, error in errors.items()]
            tell(f"{stage}: relative error of its layers: {', '.join(worst)}")
        try:
            gate(stage, figures, BOUNDS[stage])
        except ParityError as error:
            if not worst:
                raise
            named = ", ".join(worst[:WORST])
            raise ParityError(
                f"{error}; the layers that moved most: {named}; --keep-fp32 LAYER keeps one"
            ) from error
        before = after
    return parity


def counted(operators: Mapping[str, int]) -> str:
    """Operators with how often each stands in a graph."""
    return ", ".join(f"{name} {count}" for name, count in operators.items()) or "none"
