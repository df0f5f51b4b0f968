"""Each loss term against a formula written another way."""

# ruff: noqa: E402 - what follows importorskip must not be imported without torch

from __future__ import annotations

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch (the train extra)")

from lance_edge_training import losses
from lance_edge_training.model import Gaussian

pytestmark = pytest.mark.train


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


# For large deviations the exact mean is Phi(mu / sigma) and ours sigmoid(sqrt(8 / pi) mu / sigma):
# they are at most 0.0177 apart, and closer for smaller deviations.
@pytest.mark.parametrize("deviation", [0.01, 0.5, 1.0, 2.0, 5.0, 20.0])
@pytest.mark.parametrize("mean", [-12.0, -3.0, -0.5, 0.0, 1.0, 4.0])
def test_severity_is_the_mean_of_the_sigmoid(mean: float, deviation: float) -> None:
    labels = Gaussian(torch.tensor([[mean]]), torch.tensor([[deviation]]))
    severity = losses.severity_logit(labels).sigmoid().item()
    assert severity == pytest.approx(mean_of_sigmoid(mean, deviation), abs=0.018)


def test_severity_without_deviation_is_the_sigmoid_of_the_mean() -> None:
    labels = Gaussian(torch.randn(4, 3), torch.zeros(4, 3))
    assert torch.equal(losses.severity_logit(labels), labels.mean)


def test_uncertainty_pulls_severity_towards_one_half() -> None:
    labels = Gaussian(torch.tensor([3.0, 3.0, -3.0, -3.0]), torch.tensor([1.0, 4.0, 1.0, 4.0]))
    sure_high, unsure_high, sure_low, unsure_low = losses.severity_logit(labels).sigmoid().tolist()
    assert sure_high > unsure_high > 0.5 > unsure_low > sure_low


def test_cross_entropy_by_hand() -> None:
    logit = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]])  # probabilities 1/2, 3/4; 1/2, 1/2
    target = torch.tensor([[1.0, 0.5], [0.3, 0.9]])
    weight = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    first = math.log(2) - 2 * 0.5 * (math.log(0.75) + math.log(0.25))
    assert losses.cross_entropy(logit, target, weight).item() == pytest.approx(first / 2)


def test_cross_entropy_is_smallest_at_the_target() -> None:
    target = torch.tensor([[0.1, 0.5, 0.85]])
    logit = torch.logit(target).requires_grad_()
    losses.cross_entropy(logit, target, torch.ones(1, 3)).backward()
    assert logit.grad.abs().max() < 1e-6


def test_any_category_is_the_cross_entropy_of_one_minus_the_product() -> None:
    logit = torch.randn(6, 4, dtype=torch.float64)
    harmful = torch.tensor([1.0, 0.0, -1.0, 1.0, 0.0, -1.0], dtype=torch.float64)
    severity = 1 / (1 + np.exp(-logit.numpy()))
    any_of = 1 - np.prod(1 - severity, 1)
    rows = [-np.log(p if h else 1 - p) for p, h in zip(any_of, harmful, strict=True) if h >= 0]
    assert losses.any_category(logit, harmful).item() == pytest.approx(sum(rows) / 6)


def test_rows_of_unknown_harm_cost_nothing() -> None:
    logit = torch.randn(3, 4, requires_grad=True)
    loss = losses.any_category(logit, torch.full((3,), -1.0))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logit.grad, torch.zeros(3, 4))


@pytest.mark.parametrize("harmful", [1.0, 0.0, -1.0])
@pytest.mark.parametrize("value", [-1e4, -50.0, -10.0, 10.0, 50.0, 1e4])
def test_any_category_of_extreme_logits_is_finite(value: float, harmful: float) -> None:
    logit = torch.full((1, 14), value, requires_grad=True)
    loss = losses.any_category(logit, torch.tensor([harmful]))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logit.grad).all()


def test_a_harmful_prompt_raises_and_a_harmless_one_lowers_every_logit() -> None:
    logit = torch.tensor([[-9.0, -4.0, 2.0]] * 2, requires_grad=True)
    losses.any_category(logit, torch.tensor([1.0, 0.0])).backward()
    assert (logit.grad[0] < 0).all()
    assert (logit.grad[1] > 0).all()


def test_kl_divergence_is_that_of_torch() -> None:
    q, p = random_gaussian(5, 3), random_gaussian(5, 3)
    cells = torch.distributions.kl_divergence(
        torch.distributions.Normal(q.mean, q.deviation),
        torch.distributions.Normal(p.mean, p.deviation),
    )
    expected = cells.sum(1).mean().item()
    assert losses.kl_divergence(q, p).item() == pytest.approx(expected, rel=1e-5)


def test_kl_divergence_is_the_mean_log_ratio_of_samples() -> None:
    q = Gaussian(torch.full((200_000, 1), 0.5), torch.full((200_000, 1), 0.7))
    p = losses.standard_normal(q)
    sample = q.sample()
    ratio = log_density(q, sample) - log_density(p, sample)
    standard_error = ratio.std().item() / math.sqrt(len(ratio))
    assert losses.kl_divergence(q, p).item() == pytest.approx(
        ratio.mean().item(), abs=4 * standard_error
    )


def test_kl_divergence_to_itself_is_zero() -> None:
    q = random_gaussian(4, 3)
    assert losses.kl_divergence(q, q).item() == pytest.approx(0, abs=1e-6)


def test_hsic_is_its_double_sum() -> None:
    x, y = torch.randn(9, 4), torch.randn(9, 2)
    assert losses.hsic(x, y).item() == pytest.approx(hsic_by_loops(x, y), rel=1e-5)


def test_hsic_tells_dependent_from_independent_samples() -> None:
    x = torch.randn(300, 1)
    dependent = losses.hsic(x, x.square())  # uncorrelated, yet dependent
    independent = losses.hsic(x, torch.randn(300, 1))
    assert dependent.item() > 10 * independent.item()


def test_hsic_of_a_constant_or_a_single_row_is_zero() -> None:
    assert losses.hsic(torch.randn(5, 2), torch.ones(5, 3)).item() == pytest.approx(0, abs=1e-7)
    assert losses.hsic(torch.randn(1, 2), torch.randn(1, 3)).item() == 0


def test_hsic_gradients_are_finite_for_equal_rows() -> None:
    x = torch.zeros(4, 2, requires_grad=True)
    losses.hsic(x, torch.randn(4, 3)).backward()
    assert torch.isfinite(x.grad).all()


def test_span_attention_by_hand() -> None:
    attention = torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.3, 0.5]])
    span = torch.tensor([[1, 1, 0], [0, 0, 0]])  # the second row is not annotated
    expected = -math.log(0.75) / 2
    assert losses.span_attention(attention, span).item() == pytest.approx(expected)


def test_span_attention_that_misses_the_span_is_finite() -> None:
    attention = torch.tensor([[1.0, 0.0]], requires_grad=True)
    loss = losses.span_attention(attention, torch.tensor([[0, 1]]))
    loss.backward()
    assert loss.item() == pytest.approx(-math.log(1e-6))
    assert torch.isfinite(attention.grad).all()


def mean_of_sigmoid(mean: float, deviation: float) -> float:
    """E[sigmoid(z)], z normal, as a sum over +-10 deviations."""
    z = np.linspace(mean - 10 * deviation, mean + 10 * deviation, 20_001)
    density = np.exp(-(((z - mean) / deviation) ** 2) / 2) / (deviation * math.sqrt(2 * math.pi))
    return float((density * 0.5 * (1 + np.tanh(z / 2))).sum() * (z[1] - z[0]))


def random_gaussian(rows: int, columns: int) -> Gaussian:
    return Gaussian(torch.randn(rows, columns), torch.rand(rows, columns) + 0.2)


def log_density(normal: Gaussian, value: torch.Tensor) -> torch.Tensor:
    return torch.distributions.Normal(normal.mean, normal.deviation).log_prob(value)


def hsic_by_loops(x: torch.Tensor, y: torch.Tensor) -> float:
    """With kernels k and m: mean of k m, plus the product of their means, minus twice the mean of
    the products of their row means."""
    k, m = kernel_by_loops(x), kernel_by_loops(y)
    n = len(k)
    joint = sum(k[i][j] * m[i][j] for i in range(n) for j in range(n)) / n**2
    apart = sum(map(sum, k)) * sum(map(sum, m)) / n**4
    mixed = sum(sum(k[i]) * sum(m[i]) for i in range(n)) / n**3
    return (joint + apart - 2 * mixed) * n**2 / (n - 1) ** 2


def kernel_by_loops(x: torch.Tensor) -> list[list[float]]:
    rows = x.tolist()
    squared = [[sum((a - b) ** 2 for a, b in zip(u, v, strict=True)) for v in rows] for u in rows]
    width = sum(map(sum, squared)) / len(rows) ** 2
    return [[math.exp(-value / width) for value in row] for row in squared]
