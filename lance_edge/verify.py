"""Whether a bundle computes on this machine what it computed where it was exported."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lance_edge.pipeline import Pipeline


@dataclass(frozen=True)
class GoldenCheck:
    """The largest difference to the goldens over all their prompts, in severity.

    tolerance  what the bundle allows at its precision
    decisions  prompts whose decision differs
    """

    prompts: int
    difference: float
    tolerance: float
    decisions: int

    @property
    def passed(self) -> bool:
        return self.difference <= self.tolerance and self.decisions == 0


def check_goldens(pipeline: Pipeline) -> GoldenCheck:
    """Screen the bundle's golden prompts and compare.

    The pipeline must use the bundle's thresholds and the first look alone, as the goldens do.
    """
    goldens = pipeline.bundle.goldens()
    verdicts = pipeline.screen_many([golden.prompt for golden in goldens])
    difference = max(
        float(np.abs(verdict.severity[name] - value))
        for golden, verdict in zip(goldens, verdicts, strict=True)
        for name, value in golden.severity.items()
    )
    decisions = sum(
        golden.decision != verdict.decision
        for golden, verdict in zip(goldens, verdicts, strict=True)
    )
    return GoldenCheck(
        len(goldens), difference, pipeline.bundle.manifest.screener.tolerance, decisions
    )
