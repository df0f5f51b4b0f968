"""Whether a bundle computes on this machine what it computed where it was exported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lance_edge.bundle import Bundle
from lance_edge.pipeline import Pipeline

if TYPE_CHECKING:
    from lance_edge_engines.plan_record import PlanEntry

# How far severities may be from the goldens, by precision. Between machines: the order of sums, and
# with int8 the roundings it flips (5.7e-3 between onnxruntime 1.23 and 1.31).
TOLERANCE = {"fp32": 1e-4, "fp16": 1e-2, "int8": 2e-2}


@dataclass(frozen=True)
class GoldenCheck:
    """The largest difference to the goldens over all their prompts, in severity.

    tolerance  what the bundle allows at its precision, or its rounding that a plan does not do, and
               what the plan's own precision adds
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
    tolerance = pipeline.bundle.manifest.screener.tolerance
    if plan := pipeline.plans.get("screener"):
        tolerance = max(tolerance, own_rounding(pipeline.bundle)) + plan_tolerance(plan)
    return GoldenCheck(len(goldens), difference, tolerance, decisions)


def own_rounding(bundle: Bundle) -> float:
    """How far the precision of the bundle's screener moved a severity at most when it was exported.

    Goldens have this rounding in them, and plans, which are made of the same weights, do not.
    """
    measured = bundle.manifest.parity.get(bundle.manifest.screener.precision)
    moved = measured.get("largest_difference") if isinstance(measured, dict) else None
    return float(moved) if isinstance(moved, int | float) else 0.0


def plan_tolerance(plan: PlanEntry) -> float:
    """What a plan's own rounding may add: that of fp16, or what was measured of its 8 bits if more."""
    if plan.parity is None:
        return TOLERANCE["fp32" if plan.precision == "fp32" else "fp16"]
    return max(TOLERANCE["fp16"], plan.parity.largest_difference)
