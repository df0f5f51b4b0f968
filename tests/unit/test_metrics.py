"""Each measure against numbers worked out by hand, plain loops, or scipy."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from lance_edge_training.metrics import (
    DISTRIBUTION_MEASURES,
    FloatArray,
    bootstrap,
    calibration_error,
    recall_at,
)

pytestmark = pytest.mark.train

# none and three categories; zeros in one, in the other and in both
TRUTH = np.array([[0.5, 0.5, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0], [0.1, 0.2, 0.3, 0.4]])
GUESS = np.array([[0.2, 0.5, 0.3, 0.0], [0.0, 0.7, 0.3, 0.0], [0.1, 0.2, 0.3, 0.4]])


@pytest.mark.parametrize(
    ("rate", "recall"),
    [
        (0.0, 0.25),  # above 0.8 lies 0.9
        (0.19, 0.25),  # a fifth of the negatives is too much
        (0.2, 0.5),  # above 0.6, too, lies 0.7
        (0.79, 0.5),  # of the two negatives at 0.4 both or none are flagged
        (0.8, 0.75),  # above 0.2 lies 0.4
        (1.0, 1.0),
    ],
)
def test_recall_by_hand(rate: float, recall: float) -> None:
    negatives, positives = [0.8, 0.6, 0.4, 0.4, 0.2], [0.9, 0.7, 0.4, 0.1]
    score = np.array(negatives + positives)
    assert recall_at(score, np.arange(9) >= 5, rate) == recall


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.1])
def test_recall_is_the_best_of_all_thresholds_within_the_rate(rate: float) -> None:
    rng = np.random.default_rng(0)
    positive = rng.random(400) < 0.3
    score = np.round(rng.normal(size=400) + 1.5 * positive, 1)  # rounded: many ties
    within = [t for t in [-np.inf, *score] if (score[~positive] > t).mean() <= rate]
    best = max((score[positive] > t).mean() for t in within)
    assert recall_at(score, positive, rate) == best


def test_calibration_error_by_hand() -> None:
    predicted = np.array([0.05, 0.15, 0.9, 1.0])
    target = np.array([0.0, 1.0, 1.0, 0.5])
    # Two bins: |0.1 - 0.5| and |0.95 - 0.75|, half of the rows in each.
    assert calibration_error(predicted, target, bins=2) == pytest.approx(0.3)
    # Ten bins: 0.05, 0.85 and, for the last two rows, |0.95 - 0.75|.
    expected = 0.25 * 0.05 + 0.25 * 0.85 + 0.5 * 0.2
    assert calibration_error(predicted, target, bins=10) == pytest.approx(expected)


def test_calibration_error_of_the_truth_is_zero() -> None:
    severity = np.linspace(0, 1, 50)
    assert calibration_error(severity, severity) == pytest.approx(0, abs=1e-12)


def test_bootstrap_is_deterministic() -> None:
    values = np.random.default_rng(0).normal(size=40)
    assert bootstrap(values, rounds=500) == bootstrap(values, rounds=500)
    assert bootstrap(values, rounds=500) != bootstrap(values, rounds=500, seed=1)


def test_bootstrap_of_equal_values_has_no_width() -> None:
    assert bootstrap(np.full(20, 0.25), rounds=100) == (0.25, 0.25, 0.25)


def test_bootstrap_interval_is_that_of_the_normal_mean() -> None:
    values = np.random.default_rng(0).normal(loc=0.3, size=2000)
    mean, low, high = bootstrap(values, rounds=4000)
    half_width = 1.96 * values.std() / math.sqrt(2000)
    assert mean == values.mean()
    # A percentile of 4000 rounds has a standard error of about 0.04 standard errors of the mean.
    assert (low, high) == pytest.approx(
        (mean - half_width, mean + half_width), abs=0.08 * half_width
    )


@pytest.mark.parametrize(("level", "covered"), [(0.95, 0.95), (0.5, 0.5)])
def test_bootstrap_covers_the_true_mean_as_often_as_stated(level: float, covered: float) -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(400):
        _, low, high = bootstrap(rng.exponential(size=60), rounds=400, level=level)
        hits += low <= 1.0 <= high
    # 4 standard errors of 400 trials; percentile intervals of skewed data miss a few per cent more.
    slack = 4 * math.sqrt(covered * (1 - covered) / 400)
    assert covered - slack - 0.03 <= hits / 400 <= covered + slack


def chebyshev(p: float, q: float) -> float:
    return abs(p - q)


def clark(p: float, q: float) -> float:
    return ((p - q) / (p + q)) ** 2 if p + q else 0.0


def canberra(p: float, q: float) -> float:
    return abs(p - q) / (p + q) if p + q else 0.0


def kullback_leibler(p: float, q: float) -> float:
    return p * math.log(p / max(q, 1e-6)) if p else 0.0


def intersection(p: float, q: float) -> float:
    return min(p, q)


# name -> (what it makes of a pair of shares, how these come together)
LOOPS: dict[str, tuple[Callable[[float, float], float], Callable[[list[float]], float]]] = {
    "chebyshev": (chebyshev, max),
    "clark": (clark, lambda cells: math.sqrt(sum(cells))),
    "canberra": (canberra, sum),
    "kullback_leibler": (kullback_leibler, sum),
    "intersection": (intersection, sum),
}


@pytest.mark.parametrize("name", LOOPS)
def test_measure_is_its_loop(name: str) -> None:
    cell, together = LOOPS[name]
    for p, q in ((TRUTH, GUESS), (GUESS, TRUTH), random_distributions()):
        expected = [
            together([cell(a, b) for a, b in zip(row_p, row_q, strict=True)])
            for row_p, row_q in zip(p.tolist(), q.tolist(), strict=True)
        ]
        np.testing.assert_allclose(DISTRIBUTION_MEASURES[name][0](p, q), expected, atol=1e-12)


def test_cosine_by_hand() -> None:
    cosine, _ = DISTRIBUTION_MEASURES["cosine"]
    p = np.array([[0.6, 0.8, 0.0], [1.0, 0.0, 0.0], [0.2, 0.3, 0.5]])
    q = np.array([[0.8, 0.6, 0.0], [0.0, 0.5, 0.5], [0.4, 0.6, 1.0]])
    np.testing.assert_allclose(cosine(p, q), [0.96, 0.0, 1.0], atol=1e-12)


def test_measures_are_those_of_scipy() -> None:
    distance = pytest.importorskip("scipy.spatial.distance", reason="needs scipy")
    special = pytest.importorskip("scipy.special", reason="needs scipy")
    references = {
        "chebyshev": distance.chebyshev,
        "canberra": distance.canberra,
        "kullback_leibler": lambda p, q: special.rel_entr(p, q).sum(),
        "cosine": lambda p, q: 1 - distance.cosine(p, q),
    }
    p, q = random_distributions()
    for name, reference in references.items():
        expected = [reference(*rows) for rows in zip(p, q, strict=True)]
        np.testing.assert_allclose(DISTRIBUTION_MEASURES[name][0](p, q), expected, rtol=1e-9)


@pytest.mark.parametrize("name", DISTRIBUTION_MEASURES)
def test_the_truth_is_the_best_guess(name: str) -> None:
    measure, smaller_is_better = DISTRIBUTION_MEASURES[name]
    best = measure(TRUTH, TRUTH)
    np.testing.assert_allclose(best, 0.0 if smaller_is_better else 1.0, atol=1e-12)
    worse = measure(TRUTH, GUESS)[:2]  # the third rows are equal
    assert (worse > best[:2]).all() if smaller_is_better else (worse < best[:2]).all()


def test_a_guess_of_zero_costs_a_finite_divergence() -> None:
    """Of a category with all the mass: log(1 / 1e-6)."""
    kullback_leibler, _ = DISTRIBUTION_MEASURES["kullback_leibler"]
    p, q = np.array([[0.0, 1.0]]), np.array([[1.0, 0.0]])
    assert kullback_leibler(p, q).tolist() == pytest.approx([6 * math.log(10)])


def random_distributions() -> tuple[FloatArray, FloatArray]:
    rng = np.random.default_rng(0)
    return rng.dirichlet(np.ones(15), 20), rng.dirichlet(np.ones(15), 20)
