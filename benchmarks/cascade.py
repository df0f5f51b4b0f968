"""What the second look adds: `python benchmarks/cascade.py --data DIR`.

First look alone, second look for every prompt, and the cascade, on the report half of the
development data; the cost of a verdict on plain benign prompts, as they come.
"""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from environment import environment, save
from quality import category_metrics, rates
from sklearn.metrics import average_precision_score, roc_auc_score

import lance_edge
from lance_edge_training.data import Example, development_examples
from lance_edge_training.evaluate import evaluation_sets, half
from lance_edge_training.metrics import recall_at
from lance_edge_training.second_look import both, margins, mixed


def main(
    data: Annotated[Path, typer.Option(help="Folder with prompts/ and pairs/.")],
    bundle: Annotated[Path | None, typer.Option()] = None,
    sample: Annotated[
        int | None, typer.Option(min=100, help="Only so many prompts, drawn at random.")
    ] = None,
    timed: Annotated[int, typer.Option(min=10, help="Plain prompts that are timed.")] = 300,
) -> None:
    """Measure and write benchmarks/results/cascade.json."""
    with lance_edge.load(bundle, "cpu", looks="auto") as guard:
        policy, look, refiner = guard.policy, guard.second_look, guard.refiner
        assert look is not None
        names = list(policy.categories)
        examples = [e for e in development_examples(data, names) if half(e) == "report"]
        if sample is not None:
            examples = random.Random(5).sample(examples, sample)
        plain = [examples[i].prompt for i in evaluation_sets(examples)["benign/plain"]]
        cost = timings(guard, plain[:timed])
        first, deviation, latent = both(guard, examples)
        second = mixed(first, latent, refiner.slope, refiner.intercept, look.share)
        margin = margins(first, deviation, policy)
        sha256 = guard.bundle.sha256
    is_open = (margin >= look.low) & (margin <= look.high)
    cascade = np.where(is_open[:, None], second, first)
    sets = evaluation_sets(examples)
    result = {
        "benchmark": "cascade",
        "bundle": sha256,
        "prompts": len(examples),
        "second_look": {"share": look.share, "low": look.low, "high": look.high},
        "read_twice": {name: float(is_open[rows].mean()) for name, rows in sets.items()},
        "cost_ms": cost,
        "looks": {
            name: figures(examples, severity, policy.thresholds, names)
            for name, severity in (
                ("first", first),
                ("second", second),
                ("cascade", cascade),
            )
        },
        "environment": environment("onnxruntime", "scikit-learn"),
    }
    save("cascade", result)


def figures(
    examples: list[Example], severity: np.ndarray, thresholds: np.ndarray, names: list[str]
) -> dict[str, Any]:
    """Overall figures, and the share of each set that is flagged."""
    benign = np.array([example.harmful is False for example in examples])
    harmful = np.array([example.harmful is True for example in examples])
    decided, highest = benign | harmful, severity.max(1)
    flagged = (severity >= thresholds).any(1)
    per_category = category_metrics(examples, severity, thresholds, names)
    sets = rates(examples, flagged)
    hard = [row["flagged"] for key, row in sets.items() if key.startswith("hard_benign/")]
    return {
        "auc": float(roc_auc_score(harmful[decided], highest[decided])),
        "auprc": float(average_precision_score(harmful[decided], highest[decided])),
        "recall": float(flagged[harmful].mean()),
        "recall_at_1_percent_fpr": recall_at(highest[decided], harmful[decided], 0.01),
        "recall_at_5_percent_fpr": recall_at(highest[decided], harmful[decided], 0.05),
        "hard_benign_fpr_mean_of_sets": float(np.mean(hard)),
        "macro_auprc": float(np.mean([row["auprc"] for row in per_category.values()])),
        "macro_ece": float(np.mean([row["ece"] for row in per_category.values()])),
        "sets": sets,
    }


def timings(guard: lance_edge.Pipeline, prompts: list[str]) -> dict[str, float]:
    """Milliseconds of a verdict, one prompt at a time, with and without second looks."""
    for prompt in prompts[:5]:
        guard.screen(prompt)
    taken, twice = [], 0
    for prompt in prompts:
        started = time.perf_counter()
        twice += guard.screen(prompt).look == 2
        taken.append((time.perf_counter() - started) * 1000)
    return {
        "prompts": len(prompts),
        "read_twice": twice / len(prompts),
        "mean": float(np.mean(taken)),
        "median": float(np.median(taken)),
        "p99": float(np.percentile(taken, 99)),
    }


if __name__ == "__main__":
    typer.run(main)
