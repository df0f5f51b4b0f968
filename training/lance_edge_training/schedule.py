"""How the learning rate goes over a run."""

from __future__ import annotations


def warm_then_linear(step: int, steps: int, warmup: float) -> float:
    """Share of the full rate at a step: up over the first `warmup` of all steps, then down to 0."""
    rising = max(1.0, warmup * steps)
    if step < rising:
        return (step + 1) / rising
    return max(0.0, (steps - step) / max(1.0, steps - rising))
