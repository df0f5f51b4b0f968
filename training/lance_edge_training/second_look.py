"""Calibrates the second look: `python -m lance_edge_training.second_look --help`.

Through the runtime, on a bundle with its refiner pulled: what is calibrated is what is served.
On rows that may be trained on of the calibration half, per category slope and intercept are
fitted as for the first look; the mix of both looks and the band of margins that gets the second
one are chosen on the whole calibration half, and there is none where it would not pay on rows
that it was not chosen on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import typer
from tqdm import tqdm

import lance_edge
from lance_edge.bundle import Calibration, SecondLook
from lance_edge.policy import Policy
from lance_edge.screener import FloatArray, mix
from lance_edge_training.calibrate import fit
from lance_edge_training.checkpoint import write_json
from lance_edge_training.data import Example, development_examples
from lance_edge_training.evaluate import Latents, evaluation_sets, half, truth
from lance_edge_training.usage import usage_errors

BoolArray = npt.NDArray[np.bool_]

SHARES = (0.2, 0.3, 0.4, 0.5, 0.7, 1.0)  # of the second look, that are tried
# Bands that gained 0.02 and 0.03 here gained nothing on the report half (docs/decisions.md).
LEAST_GAIN = 0.04
PLAIN_SHARE = 0.15  # of plain benign prompts that may pay for a second look


# No margin lies in this band.
NO_MARGIN = 1e9


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
    result = mix(first, slope * latent.mean + intercept, slope * latent.deviation, share)
    return np.where(np.isnan(result), first, result)


def margins(severity: FloatArray, deviation: FloatArray, policy: Policy) -> FloatArray:
    """`Policy.margin` of each row  [n]"""
    return np.array([policy.margin(s, d) for s, d in zip(severity, deviation, strict=True)])


@dataclass(frozen=True)
class Choice:
    """A mix of both looks and the band of margins that gets it.

    gain  what it adds to (mean recall of the harmful sets) - (mean false-positive rate of the
          hard-benign sets)
    """

    share: float
    low: float
    high: float
    gain: float


NO_SECOND_LOOK = Choice(share=0.5, low=NO_MARGIN, high=NO_MARGIN, gain=0.0)


def choose(
    first: FloatArray,
    margin: FloatArray,
    second: Callable[[float], FloatArray],
    thresholds: FloatArray,
    examples: list[Example],
) -> Choice:
    """The share and the band that mend most, while at most PLAIN_SHARE of the plain benign prompts
    pay for it. Without a gain of LEAST_GAIN the band is empty: no prompt is read twice.

    second  share -> severities of both looks  [n, C]
    """
    plain = np.array(evaluation_sets(examples)["benign/plain"])
    edges = np.unique(np.quantile(margin, np.linspace(0, 1, 101)))
    best = NO_SECOND_LOOK
    for share in SHARES:
        counts = mended(first, second(share), thresholds, examples)
        for low in edges:
            for high in edges[edges >= low]:
                inside = (margin >= low) & (margin <= high)
                gain = float(counts[inside].sum())
                if gain > max(best.gain, LEAST_GAIN) and inside[plain].mean() <= PLAIN_SHARE:
                    best = Choice(share, float(low), float(high), gain)
    return best


def held_out_gain(
    first: FloatArray,
    margin: FloatArray,
    second: Callable[[float], FloatArray],
    thresholds: FloatArray,
    examples: list[Example],
) -> float:
    """What a band chosen on every other row gains on the rows between, and the other way round; the
    mean of both. Thousands of bands are tried, and the best of them gains on the rows it was
    chosen on whatever it is worth.
    """
    gains = []
    for start in (0, 1):
        chosen_on, met = (slice(start, None, 2), slice(1 - start, None, 2))
        choice = choose(
            first[chosen_on],
            margin[chosen_on],
            partial(_rows_of, second, chosen_on),
            thresholds,
            examples[chosen_on],
        )
        counts = mended(first[met], second(choice.share)[met], thresholds, examples[met])
        inside = (margin[met] >= choice.low) & (margin[met] <= choice.high)
        gains.append(float(counts[inside].sum()))
    return float(np.mean(gains))


def mended(
    first: FloatArray, second: FloatArray, thresholds: FloatArray, examples: list[Example]
) -> FloatArray:
    """What each row adds to the gain if it gets the second severities instead of the first  [n]"""
    weight, wanted = set_weights(evaluation_sets(examples), len(examples))
    before, after = (np.any(severity >= thresholds, axis=1) for severity in (first, second))
    counts: FloatArray = weight * ((before != wanted).astype(float) - (after != wanted))
    return counts


def _rows_of(second: Callable[[float], FloatArray], rows: slice, share: float) -> FloatArray:
    return second(share)[rows]


def set_weights(sets: Mapping[str, list[int]], rows: int) -> tuple[FloatArray, BoolArray]:
    """What an error on each row counts, and whether it should be flagged: each set counts the
    same on its side, harmful or hard-benign, and both sides count the same; other rows nothing."""
    weight, wanted = np.zeros(rows), np.zeros(rows, bool)
    for side in ("harmful/", "hard_benign/"):
        chosen = [indices for name, indices in sets.items() if name.startswith(side)]
        for indices in chosen:
            weight[indices] = 1 / len(indices) / len(chosen)
            wanted[indices] = side == "harmful/"
    return weight, wanted


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
        with usage_errors():
            examples = development_examples(data, names)
        examples = [e for e in examples if half(e) == "calibration"]
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
    looks = (
        first,
        margins(first, deviation, policy),
        lambda share: mixed(first, latent, slope, intercept, share),
        policy.thresholds,
        examples,
    )
    choice, held_out = choose(*looks), held_out_gain(*looks)
    typer.echo(f"{choice}; gain on rows it was not chosen on: {held_out:.4f}")
    if held_out < LEAST_GAIN:
        choice = NO_SECOND_LOOK
    look = SecondLook(
        {
            name: Calibration(float(slope[k]), float(intercept[k]), float(policy.thresholds[k]))
            for k, name in enumerate(names)
        },
        choice.low,
        choice.high,
        choice.share,
    )
    write_json(out, asdict(look))


if __name__ == "__main__":
    typer.run(main)
