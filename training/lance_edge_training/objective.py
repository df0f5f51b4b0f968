"""What a batch costs: the loss terms of both heads, weighted and named."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lance_edge_training import losses
from lance_edge_training.data import Batch
from lance_edge_training.model import Enhancer, Posterior, Reading


@dataclass(frozen=True)
class Weights:
    """How much each loss term counts. `kl_label` and `kl_content` are annealed from 0."""

    label: float = 1.0
    severity: float = 1.0
    enhance: float = 1.0
    harmful: float = 0.5
    kl_label: float = 0.1
    kl_content: float = 0.01
    reconstruction: float = 1.0
    independence: float = 1.0
    span: float = 0.1


def variational_terms(
    reading: Reading, enhancer: Enhancer, batch: Batch, weights: Weights, anneal: float
) -> dict[str, Tensor]:
    """Weighted terms of the variational head.

    label        the posterior's sample explains the coarse labels
    severity     graded rows: posterior and prior give the severities
    enhance      coarse rows: the prior follows the posterior's enhanced severities
    harmful      the prior's "some category applies" agrees with the source's yes/no
    kl_*         posterior to prior (labels), posterior to N(0, I) (content)
    """
    posterior = enhancer(reading, batch.coarse, batch.observed, batch.harmful)
    logit = losses.severity_logit(reading.labels)
    graded = batch.graded.unsqueeze(-1).expand_as(logit)
    enhanced = losses.severity_logit(posterior.labels)
    severity = losses.cross_entropy(logit, batch.severity, graded) + losses.cross_entropy(
        posterior.label_sample, batch.severity, graded
    )
    terms = {
        "label": losses.cross_entropy(
            posterior.label_sample, batch.coarse, batch.observed * (1 - graded)
        ),
        "severity": severity,
        "enhance": losses.cross_entropy(logit, enhanced.detach().sigmoid(), 1 - graded),
        "harmful": losses.any_category(logit, batch.harmful),
        "kl_label": anneal * losses.kl_divergence(posterior.labels, reading.labels),
        "kl_content": anneal
        * losses.kl_divergence(posterior.content, losses.standard_normal(posterior.content)),
        "reconstruction": _reconstruction(reading, posterior),
        "independence": losses.hsic(posterior.content_sample, posterior.label_sample),
        "span": losses.span_attention(reading.attention, batch.span),
    }
    return _weighted(terms, weights)


def plain_terms(reading: Reading, batch: Batch, weights: Weights) -> dict[str, Tensor]:
    """Weighted terms of the ablation: the same encoder and pooling, sigmoid outputs, cross-entropy."""
    logit = reading.labels.mean
    graded = batch.graded.unsqueeze(-1).expand_as(logit)
    terms = {
        "label": losses.cross_entropy(logit, batch.coarse, batch.observed * (1 - graded)),
        "severity": losses.cross_entropy(logit, batch.severity, graded),
        "harmful": losses.any_category(logit, batch.harmful),
        "span": losses.span_attention(reading.attention, batch.span),
    }
    return _weighted(terms, weights)


def _reconstruction(reading: Reading, posterior: Posterior) -> Tensor:
    # h is a fixed target: otherwise shrinking h would lower the loss.
    return (posterior.reconstruction - reading.pooled.detach()).square().mean()


def _weighted(terms: dict[str, Tensor], weights: Weights) -> dict[str, Tensor]:
    return {name: getattr(weights, name) * value for name, value in terms.items()}


def total(terms: dict[str, Tensor]) -> Tensor:
    """The loss: the sum of the weighted terms."""
    return torch.stack(list(terms.values())).sum()
