"""Thresholds and actions to a decision."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lance_edge.bundle import Bundle
from lance_edge.errors import InvalidOption
from lance_edge.screener import FloatArray
from lance_edge.verdict import Decision

ALL = "*"  # in thresholds: every category that is not named

# The strongest action among the flagged categories decides.
STRENGTH: tuple[Decision, ...] = ("allow", "rewrite", "review", "block")


@dataclass(frozen=True)
class Policy:
    """Per category, in the taxonomy's order: from which severity on it is flagged, and what follows."""

    categories: tuple[str, ...]
    thresholds: FloatArray
    actions: tuple[Decision, ...]

    def flagged(self, severity: FloatArray) -> tuple[str, ...]:
        """Categories at or above their threshold, the most severe first  [C]"""
        order = np.argsort(-severity, kind="stable")
        return tuple(self.categories[k] for k in order if severity[k] >= self.thresholds[k])

    def decide(self, flagged: Sequence[str]) -> Decision:
        """What to do with a prompt that has these categories."""
        actions = [self.actions[self.categories.index(name)] for name in flagged]
        return max(actions, key=STRENGTH.index, default="allow")


def policy(bundle: Bundle, thresholds: Mapping[str, float] | float | None = None) -> Policy:
    """The bundle's policy, with other thresholds for some categories ("*": all others), or one for all.

    Raises InvalidOption for a category that the bundle does not know or a threshold outside 0..1.
    """
    names = tuple(category.name for category in bundle.categories)
    chosen = {name: bundle.calibration[name].threshold for name in names}
    if thresholds is None:
        thresholds = {}
    elif not isinstance(thresholds, Mapping):
        thresholds = {ALL: thresholds}
    changes = dict.fromkeys(names, thresholds[ALL]) if ALL in thresholds else {}
    changes |= {name: value for name, value in thresholds.items() if name != ALL}
    for name, value in changes.items():
        if name not in chosen:
            close = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
            hint = f"did you mean {close[0]}?" if close else f"it has {', '.join(names)}"
            raise InvalidOption(f"the bundle has no category {name!r}; {hint}")
        if not 0 < value <= 1:
            raise InvalidOption(
                f"the threshold of {name} must be above 0 and at most 1, not {value}"
            )
        chosen[name] = float(value)
    return Policy(
        names,
        np.array([chosen[name] for name in names]),
        tuple(category.action for category in bundle.categories),
    )
