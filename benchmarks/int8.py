"""What int8 costs against fp32: `python benchmarks/int8.py --help`.

Both precisions of one checkpoint through the runtime, on all development prompts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from environment import environment, save
from sklearn.metrics import average_precision_score

import lance_edge
from lance_edge_training.data import Example, development_examples
from lance_edge_training.evaluate import positive, truth


def main(
    fp32: Annotated[Path, typer.Option(help="Bundle exported with --precision fp32.")],
    data: Annotated[Path, typer.Option(help="Folder with prompts/ and pairs/.")],
    int8: Annotated[Path | None, typer.Option(help="Bundle to compare; the default one.")] = None,
) -> None:
    """Measure and write benchmarks/results/int8.json."""
    guards = {
        "fp32": lance_edge.load(fp32, device="cpu"),
        "int8": lance_edge.load(int8, device="cpu"),
    }
    categories = list(guards["fp32"].policy.categories)
    examples = development_examples(data, categories)
    severity, flagged = {}, {}
    for name, guard in guards.items():
        verdicts = guard.screen_many([example.prompt for example in examples])
        severity[name] = np.array([list(verdict.severity.values()) for verdict in verdicts])
        flagged[name] = np.array([bool(verdict.flagged) for verdict in verdicts])
    difference = np.abs(severity["fp32"] - severity["int8"])
    auprc = {name: macro_auprc(examples, values, categories) for name, values in severity.items()}
    prompts = np.array([example.kind == "prompt" for example in examples])
    flips = flagged["fp32"] != flagged["int8"]
    result = {
        "benchmark": "int8",
        "prompts": len(examples),
        "flipped_decisions": float(flips.mean()),
        "flipped_decisions_prompts": float(flips[prompts].mean()),
        "flipped_decisions_pairs": float(flips[~prompts].mean()),
        "mean_difference": float(difference.mean()),
        "largest_difference": float(difference.max()),
        "macro_auprc": auprc,
        "auprc_loss": auprc["fp32"] - auprc["int8"],
        "bytes": {
            name: guard.bundle.manifest.files[guard.bundle.manifest.screener.graph].bytes
            for name, guard in guards.items()
        },
        "environment": environment("onnxruntime", "scikit-learn"),
    }
    save("int8", result)


def macro_auprc(examples: list[Example], severity: np.ndarray, categories: list[str]) -> float:
    """Mean over categories, over the prompts whose label for it is known."""
    target, known = truth(examples, categories)
    scores = [
        average_precision_score(positive(target[known[:, k] > 0, k]), severity[known[:, k] > 0, k])
        for k in range(len(categories))
    ]
    return float(np.mean(scores))


if __name__ == "__main__":
    typer.run(main)
