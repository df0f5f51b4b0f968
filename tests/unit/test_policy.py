"""What a policy file may change, how mistakes in it are met, and what the actions add up to."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lance_edge.bundle import Bundle, open_bundle
from lance_edge.errors import InvalidOption
from lance_edge.policy import LEAST_DEVIATION, STRENGTH, Policy, policy
from lance_edge.verdict import Decision

NAMES = ("violence", "privacy", "child")


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return open_bundle(tiny_bundle)


def with_actions(*actions: Decision) -> Policy:
    """A policy over as many categories, called 0, 1, ..."""
    return Policy(tuple(map(str, range(len(actions)))), np.full(len(actions), 0.5), actions)


def test_without_rules_the_bundle_decides(bundle: Bundle) -> None:
    found = policy(bundle)
    assert found.categories == NAMES
    assert found.thresholds.tolist() == [0.5, 0.5, 0.5]
    assert found.actions == ("rewrite", "rewrite", "block")
    assert (found.unrepaired, found.on_error, found.max_steps) == ("block", "closed", 3)


@pytest.mark.parametrize(
    ("rules", "thresholds", "expected"),
    [
        ({"thresholds": {"privacy": 0.7}}, None, [0.5, 0.7, 0.5]),
        ({"thresholds": {"*": 0.2}}, None, [0.2, 0.2, 0.2]),
        ({"thresholds": {"privacy": 0.7, "*": 0.2}}, None, [0.2, 0.7, 0.2]),
        ({"thresholds": 1}, None, [1, 1, 1]),
        ({"thresholds": None}, None, [0.5, 0.5, 0.5]),
        ({}, 0.3, [0.3, 0.3, 0.3]),
        ({"thresholds": {"privacy": 0.7}}, {"child": 0.9}, [0.5, 0.7, 0.9]),
        ({"thresholds": {"privacy": 0.7}}, {"privacy": 0.9}, [0.5, 0.9, 0.5]),
        ({"thresholds": {"privacy": 0.7}}, 0.9, [0.9, 0.9, 0.9]),
    ],
)
def test_thresholds_given_directly_count_before_those_of_a_file(
    bundle: Bundle, rules: dict[str, Any], thresholds: Any, expected: list[float]
) -> None:
    assert policy(bundle, thresholds, rules).thresholds.tolist() == expected


@pytest.mark.parametrize(
    ("actions", "expected"),
    [
        ({}, ("rewrite", "rewrite", "block")),
        ({"child": "review"}, ("rewrite", "rewrite", "review")),
        ({"*": "advise"}, ("advise", "advise", "advise")),
        ({"violence": "allow", "*": "block"}, ("allow", "block", "block")),
    ],
)
def test_actions_by_category(
    bundle: Bundle, actions: dict[str, str], expected: tuple[str, ...]
) -> None:
    assert policy(bundle, rules={"actions": actions}).actions == expected


def test_other_rules(bundle: Bundle) -> None:
    rules = {"unrepaired": "review", "on_error": "open", "max_steps": 1}
    found = policy(bundle, rules=rules)
    assert (found.unrepaired, found.on_error, found.max_steps) == ("review", "open", 1)


def test_rules_are_not_changed(bundle: Bundle) -> None:
    rules = {"thresholds": {"*": 0.2}, "actions": {"*": "block"}, "max_steps": 2}
    policy(bundle, {"child": 0.4}, rules)
    assert rules == {"thresholds": {"*": 0.2}, "actions": {"*": "block"}, "max_steps": 2}


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"treshold": 0.5}, "a policy has no treshold; it has thresholds, actions"),
        ({"least_log_probability": 0.5}, "must be a number of at most 0, or null, not 0.5"),
        ({"least_log_probability": "-3"}, "must be a number of at most 0, or null, not '-3'"),
        ({"least_log_probability": True}, "must be a number of at most 0, or null, not True"),
        (
            {"least_log_probability": float("nan")},
            "must be a number of at most 0, or null, not nan",
        ),
        ({"other_language": "rewrite"}, "other_language must be read or review or block"),
        ({"other_language": "review"}, "does not say how many of a prompt's words must be known"),
        ({"b": 1, "a": 2}, "a policy has no a, b"),
        ({"thresholds": {"privcy": 0.5}}, "no category 'privcy'; did you mean privacy?"),
        ({"thresholds": {"zzz": 0.5}}, "no category 'zzz'; it has violence, privacy, child"),
        ({"thresholds": {"violence": 0}}, "threshold of violence must be a number above 0"),
        ({"thresholds": {"violence": 1.01}}, "at most 1, not 1.01"),
        ({"thresholds": {"violence": -0.5}}, "at most 1, not -0.5"),
        ({"thresholds": {"violence": float("nan")}}, "threshold of violence"),
        ({"thresholds": {"violence": "0.5"}}, "threshold of violence"),
        ({"thresholds": {"violence": True}}, "at most 1, not True"),
        ({"thresholds": {"violence": None}}, "at most 1, not None"),
        ({"thresholds": {"*": "high"}}, "at most 1, not 'high'"),
        ({"thresholds": [0.5]}, r"threshold for all categories .*, not \[0\.5\]"),
        ({"actions": {"voilence": "block"}}, "did you mean violence?"),
        ({"actions": {"violence": "delete"}}, "one of allow, advise, rewrite, review, block"),
        ({"actions": {"*": "Block"}}, "not 'Block'"),
        ({"actions": {"violence": None}}, "not None"),
        ({"actions": {"violence": ["block"]}}, r"not \['block'\]"),
        ({"actions": "block"}, "actions must map categories to actions, not be 'block'"),
        ({"actions": None}, "actions must map categories to actions, not be None"),
        ({"actions": ["block"]}, "actions must map categories to actions"),
        ({"unrepaired": "allow"}, "unrepaired must be block or review, not 'allow'"),
        ({"unrepaired": None}, "unrepaired must be block or review, not None"),
        ({"on_error": "ajar"}, "on_error must be closed or open, not 'ajar'"),
        ({"on_error": {}}, "on_error must be closed or open"),
        ({"max_steps": 0}, "max_steps must be a whole number of at least 1, not 0"),
        ({"max_steps": -1}, "max_steps must be a whole number of at least 1, not -1"),
        ({"max_steps": 1.5}, "max_steps must be a whole number of at least 1, not 1.5"),
        ({"max_steps": "2"}, "max_steps must be a whole number of at least 1, not '2'"),
        ({"max_steps": True}, "max_steps must be a whole number of at least 1, not True"),
        ({"max_steps": None}, "max_steps must be a whole number of at least 1, not None"),
    ],
)
def test_mistakes_are_named(bundle: Bundle, rules: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidOption, match=message):
        policy(bundle, rules=rules)


def test_mistakes_in_thresholds_given_directly_are_named(bundle: Bundle) -> None:
    with pytest.raises(InvalidOption, match="did you mean child"):
        policy(bundle, {"chidl": 0.5})
    with pytest.raises(InvalidOption, match="at most 1, not 2"):
        policy(bundle, 2)


def test_a_category_is_flagged_from_its_threshold_on_the_most_severe_first() -> None:
    found = Policy(NAMES, np.array([0.5, 0.6, 0.7]), ("block",) * 3)
    assert found.flagged(np.array([0.5, 0.9, 0.699])) == ("privacy", "violence")
    assert found.flagged(np.array([0.8, 0.8, 0.8])) == NAMES  # ties as in the taxonomy
    assert found.flagged(np.zeros(3)) == ()


def test_all_decisions_have_a_strength() -> None:
    assert STRENGTH == ("allow", "advise", "rewrite", "review", "block")
    assert set(STRENGTH) == set(get_args(Decision))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_strongest_flagged_action_decides(size: int) -> None:
    for actions in permutations(STRENGTH, size):
        found = with_actions(*actions)
        assert found.decide(found.categories) == max(actions, key=STRENGTH.index)


def test_advice_is_stronger_than_leave_and_weaker_than_a_rewrite() -> None:
    found = with_actions("allow", "advise", "rewrite")
    assert found.decide(()) == "allow"
    assert found.decide(("0",)) == "allow"
    assert found.decide(("0", "1")) == "advise"
    assert found.decide(("2", "1")) == "rewrite"


def test_only_flagged_categories_act() -> None:
    assert with_actions("rewrite", "block").decide(("0",)) == "rewrite"


@pytest.mark.parametrize("unrepaired", ["review", "block"])
@pytest.mark.parametrize("decision", STRENGTH)
def test_a_closed_policy_decides_at_least_as_for_what_is_not_repaired(
    decision: Decision, unrepaired: Literal["review", "block"]
) -> None:
    found = Policy(NAMES, np.full(3, 0.5), ("rewrite",) * 3, unrepaired, on_error="closed")
    expected = "block" if "block" in (decision, unrepaired) else "review"
    assert found.decide_without(decision) == expected


@pytest.mark.parametrize("decision", STRENGTH)
def test_an_open_policy_allows_only_what_was_to_be_rewritten(decision: Decision) -> None:
    found = Policy(NAMES, np.full(3, 0.5), ("rewrite",) * 3, on_error="open")
    assert found.decide_without(decision) == ("allow" if decision == "rewrite" else decision)


def test_margin_is_the_largest_distance_in_deviations() -> None:
    found = Policy(NAMES, np.array([0.5, 0.5, 0.8]), ("block",) * 3)
    deviation = np.array([0.1, 0.2, 0.1])
    assert found.margin(np.array([0.3, 0.4, 0.2]), deviation) == pytest.approx(-0.5)
    assert found.margin(np.array([0.6, 0.9, 0.2]), deviation) == pytest.approx(2)
    assert found.margin(np.array([0.1, 0.5, 0.2]), deviation) == 0


def test_margin_of_a_certain_label_is_finite() -> None:
    found = Policy(("violence",), np.array([0.5]), ("block",))
    for deviation in (0.0, LEAST_DEVIATION / 2, LEAST_DEVIATION):
        margin = found.margin(np.array([1.0]), np.array([deviation]))
        assert margin == pytest.approx(0.5 / LEAST_DEVIATION)


shares = st.lists(st.floats(0, 1), min_size=3, max_size=3).map(np.array)


@given(shares, shares)
def test_margin_says_whether_anything_is_flagged(
    severity: np.ndarray[Any, Any], deviation: np.ndarray[Any, Any]
) -> None:
    found = Policy(NAMES, np.array([0.3, 0.5, 1.0]), ("block",) * 3)
    assert (found.margin(severity, deviation) >= 0) == bool(found.flagged(severity))


@pytest.mark.parametrize("max_steps", [0, -3])
def test_a_policy_tries_at_least_once(max_steps: int) -> None:
    with pytest.raises(InvalidOption, match="at least 1"):
        Policy(NAMES, np.full(3, 0.5), ("block",) * 3, max_steps=max_steps)
