"""How well the bundle screens: `python benchmarks/quality.py --data DIR`.

On the report half of the development data (thresholds and calibration come from the other half),
through the runtime, as a user gets it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from environment import environment, save
from sklearn.metrics import average_precision_score, roc_auc_score

import lance_edge
from lance_edge_training.data import Example, development_examples
from lance_edge_training.evaluate import evaluation_sets, half, positive, truth
from lance_edge_training.metrics import calibration_error, recall_at


def main(
    data: Annotated[Path, typer.Option(help="Folder with prompts/ and pairs/.")],
    bundle: Annotated[Path | None, typer.Option()] = None,
    name: Annotated[str, typer.Option(help="Name of the result file.")] = "quality",
) -> None:
    """Measure and write benchmarks/results/NAME.json."""
    guard = lance_edge.load(bundle, device="cpu")
    categories = list(guard.policy.categories)
    examples = [e for e in development_examples(data, categories) if half(e) == "report"]
    verdicts = guard.screen_many([example.prompt for example in examples])
    severity = np.array([list(verdict.severity.values()) for verdict in verdicts])
    flagged = np.array([bool(verdict.flagged) for verdict in verdicts])
    sets = rates(examples, flagged)
    benign = np.array([example.harmful is False for example in examples])
    harmful = np.array([example.harmful is True for example in examples])
    decided = benign | harmful
    highest = severity.max(1)
    per_category = category_metrics(examples, severity, guard.policy.thresholds, categories)
    hard = [row["flagged"] for key, row in sets.items() if key.startswith("hard_benign/")]
    result = {
        "benchmark": "quality",
        "bundle": {"name": guard.bundle.manifest.name, "sha256": guard.bundle.sha256},
        "prompts": len(examples),
        "overall": {
            "auc": float(roc_auc_score(harmful[decided], highest[decided])),
            "auprc": float(average_precision_score(harmful[decided], highest[decided])),
            "recall": float(flagged[harmful].mean()),
            "recall_at_1_percent_fpr": recall_at(highest[decided], harmful[decided], 0.01),
            "recall_at_5_percent_fpr": recall_at(highest[decided], harmful[decided], 0.05),
            "hard_benign_fpr_mean_of_sets": float(np.mean(hard)),
            "macro_auprc": _mean(per_category, "auprc"),
            "macro_f1": _mean(per_category, "f1"),
            "macro_ece": _mean(per_category, "ece"),
            "macro_ece_graded": _mean(per_category, "ece_graded"),
        },
        "sets": sets,
        "categories": per_category,
        "spans": span_overlap(examples, verdicts),
        "environment": environment("onnxruntime", "scikit-learn"),
    }
    for key, row in sets.items():
        print(f"{key:32} {row['prompts']:5}  flagged {row['flagged']:6.1%}")
    save(name, result)


def rates(examples: list[Example], flagged: np.ndarray) -> dict[str, dict[str, float]]:
    """Share of each evaluation set that is flagged: recall of harmful sets, FPR of benign ones."""
    return {
        name: {"prompts": len(indices), "flagged": float(flagged[indices].mean())}
        for name, indices in evaluation_sets(examples).items()
    }


def category_metrics(
    examples: list[Example], severity: np.ndarray, thresholds: np.ndarray, categories: list[str]
) -> dict[str, dict[str, float]]:
    """Per category, over the prompts whose label for it is known."""
    target, known = truth(examples, categories)
    graded = np.array([example.severity is not None for example in examples])
    rows: dict[str, dict[str, float]] = {}
    for k, name in enumerate(categories):
        cells = known[:, k] > 0
        present, score = positive(target[cells, k]), severity[cells, k]
        called = score >= thresholds[k]
        agreed = float((called & present).sum())
        rows[name] = {
            "threshold": float(thresholds[k]),
            "positives": int(present.sum()),
            "auprc": float(average_precision_score(present, score)),
            "f1": 2 * agreed / max(1.0, float(called.sum() + present.sum())),
            "recall_at_1_percent_fpr": recall_at(score, present, 0.01),
            "recall_at_5_percent_fpr": recall_at(score, present, 0.05),
            "ece": calibration_error(score, present.astype(float)),
            "ece_graded": calibration_error(severity[graded, k], target[graded, k]),
        }
    return rows


def span_overlap(examples: list[Example], verdicts: list[Any]) -> dict[str, float]:
    """Characters of the verdicts' spans against the annotated hazard, on flagged refinement pairs."""
    hits = found = annotated = 0
    for example, verdict in zip(examples, verdicts, strict=True):
        if not example.spans or not verdict.spans:
            continue
        truth_, told = set(), set()
        for text in example.spans:
            start = example.prompt.find(text)
            truth_ |= set(range(start, start + len(text))) if start >= 0 else set()
        for span in verdict.spans:
            told |= set(range(span.start, span.end))
        hits, found, annotated = (
            hits + len(truth_ & told),
            found + len(told),
            annotated + len(truth_),
        )
    return {"precision": hits / max(1, found), "recall": hits / max(1, annotated)}


def _mean(rows: dict[str, dict[str, float]], key: str) -> float:
    return float(np.mean([row[key] for row in rows.values()]))


if __name__ == "__main__":
    typer.run(main)
