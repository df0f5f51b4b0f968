"""Calibrates a trained screener: `python -m lance_edge_training.calibrate --help`.

On the calibration half of the development data, per category z' = slope * z + intercept is
fitted so that the severity's cross-entropy against the truth is smallest (Platt scaling on the
latent), on rows that may be trained on; thresholds are chosen at a stated false-positive rate on hard-benign prompts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from lance_edge.screener import FloatArray
from lance_edge.tokenizer import Tokenizer
from lance_edge_training.checkpoint import load_screener, write_json
from lance_edge_training.data import DataError, Example, development_examples
from lance_edge_training.evaluate import (
    Latents,
    evaluation_sets,
    half,
    latents,
    torch_session,
    truth,
)
from lance_edge_training.losses import severity_logit
from lance_edge_training.model import Gaussian
from lance_edge_training.usage import usage_errors

LOWEST_THRESHOLD, HIGHEST_THRESHOLD = 0.3, 0.95
PRIOR_WEIGHT = 2e-3  # pull towards slope 1 and intercept 0: rare categories have few positives


def fit(latent: Latents, target: FloatArray, known: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Slope and intercept per category  [n, C] each -> [C], [C]"""
    mean, deviation = torch.from_numpy(latent.mean), torch.from_numpy(latent.deviation)
    truth_, weight = (
        torch.from_numpy(target),
        torch.from_numpy(known / np.maximum(known.sum(0, keepdims=True), 1)),
    )
    log_slope = torch.zeros(mean.shape[1], dtype=torch.float64, requires_grad=True)
    intercept = torch.zeros_like(log_slope, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [log_slope, intercept], max_iter=200, line_search_fn="strong_wolfe"
    )

    def loss() -> Any:
        optimizer.zero_grad()
        slope = log_slope.exp()
        logit = severity_logit(Gaussian(slope * mean + intercept, slope * deviation))
        cells = torch.nn.functional.binary_cross_entropy_with_logits(
            logit, truth_, reduction="none"
        )
        value = (cells * weight).sum() + PRIOR_WEIGHT * (
            log_slope.square() + intercept.square()
        ).sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return log_slope.detach().exp().numpy(), intercept.detach().numpy()


def thresholds_at(
    severity: FloatArray, examples: list[Example], false_positive_rate: float
) -> FloatArray:
    """Thresholds at which this share of the hard-benign prompts is flagged, each set counting the same.

    severity [n, C] -> [C]. Every category may flag the same share of them, but none is flagged
    below LOWEST_THRESHOLD, where severities say "faint": so categories that tell hazardous from
    harmless well end there, and only the others are held back.
    """
    sets = [
        severity[indices]
        for name, indices in evaluation_sets(examples).items()
        if name.startswith("hard_benign/")
    ]
    if not sets:
        raise DataError("the calibration half has no hard-benign prompts to choose thresholds on")

    def equal_rate(rate: float) -> FloatArray:
        # The lowest threshold that flags at most this share, on the mean over sets.
        weights = np.concatenate([np.full(len(rows), 1 / len(rows) / len(sets)) for rows in sets])
        stacked = np.concatenate(sets)
        found = np.empty(stacked.shape[1])
        for k in range(stacked.shape[1]):
            order = np.argsort(-stacked[:, k])
            allowed = int((np.cumsum(weights[order]) <= rate + 1e-12).sum())
            found[k] = stacked[order[allowed], k] + 1e-3 if allowed < len(order) else 0.0
        return np.clip(found.round(3), LOWEST_THRESHOLD, HIGHEST_THRESHOLD)

    def flagged(thresholds: FloatArray) -> float:
        return float(np.mean([(rows >= thresholds).any(1).mean() for rows in sets]))

    rates = np.linspace(0, false_positive_rate, 201)
    passing = [rate for rate in rates if flagged(equal_rate(rate)) <= false_positive_rate]
    return equal_rate(max(passing, default=0.0))


def main(
    checkpoint: Annotated[Path, typer.Option(help="Folder written by the trainer.")],
    data: Annotated[Path, typer.Option(help="Folder with prompts/ and pairs/.")],
    false_positive_rate: Annotated[float, typer.Option(min=0.0, max=1.0)] = 0.09,
) -> None:
    """Fit the calibration and choose thresholds; writes calibration.json into the checkpoint."""
    with usage_errors():
        screener, description = load_screener(checkpoint)
    categories = [entry["name"] for entry in json.loads((checkpoint / "taxonomy.json").read_text())]
    tokenizer = Tokenizer(
        (checkpoint / "tokenizer.json").read_bytes(), description["window"], description["overlap"]
    )
    with usage_errors():
        examples = development_examples(data, categories)
    examples = [e for e in examples if half(e) == "calibration"]
    latent = latents(torch_session(screener), tokenizer, [example.prompt for example in examples])
    target, known = truth(examples, categories)
    allowed = np.array([example.may_train for example in examples])
    permitted = Latents(latent.mean[allowed], latent.deviation[allowed])
    slope, intercept = fit(permitted, target[allowed], known[allowed])
    severity = latent.severity(slope, intercept)
    with usage_errors():
        thresholds = thresholds_at(severity, examples, false_positive_rate)
    values = {
        name: {
            "slope": float(slope[k]),
            "intercept": float(intercept[k]),
            "threshold": float(thresholds[k]),
        }
        for k, name in enumerate(categories)
    }
    write_json(checkpoint / "calibration.json", values)
    for name, threshold in zip(categories, thresholds, strict=True):
        typer.echo(f"{name}  {threshold:.3f}")


if __name__ == "__main__":
    typer.run(main)
