"""How good scores are. Arrays are over n prompts; C categories."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]


def recall_at(score: FloatArray, positive: BoolArray, false_positive_rate: float) -> float:
    """Share of positives found by the lowest threshold that flags at most this share of negatives."""
    negatives = np.sort(score[~positive])
    allowed = int(np.floor(false_positive_rate * len(negatives)))
    threshold = negatives[len(negatives) - allowed - 1] if allowed < len(negatives) else -np.inf
    return float((score[positive] > threshold).mean())


def calibration_error(predicted: FloatArray, target: FloatArray, bins: int = 15) -> float:
    """Expected calibration error: |mean predicted - mean target| over equal-width bins, by size.

    Guo et al., ICML 2017. `target` may be 0/1 or a graded severity.
    """
    index = np.minimum((predicted * bins).astype(int), bins - 1)
    error = 0.0
    for b in range(bins):
        inside = index == b
        if inside.any():
            error += inside.mean() * abs(predicted[inside].mean() - target[inside].mean())
    return float(error)


def bootstrap(
    values: FloatArray, rounds: int = 10_000, seed: int = 0, level: float = 0.95
) -> tuple[float, float, float]:
    """Mean of paired differences over prompts, and its percentile interval: (mean, low, high)."""
    rng = np.random.default_rng(seed)
    means = values[rng.integers(0, len(values), (rounds, len(values)))].mean(1)
    tail = 100 * (1 - level) / 2
    low, high = np.percentile(means, [tail, 100 - tail])
    return float(values.mean()), float(low), float(high)


# Measures between label distributions p (truth) and q, one value per prompt  [n, 1 + C] -> [n].
# Geng, "Label Distribution Learning", IEEE TKDE 28(7), 2016, table 1.


def chebyshev(p: FloatArray, q: FloatArray) -> FloatArray:
    """max |p - q|"""
    result: FloatArray = np.abs(p - q).max(1)
    return result


def clark(p: FloatArray, q: FloatArray) -> FloatArray:
    """sqrt(sum (p - q)^2 / (p + q)^2)"""
    result: FloatArray = np.sqrt(_ratio((p - q) ** 2, (p + q) ** 2).sum(1))
    return result


def canberra(p: FloatArray, q: FloatArray) -> FloatArray:
    """sum |p - q| / (p + q)"""
    result: FloatArray = _ratio(np.abs(p - q), p + q).sum(1)
    return result


def kullback_leibler(p: FloatArray, q: FloatArray) -> FloatArray:
    """KL(p || q), q floored at 1e-6."""
    safe = np.maximum(q, 1e-6)
    result: FloatArray = np.where(p > 0, p * np.log(np.maximum(p, 1e-12) / safe), 0.0).sum(1)
    return result


def cosine(p: FloatArray, q: FloatArray) -> FloatArray:
    """p . q / (|p| |q|)"""
    result: FloatArray = (p * q).sum(1) / (np.linalg.norm(p, axis=1) * np.linalg.norm(q, axis=1))
    return result


def intersection(p: FloatArray, q: FloatArray) -> FloatArray:
    """sum min(p, q)"""
    result: FloatArray = np.minimum(p, q).sum(1)
    return result


# name -> (measure, whether smaller is better)
DISTRIBUTION_MEASURES: dict[str, tuple[Callable[[FloatArray, FloatArray], FloatArray], bool]] = {
    "chebyshev": (chebyshev, True),
    "clark": (clark, True),
    "canberra": (canberra, True),
    "kullback_leibler": (kullback_leibler, True),
    "cosine": (cosine, False),
    "intersection": (intersection, False),
}


def _ratio(numerator: FloatArray, denominator: FloatArray) -> FloatArray:
    """0 where both are 0: the two distributions agree there."""
    result: FloatArray = np.divide(
        numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0
    )
    return result
