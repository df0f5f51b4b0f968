"""Calibrates the second look: `python -m lance_edge_training.second_look --help`.

Through the runtime, on a bundle with its refiner pulled: what is calibrated is what is served.
On rows that may be trained on of the calibration half, per category slope and intercept are
fitted as for the first look; the mix of both looks and the band of margins that gets the second
one are chosen on the whole calibration half.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import typer
from sklearn.metrics import roc_auc_score
from tqdm import tqdm

import lance_edge
from lance_edge.bundle import Calibration, SecondLook
from lance_edge.policy import Policy
from lance_edge.screener import FloatArray, logit, sigmoid, spread_of
from lance_edge_training.calibrate import fit
from lance_edge_training.checkpoint import write_json
from lance_edge_training.data import Example, load_examples
from lance_edge_training.evaluate import Latents, evaluation_sets, half, truth

BoolArray = npt.NDArray[np.bool_]

SHARES = (0.5, 0.6, 0.7, 0.8, 1.0)  # of the second look, that are tried
PLAIN_SHARE = 0.15  # of plain benign prompts that may pay for a second look


def both(
    pipeline: lance_edge.Pipeline, examples: list[Example]
) -> tuple[FloatArray, FloatArray, Latents]:
    """The first look's severities and deviations and the second look's latents, all [n, C].

    The second look's are raw: before any calibration.
    """
    first = [pipeline.encode(example.prompt).windows for example in examples]
    labels = pipeline.screener.score(first)
    refiner = pipeline.refiner
    means, deviations = [], []
    width = len(pipeline.policy.categories)
    for example in tqdm(examples, unit="prompt", mininterval=10):
        if not refiner.fits(example.prompt):
            means.append(np.full(width, np.nan))
            deviations.append(np.full(width, np.nan))
            continue
        reading = refiner.read(example.prompt)
        means.append((reading.mean - refiner.intercept) / refiner.slope)
        deviations.append(reading.deviation / refiner.slope)
    return (
        np.stack([item.severity for item in labels]),
        np.stack([item.deviation for item in labels]),
        Latents(np.stack(means), np.stack(deviations)),
    )


def mixed(
    first: FloatArray, latent: Latents, slope: FloatArray, intercept: FloatArray, share: float
) -> FloatArray:
    """Severities of both looks; the first's where there is no second  [n, C]"""
    second = (slope * latent.mean + intercept) / spread_of(slope * latent.deviation)
    result = sigmoid((1 - share) * logit(first) + share * second)
    return np.where(np.isnan(result), first, result)


def margins(severity: FloatArray, deviation: FloatArray, policy: Policy) -> FloatArray:
    """`Policy.margin` of each row  [n]"""
    return np.array([policy.margin(s, d) for s, d in zip(severity, deviation, strict=True)])


def choose_share(
    first: FloatArray,
    latent: Latents,
    slope: FloatArray,
    intercept: FloatArray,
    examples: list[Example],
) -> float:
    """The share at which the highest severity tells harmful from benign prompts best."""
    decided = np.array([example.harmful is not None for example in examples])
    harmful = np.array([example.harmful is True for example in examples])

    def auc(share: float) -> float:
        highest = mixed(first, latent, slope, intercept, share).max(1)
        return float(roc_auc_score(harmful[decided], highest[decided]))

    return max(SHARES, key=auc)


def choose_band(
    margin: FloatArray,
    first_flags: npt.NDArray[np.bool_],
    mixed_flags: npt.NDArray[np.bool_],
    examples: list[Example],
) -> tuple[float, float]:
    """The band of margins whose second look mends most errors, while at most PLAIN_SHARE of the
    plain benign prompts pay for it. Errors count per set, each set the same."""
    sets = evaluation_sets(examples)
    plain = np.array(sets["benign/plain"])
    weight, wanted = np.zeros(len(examples)), np.zeros(len(examples))
    for name, indices in sets.items():
        if name != "benign/plain":
            weight[indices] = 1 / len(indices)
            wanted[indices] = float(name.startswith("harmful/"))
    mended = weight * (
        (first_flags != wanted).astype(float) - (mixed_flags != wanted).astype(float)
    )
    edges = np.unique(np.quantile(margin, np.linspace(0, 1, 201)))
    best, band = -np.inf, (0.0, 0.0)
    for low in edges:
        for high in edges[edges >= max(low, 0.0)]:
            inside = (margin >= low) & (margin <= high)
            if inside[plain].mean() <= PLAIN_SHARE and mended[inside].sum() > best:
                best, band = float(mended[inside].sum()), (float(low), float(high))
    return band


def main(
    bundle: Annotated[Path, typer.Option(help="Bundle with a refiner that was pulled.")],
    data: Annotated[Path, typer.Option(help="Folder with prompts/ and pairs/.")],
    out: Annotated[Path, typer.Option(help="second_look.json of the refiner's checkpoint.")],
    cache: Annotated[
        Path | None, typer.Option(help="Keep the looks here (.npz), or take them from here.")
    ] = None,
) -> None:
    """Fit the second look's calibration, choose the mix and the band; writes second_look.json."""
    with lance_edge.load(bundle, "cpu", looks="1") as pipeline:
        names, policy = list(pipeline.policy.categories), pipeline.policy
        examples = [e for e in load_examples(data, "dev", names) if half(e) == "calibration"]
        if cache is not None and cache.is_file():
            with np.load(cache) as kept:
                first, deviation = kept["first"], kept["deviation"]
                latent = Latents(kept["mean"], kept["second_deviation"])
        else:
            first, deviation, latent = both(pipeline, examples)
    if cache is not None:
        np.savez(
            cache,
            first=first,
            deviation=deviation,
            mean=latent.mean,
            second_deviation=latent.deviation,
        )
    target, known = truth(examples, names)
    allowed = np.array([example.may_train for example in examples])
    allowed &= ~np.isnan(latent.mean).any(1)
    permitted = Latents(latent.mean[allowed], latent.deviation[allowed])
    slope, intercept = fit(permitted, target[allowed], known[allowed])
    share = choose_share(first, latent, slope, intercept, examples)
    severity = mixed(first, latent, slope, intercept, share)
    low, high = choose_band(
        margins(first, deviation, policy),
        np.any(first >= policy.thresholds, axis=1),
        np.any(severity >= policy.thresholds, axis=1),
        examples,
    )
    look = SecondLook(
        {
            name: Calibration(float(slope[k]), float(intercept[k]), float(policy.thresholds[k]))
            for k, name in enumerate(names)
        },
        low,
        high,
        share,
    )
    write_json(out, asdict(look))
    typer.echo(f"share {share}, band {low:.2f} to {high:.2f}")


if __name__ == "__main__":
    typer.run(main)
