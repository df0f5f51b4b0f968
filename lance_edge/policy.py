"""Thresholds and actions to a decision."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from lance_edge.bundle import Bundle
from lance_edge.errors import InvalidOption
from lance_edge.screener import FloatArray
from lance_edge.verdict import Decision

ALL = "*"  # in thresholds: every category that is not named

# The strongest action among the flagged categories decides.
STRENGTH: tuple[Decision, ...] = ("allow", "advise", "rewrite", "review", "block")

LEAST_DEVIATION = 0.02  # of a severity, in `Policy.margin`: below, deviations say nothing more

OnError = Literal["closed", "open"]
OtherLanguage = Literal["read", "review", "block"]

NUMBERS = ("max_steps", "least_log_probability")
# What else a policy may say besides thresholds and actions, and the values it may have.
CHOICES: dict[str, tuple[str, ...]] = {
    "unrepaired": ("block", "review"),
    "on_error": get_args(OnError),
    "other_language": get_args(OtherLanguage),
}


@dataclass(frozen=True)
class Policy:
    """What is flagged, and what follows; categories, thresholds and actions in the taxonomy's order.

    thresholds  severity from which on a category is flagged  [C]
    actions     what a flagged category asks for
    unrepaired  the decision where a prompt should be rewritten and no rewrite is acceptable
    on_error    the refiner fails: "closed" decides as for `unrepaired` at least, "open" allows
                what was to be rewritten
    max_steps   rewrites that are tried of a passage or prompt, each with the critique of what is left
    least_log_probability  log-probability in nats, 0 or less, that each rewrite, of a passage or of
                the prompt, must reach to be given back; None for any
    other_language  at least this is decided for a prompt that does not seem to be in a language that
                    the screener knows; "read" decides as for others
    """

    categories: tuple[str, ...]
    thresholds: FloatArray
    actions: tuple[Decision, ...]
    unrepaired: Literal["block", "review"] = "block"
    on_error: OnError = "closed"
    max_steps: int = 3
    least_log_probability: float | None = None
    other_language: OtherLanguage = "read"

    def __post_init__(self) -> None:
        check_whole("max_steps", self.max_steps)

    def flagged(self, severity: FloatArray) -> tuple[str, ...]:
        """Categories at or above their threshold, the most severe first  [C]"""
        order = np.argsort(-severity, kind="stable")
        return tuple(self.categories[k] for k in order if severity[k] >= self.thresholds[k])

    def decide(self, flagged: Sequence[str]) -> Decision:
        """What to do with a prompt that has these categories."""
        actions = [self.actions[self.categories.index(name)] for name in flagged]
        return max(actions, key=STRENGTH.index, default="allow")

    def stops(self, category: str) -> bool:
        """Whether a flagged category asks for more than advice: a rewrite must not be flagged for it."""
        action = self.actions[self.categories.index(category)]
        return STRENGTH.index(action) > STRENGTH.index("advise")

    def decide_without(self, decision: Decision) -> Decision:
        """What becomes of a decision when the refiner fails: `on_error` says."""
        if self.on_error == "open":
            return "allow" if decision == "rewrite" else decision
        return max(decision, self.unrepaired, key=STRENGTH.index)

    def margin(self, severity: FloatArray, deviation: FloatArray) -> float:
        """How far a prompt is from the other decision, in standard deviations: the largest
        (severity - threshold) / deviation over the categories  [C]. Near 0 the decision is open."""
        distance = (severity - self.thresholds) / np.maximum(deviation, LEAST_DEVIATION)
        return float(distance.max())


def policy(
    bundle: Bundle,
    thresholds: Mapping[str, float] | float | None = None,
    rules: Mapping[str, Any] | str | os.PathLike[str] | None = None,
) -> Policy:
    """The bundle's policy with changes.

    thresholds  by category ("*": all that are not named), or one for all
    rules       a policy file or its contents: `thresholds`, `actions` by category, `unrepaired`,
                `on_error`, `max_steps`, `least_log_probability`, `other_language`; `thresholds` above
                count before these

    Raises InvalidOption for a file that is none, a category that the bundle does not know, a value out of
    its range, or an `other_language` where the bundle does not say how many of a prompt's words must be
    known.
    """
    if isinstance(rules, str | os.PathLike):
        rules = read_rules(Path(rules))
    if not isinstance(rules, Mapping | None):
        raise InvalidOption(
            f"rules must map settings to values or be a policy file's path, not {rules!r}"
        )
    rules = dict(rules or {})
    names = tuple(category.name for category in bundle.categories)
    chosen = {name: bundle.calibration[name].threshold for name in names}
    for change in (rules.pop("thresholds", None), thresholds):
        chosen |= _thresholds(change, names)
    actions = {category.name: category.action for category in bundle.categories}
    actions |= _actions(rules.pop("actions", {}), names)
    for key, allowed in CHOICES.items():
        if key in rules and rules[key] not in allowed:
            raise InvalidOption(f"{key} must be {' or '.join(allowed)}, not {rules[key]!r}")
    if odd := sorted(map(str, set(rules) - {*CHOICES, *NUMBERS})):
        raise InvalidOption(
            f"a policy has no {', '.join(odd)}; it has thresholds, actions, {', '.join(CHOICES)}, "
            f"{' and '.join(NUMBERS)}"
        )
    least = rules.setdefault("least_log_probability", bundle.least_log_probability)
    if isinstance(least, bool) or not isinstance(least, Real | None) or not (least or 0) <= 0:
        raise InvalidOption(
            f"least_log_probability must be a number of at most 0, or null, not {least!r}"
        )
    if rules.get("other_language", "read") != "read" and not bundle.least_known:
        raise InvalidOption(
            f"the bundle {bundle.manifest.name} does not say how many of a prompt's words must be known "
            "(least_known), so other languages cannot be told; leave out other_language"
        )
    return Policy(
        names,
        np.array([chosen[name] for name in names]),
        tuple(actions[name] for name in names),
        **rules,
    )


def read_rules(path: Path) -> dict[str, Any]:
    """The contents of a policy file. Raises InvalidOption."""
    try:
        rules = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_each_once)
    except OSError as error:
        raise InvalidOption(f"the policy file {path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InvalidOption(f"the policy file {path} is not valid JSON ({error})") from error
    if not isinstance(rules, dict):
        raise InvalidOption(
            f"the policy file {path} must hold an object, not {type(rules).__name__}"
        )
    return rules


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. Raises ValueError if a key stands there twice."""
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} stands there twice")
    return values


def _thresholds(
    change: Mapping[str, float] | float | None, names: Sequence[str]
) -> dict[str, float]:
    if change is None:
        return {}
    if not isinstance(change, Mapping):
        change = {ALL: change}
    for name, value in change.items():
        if name != ALL:
            _check_name(name, names)
        if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value <= 1:
            whose = "for all categories" if name == ALL else f"of {name}"
            raise InvalidOption(
                f"the threshold {whose} must be a number above 0 and at most 1, not {value!r}"
            )
    changes = dict.fromkeys(names, change[ALL]) if ALL in change else {}
    changes |= {name: value for name, value in change.items() if name != ALL}
    return {name: float(value) for name, value in changes.items()}


def _actions(change: Mapping[str, Decision], names: Sequence[str]) -> dict[str, Decision]:
    if not isinstance(change, Mapping):
        raise InvalidOption(f"actions must map categories to actions, not be {change!r}")
    changes = dict.fromkeys(names, change[ALL]) if ALL in change else {}
    changes |= {name: action for name, action in change.items() if name != ALL}
    for name, action in changes.items():
        _check_name(name, names)
        if action not in STRENGTH:
            raise InvalidOption(
                f"the action of {name} must be one of {', '.join(STRENGTH)}, not {action!r}"
            )
    return changes


def check_whole(name: str, value: object) -> None:
    """Raise InvalidOption unless a setting is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise InvalidOption(f"{name} must be a whole number of at least 1, not {value!r}")


def _check_name(name: str, names: Sequence[str]) -> None:
    if name in names:
        return
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]}?" if close else f"it has {', '.join(names)}"
    raise InvalidOption(f"the bundle has no category {name!r}; {hint}")
