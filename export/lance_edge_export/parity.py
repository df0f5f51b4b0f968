"""Whether each stage of an export still computes what the checkpoint does, on real prompts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lance_edge.bundle import Calibration
from lance_edge.errors import ParityError
from lance_edge.screener import FloatArray, Screener
from lance_edge.tokenizer import Window
from lance_edge_engines import Session


@dataclass(frozen=True)
class Bounds:
    """The most that a stage may change.

    largest_difference  of any severity of any prompt
    mean_difference     of the severities
    flipped_decisions   share of prompts whose flagged categories change from none to some or back
    """

    largest_difference: float
    mean_difference: float
    flipped_decisions: float


# fp32 differs by the order of sums alone. int8 rounds: single prompts near a steep part of the
# sigmoid move further, so its bounds are on the mean and on what users see, the decisions.
BOUNDS = {
    "fp32": Bounds(largest_difference=1e-4, mean_difference=1e-5, flipped_decisions=0.0),
    "fp16": Bounds(largest_difference=0.02, mean_difference=0.0005, flipped_decisions=0.002),
    "int8": Bounds(largest_difference=0.25, mean_difference=0.002, flipped_decisions=0.005),
}
# With one scale for a whole input (plans): 0.4.0's int8 moved severities by 0.0028 on
# average, fp8 by 0.0023, where one scale a row moved them by 0.0018.
FIXED_SCALES = Bounds(largest_difference=0.25, mean_difference=0.004, flipped_decisions=0.005)


@dataclass(frozen=True)
class Parity:
    """What a stage changed, over `prompts` prompts; fields as in Bounds."""

    prompts: int
    largest_difference: float
    mean_difference: float
    flipped_decisions: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def severities(
    session: Session, prompts: list[list[Window]], calibration: list[Calibration]
) -> FloatArray:
    """What the runtime makes of a session's outputs  [prompts, C]"""
    return np.stack([labels.severity for labels in Screener(session, calibration).score(prompts)])


def compare(before: FloatArray, after: FloatArray, thresholds: npt.NDArray[np.float64]) -> Parity:
    """What changed between the severities of two stages  [prompts, C], thresholds [C]"""
    difference = np.abs(before - after)
    flagged_before, flagged_after = (before >= thresholds).any(1), (after >= thresholds).any(1)
    return Parity(
        prompts=len(before),
        largest_difference=float(difference.max()),
        mean_difference=float(difference.mean()),
        flipped_decisions=float((flagged_before != flagged_after).mean()),
    )


def gate(stage: str, parity: Parity, bounds: Bounds) -> None:
    """Raise ParityError if a figure is out of bounds."""
    for name, bound in asdict(bounds).items():
        value = getattr(parity, name)
        if not value <= bound:  # so that a value that is no number fails too
            raise ParityError(
                f"{stage}: {name.replace('_', ' ')} is {value:.3g} and may be {bound:.3g}; nothing was written"
            )
