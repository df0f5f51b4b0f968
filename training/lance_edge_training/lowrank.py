"""Low-rank deltas on a frozen network, and their exact int8 form.

W' = W + scale * B A, with B [out, rank] and A [rank, in] (Hu et al., "LoRA", ICLR 2022).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class LowRank(nn.Module):
    """A frozen linear layer with a trained low-rank delta, zero at the start."""

    def __init__(self, linear: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.scale = scale
        self.a = nn.Parameter(torch.empty(rank, linear.in_features))
        self.b = nn.Parameter(torch.zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.a, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        delta = functional.linear(functional.linear(x, self.a), self.b)
        return self.linear(x) + self.scale * delta  # type: ignore[no-any-return]


def add_low_rank(network: nn.Module, first_layer: int, rank: int, scale: float) -> None:
    """Freeze the network and give each linear layer from block `first_layer` on a delta."""
    network.requires_grad_(False)
    for block in list(network.model.layers)[first_layer:]:  # type: ignore[union-attr, arg-type]
        for part in (block.self_attn, block.mlp):
            for name, layer in list(part.named_children()):
                if isinstance(layer, nn.Linear):
                    setattr(part, name, LowRank(layer, rank, scale))


def low_rank_layers(network: nn.Module) -> dict[str, LowRank]:
    """The deltas by the name of the layer they change."""
    return {name: layer for name, layer in network.named_modules() if isinstance(layer, LowRank)}
