"""The terms of the variational label-enhancement loss, as pure functions.

B rows, C categories. Terms that sum over categories return the mean over rows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from lance_edge_training.model import Gaussian


def severity_logit(labels: Gaussian) -> Tensor:
    """Logit of the mean of sigmoid(z), z normal: mu / sqrt(1 + pi sigma^2 / 8)  [B, C]

    MacKay's approximation (Neural Computation 4(5), 1992).
    """
    return labels.mean / torch.sqrt(1 + math.pi * labels.deviation.square() / 8)


def cross_entropy(logit: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Bernoulli cross-entropy with targets in 0..1, summed over weighted cells  [B, C] -> scalar"""
    cells = functional.binary_cross_entropy_with_logits(logit, target, reduction="none")
    return (cells * weight).sum(-1).mean()


def any_category(logit: Tensor, harmful: Tensor) -> Tensor:
    """Cross-entropy of "some category applies", P = 1 - prod(1 - s_k), on rows where it is known.

    logit [B, C]; harmful [B] is 1, 0, or -1 where unknown.
    """
    log_none = functional.logsigmoid(-logit).sum(-1)
    log_any = torch.log(-torch.expm1(log_none.clamp_max(-1e-6)))
    known = harmful >= 0
    terms = torch.where(harmful > 0.5, -log_any, -log_none)
    return (terms * known).sum() / harmful.shape[0]


def kl_divergence(q: Gaussian, p: Gaussian) -> Tensor:
    """KL(q || p) of diagonal normals, summed over dimensions  -> scalar"""
    ratio = (q.deviation / p.deviation).square()
    shift = ((q.mean - p.mean) / p.deviation).square()
    return 0.5 * (ratio + shift - 1 - ratio.log()).sum(-1).mean()


def standard_normal(like: Gaussian) -> Gaussian:
    """N(0, I) of the same shape."""
    return Gaussian(torch.zeros_like(like.mean), torch.ones_like(like.deviation))


def hsic(x: Tensor, y: Tensor) -> Tensor:
    """Hilbert-Schmidt independence criterion, tr(K H L H) / (n - 1)^2, with Gaussian kernels.

    Kernel width: the mean squared distance (Gretton et al., ALT 2005, use the median).
    """
    rows = x.shape[0]
    if rows < 2:
        return x.new_zeros(())
    centring = torch.eye(rows, device=x.device, dtype=x.dtype) - 1.0 / rows
    return torch.trace(_kernel(x) @ centring @ _kernel(y) @ centring) / (rows - 1) ** 2


def span_attention(attention: Tensor, span: Tensor) -> Tensor:
    """-log of the pooling attention that falls on annotated hazard tokens, on rows that have any.

    attention, span [B, T]
    """
    annotated = (span.sum(-1) > 0).float()
    inside = (attention * span).sum(-1).clamp_min(1e-6)
    return -(inside.log() * annotated).sum() / span.shape[0]


def _kernel(x: Tensor) -> Tensor:
    distance = torch.cdist(x, x).square()
    return torch.exp(-distance / distance.detach().mean().clamp_min(1e-6))
