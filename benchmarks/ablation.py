"""Does the variational head earn its place? `python benchmarks/ablation.py --help`.

Four checkpoints on the same encoder, rows and steps: variational or plain head, all supervision or
labels cut to 0/1 (the paper's setting). Truth: the mean of three raters' severities. Heads are
compared as trained, without calibration, prompt by prompt.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from environment import environment, save

from lance_edge.screener import distribution
from lance_edge.tokenizer import Tokenizer
from lance_edge_training.checkpoint import load_screener
from lance_edge_training.data import development_examples, read_rows
from lance_edge_training.evaluate import half, latents, positive, torch_session, truth
from lance_edge_training.metrics import DISTRIBUTION_MEASURES, bootstrap, calibration_error

DEV_PROMPTS = 800  # of the report half, for the calibration error
SETTINGS = ("all", "binary")


def main(
    runs: Annotated[
        Path,
        typer.Option(
            help="Folder with variational-all, plain-all, variational-binary, plain-binary."
        ),
    ],
    data: Annotated[Path, typer.Option(help="Folder with prompts/, pairs/ and graded/.")],
) -> None:
    """Measure and write benchmarks/results/ablation.json."""
    taxonomy = json.loads((runs / "variational-all" / "taxonomy.json").read_text(encoding="utf-8"))
    categories = [entry["name"] for entry in taxonomy]
    rows = list(read_rows(data / "graded" / "three_raters_dev.jsonl"))
    raters = np.array(
        [[[rater.get(name, 0.0) for name in categories] for rater in row["raters"]] for row in rows]
    ).mean(1)
    target = np.stack([distribution(severity) for severity in raters])
    dev = [e for e in development_examples(data, categories) if half(e) == "report"]
    dev = random.Random(3).sample(dev, min(DEV_PROMPTS, len(dev)))
    result: dict[str, Any] = {"benchmark": "ablation", "prompts": len(rows), "settings": {}}
    for setting in SETTINGS:
        told = {
            head: read(runs / f"{head}-{setting}", [row["prompt"] for row in rows])
            for head in ("variational", "plain")
        }
        found = {
            head: np.stack([distribution(s) for s in severity]) for head, severity in told.items()
        }
        measures = {}
        for name, (measure, smaller_is_better) in DISTRIBUTION_MEASURES.items():
            variational, plain = (measure(target, found[head]) for head in ("variational", "plain"))
            gain = plain - variational if smaller_is_better else variational - plain
            mean, low, high = bootstrap(gain)
            measures[name] = {
                "variational": float(variational.mean()),
                "plain": float(plain.mean()),
                "gain": mean,
                "interval_95": [low, high],
            }
            print(
                f"{setting:7} {name:17} variational {variational.mean():.4f}  plain {plain.mean():.4f}"
                f"  gain {mean:+.4f} [{low:+.4f}, {high:+.4f}]"
            )
        error = {
            head: dev_calibration(runs / f"{head}-{setting}", dev, categories)
            for head in ("variational", "plain")
        }
        absolute = {
            head: float(np.abs(severity - raters).mean()) for head, severity in told.items()
        }
        result["settings"][setting] = {
            "measures": measures,
            "macro_ece": error,
            "severity_mean_absolute_error": absolute,
        }
        print(f"{setting:7} macro ECE {error}, severity error {absolute}")
    result["training"] = json.loads((runs / "variational-all" / "screener.json").read_text())[
        "provenance"
    ]
    result["environment"] = environment("torch", "transformers")
    save("ablation", result)


def read(checkpoint: Path, texts: list[str]) -> np.ndarray:
    """Uncalibrated severities of a checkpoint  [n, C]"""
    screener, description = load_screener(checkpoint)
    tokenizer = Tokenizer(
        (checkpoint / "tokenizer.json").read_bytes(), description["window"], description["overlap"]
    )
    return latents(torch_session(screener), tokenizer, texts).severity()


def dev_calibration(checkpoint: Path, dev: list[Any], categories: list[str]) -> float:
    """Macro ECE before calibration, on the report half."""
    severity = read(checkpoint, [example.prompt for example in dev])
    target, known = truth(dev, categories)
    errors = [
        calibration_error(
            severity[known[:, k] > 0, k], positive(target[known[:, k] > 0, k]).astype(float)
        )
        for k in range(len(categories))
    ]
    return float(np.mean(errors))


if __name__ == "__main__":
    typer.run(main)
