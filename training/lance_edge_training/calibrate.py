"""Calibrates a trained screener: `python -m lance_edge_training.calibrate --help`.

On the calibration half of the development data, per category z' = slope * z + intercept is
fitted so that the severity's cross-entropy against the truth is smallest (Platt scaling on the
latent), and one threshold is chosen at a stated false-positive rate on hard-benign prompts.
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
from lance_edge_training.data import Example, load_examples
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


def threshold_at(
    severity: FloatArray, examples: list[Example], false_positive_rate: float
) -> float:
    """The severity that flags this share of the hard-benign prompts, each set counting the same."""
    highest = severity.max(1)
    sets = [
        np.sort(highest[indices])
        for name, indices in evaluation_sets(examples).items()
        if name.startswith("hard_benign/")
    ]

    def rate(threshold: float) -> float:
        return float(np.mean([(values >= threshold).mean() for values in sets]))

    if not sets:
        raise ValueError("the calibration half has no hard-benign prompts to choose a threshold on")
    candidates = np.clip(np.unique(np.round(np.concatenate(sets), 3)), 0.001, 0.999)
    passing = [value for value in candidates if rate(value) <= false_positive_rate]
    return float(min(passing, default=0.999))


def main(
    checkpoint: Annotated[Path, typer.Option(help="Folder written by the trainer.")],
    data: Annotated[Path, typer.Option(help="Folder with prompts/ and pairs/.")],
    false_positive_rate: Annotated[float, typer.Option(min=0.0, max=1.0)] = 0.08,
) -> None:
    """Fit the calibration and choose the threshold; writes calibration.json into the checkpoint."""
    screener, description = load_screener(checkpoint)
    categories = [entry["name"] for entry in json.loads((checkpoint / "taxonomy.json").read_text())]
    tokenizer = Tokenizer(
        (checkpoint / "tokenizer.json").read_bytes(), description["window"], description["overlap"]
    )
    examples = [e for e in load_examples(data, "dev", categories) if half(e) == "calibration"]
    latent = latents(torch_session(screener), tokenizer, [example.prompt for example in examples])
    target, known = truth(examples, categories)
    slope, intercept = fit(latent, target, known)
    threshold = threshold_at(latent.severity(slope, intercept), examples, false_positive_rate)
    values = {
        name: {"slope": float(slope[k]), "intercept": float(intercept[k]), "threshold": threshold}
        for k, name in enumerate(categories)
    }
    write_json(checkpoint / "calibration.json", values)
    typer.echo(f"threshold {threshold:.3f} flags {false_positive_rate:.0%} of hard-benign prompts")


if __name__ == "__main__":
    typer.run(main)
