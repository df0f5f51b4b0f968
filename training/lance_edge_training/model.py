"""The label-enhancement screener as a torch module, with its training-only parts.

The encoder's token states H are pooled by attention, h = sum_t a_t H_t. Serving keeps the
conditional prior p(z_label | x): its mean is linear in h, so a_t W H_t is exactly what token t
adds to each category. The posterior q(z | x, l), which also reads the labels, teaches it.

Sources: LEVI (Xu et al., ICML 2020: the last dimensions of z are the label distribution);
conditional prior as in Sohn et al., NeurIPS 2015.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

HeadKind = Literal["variational", "plain"]

MIN_DEVIATION = 1e-3


@dataclass(frozen=True)
class Gaussian:
    """Independent normal distributions; mean and deviation have one shape."""

    mean: Tensor
    deviation: Tensor

    def sample(self) -> Tensor:
        return self.mean + self.deviation * torch.randn_like(self.mean)


@dataclass(frozen=True)
class Reading:
    """What the served head says of B prompts of T tokens.

    labels         p(z_label | x)                          [B, C]
    pooled         h                                       [B, H]
    attention      a, sums to 1 over a prompt's tokens     [B, T]
    contributions  a_t W H_t; sums over T to mean - bias   [B, T, C]
    """

    labels: Gaussian
    pooled: Tensor
    attention: Tensor
    contributions: Tensor


@dataclass(frozen=True)
class Posterior:
    """q(z | x, l) and the reconstruction of h from a sample of it."""

    labels: Gaussian
    content: Gaussian
    label_sample: Tensor
    content_sample: Tensor
    reconstruction: Tensor


class Head(nn.Module):
    """The part that ships: pooling and the conditional prior. `plain` has no deviation."""

    def __init__(self, hidden: int, categories: int, kind: HeadKind) -> None:
        super().__init__()
        self.kind = kind
        self.pool = nn.Linear(hidden, 1)
        self.mean = nn.Linear(hidden, categories)
        self.deviation = nn.Linear(hidden, categories) if kind == "variational" else None
        nn.init.constant_(self.mean.bias, -3.0)  # most categories are absent from most prompts

    def forward(self, states: Tensor, mask: Tensor) -> Reading:
        """states [B, T, H], mask [B, T] of 0/1 -> Reading"""
        weights = self.pool(states).squeeze(-1).masked_fill(mask == 0, -1e4)
        attention = weights.softmax(-1)
        pooled = torch.einsum("bt,bth->bh", attention, states)
        contributions = attention.unsqueeze(-1) * functional.linear(states, self.mean.weight)
        mean = contributions.sum(1) + self.mean.bias
        if self.deviation is None:
            deviation = torch.zeros_like(mean)
        else:
            deviation = functional.softplus(self.deviation(pooled)) + MIN_DEVIATION
        return Reading(Gaussian(mean, deviation), pooled, attention, contributions)


class Enhancer(nn.Module):
    """q(z | x, l) and the decoder of h; needed in training only."""

    def __init__(self, hidden: int, categories: int, content: int = 32, width: int = 256) -> None:
        super().__init__()
        self.categories, self.content = categories, content
        self.encode = nn.Sequential(
            nn.Linear(hidden + 2 * categories + 2, width),
            nn.GELU(),
            nn.Linear(width, 2 * (categories + content)),
        )
        self.decode = nn.Sequential(
            nn.Linear(categories + content, width), nn.GELU(), nn.Linear(width, hidden)
        )

    def forward(
        self, reading: Reading, coarse: Tensor, observed: Tensor, harmful: Tensor
    ) -> Posterior:
        """coarse, observed [B, C]; harmful [B] is 1, 0, or -1 where unknown.

        The label mean is a correction to the prior's, so that a posterior that learned
        nothing from the labels says what the prior says.
        """
        known = (harmful >= 0).float()
        told = torch.stack([harmful.clamp_min(0) * known, known], -1)
        inputs = torch.cat([reading.pooled, coarse * observed, observed, told], -1)
        shift, content, raw_label, raw_content = self.encode(inputs).split(
            [self.categories, self.content, self.categories, self.content], -1
        )
        labels = Gaussian(
            reading.labels.mean.detach() + shift, functional.softplus(raw_label) + MIN_DEVIATION
        )
        contents = Gaussian(content, functional.softplus(raw_content) + MIN_DEVIATION)
        label_sample, content_sample = labels.sample(), contents.sample()
        reconstruction = self.decode(torch.cat([content_sample, label_sample], -1))
        return Posterior(labels, contents, label_sample, content_sample, reconstruction)


class Screener(nn.Module):
    """An encoder with the served head: what the export reads."""

    def __init__(self, encoder: nn.Module, categories: int, kind: HeadKind) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = Head(encoder.config.hidden_size, categories, kind)  # type: ignore[union-attr, arg-type]

    def forward(self, ids: Tensor, mask: Tensor) -> Reading:
        states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        reading: Reading = self.head(states, mask)
        return reading


class Served(nn.Module):
    """A screener with the inputs and outputs of its graph.

    ids, mask [B, T] -> mean, deviation [B, C], contributions [B, T, C]
    """

    def __init__(self, screener: Screener) -> None:
        super().__init__()
        self.screener = screener

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        reading = self.screener(ids, mask)
        return reading.labels.mean, reading.labels.deviation, reading.contributions
