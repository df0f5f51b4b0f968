"""The loop from a flagged prompt to an accepted rewrite, and repairs of its passages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import fake_refiner
import pytest
from hazard import PROMPT, SAFE, flag
from hypothesis import given
from hypothesis import strategies as st

from lance_edge.passages import Range
from lance_edge.refiner import Rewrite
from lance_edge.repair import Repair, diff, repair, repair_passages
from lance_edge.verdict import Edit, Gradient, RefineStep

LANGUAGE = fake_refiner.language()
VIOLENCE, PRIVACY = flag("violence", "bomb"), flag("privacy", "class")


@dataclass
class Script:
    """A refiner and a judge that say what they were told to say, and note what they were asked."""

    rewrites: Sequence[str | Rewrite]
    verdicts: Sequence[tuple[Gradient, ...]] = ()
    critiques: list[str] = field(default_factory=list)
    judged: list[str] = field(default_factory=list)
    widened: list[str] = field(default_factory=list)
    read: list[str] = field(default_factory=list)

    def rewrite(self, text: str, critique: str) -> Rewrite:
        self.read.append(text)
        self.critiques.append(critique)
        made = self.rewrites[len(self.critiques) - 1]
        return made if isinstance(made, Rewrite) else written(made)

    def judge(self, text: str) -> tuple[Gradient, ...]:
        self.judged.append(text)
        return self.verdicts[len(self.judged) - 1]

    def widen(self, text: str, found: Sequence[Gradient]) -> tuple[Gradient, ...]:
        self.widened.append(text)
        return tuple(replace(item, text=f"{item.category}: all of it") for item in found)

    def run(
        self,
        found: tuple[Gradient, ...] = (VIOLENCE,),
        max_steps: int = 3,
        least_log_probability: float | None = None,
    ) -> Repair:
        return repair(
            PROMPT,
            found,
            compose=lambda left: " / ".join(item.text for item in left),
            rewrite=self.rewrite,
            judge=self.judge,
            widen=self.widen,
            is_control=LANGUAGE.has_control,
            least_kept=0.6,
            least_log_probability=least_log_probability,
            max_steps=max_steps,
        )


def written(text: str, ended: bool = True) -> Rewrite:
    return Rewrite((1, 2, 3), text, ended, -1.5, steps=4, drafted=5, accepted=3, write_ms=1.0)


def test_a_rewrite_that_is_clean_is_accepted() -> None:
    script = Script([SAFE], [()])
    done = script.run()
    assert (done.refined, done.reason) == (SAFE, None)
    assert script.judged == [SAFE]
    (step,) = done.steps
    assert (step.critique, step.text) == ("violence: turn to safety", SAFE)
    assert (step.flagged, step.problem) == ((), None)
    assert (step.tokens, step.decode_steps, step.drafted, step.accepted) == (3, 4, 5, 3)


def test_what_is_left_is_the_next_critique() -> None:
    still = PROMPT.replace("a bomb", "a small device")
    script = Script([still, SAFE], [(PRIVACY, VIOLENCE), ()])
    done = script.run()
    assert done.refined == SAFE
    assert script.critiques == [VIOLENCE.text, f"{PRIVACY.text} / {VIOLENCE.text}"]
    assert script.judged == [still, SAFE]
    assert [step.flagged for step in done.steps] == [("privacy", "violence"), ()]
    assert done.steps[0].problem == "it is still flagged for privacy, violence"
    assert done.steps[1].problem is None


@pytest.mark.parametrize("max_steps", [1, 2, 5])
def test_after_the_last_step_it_is_given_up(max_steps: int) -> None:
    texts = [SAFE.replace("ten", str(number)) for number in range(9)]
    script = Script(texts, [(VIOLENCE,)] * 9)
    done = script.run(max_steps=max_steps)
    assert done.refined is None
    assert done.reason == "the rewrite was not accepted: it is still flagged for violence"
    assert [step.text for step in done.steps] == texts[:max_steps]


@pytest.mark.parametrize(
    ("made", "wrong"),
    [
        (written(""), "it is empty"),
        (written(SAFE, ended=False), "it is too long"),
    ],
)
def test_an_unacceptable_rewrite_ends_the_loop_unjudged(made: Rewrite, wrong: str) -> None:
    script = Script([made])
    done = script.run(max_steps=3)
    assert (done.refined, done.reason) == (None, f"the rewrite was not accepted: {wrong}")
    assert [step.problem for step in done.steps] == [wrong]
    assert script.judged == []


def test_a_rewrite_that_the_refiner_is_unsure_of_is_tried_once_more() -> None:
    other = PROMPT.replace("a bomb", "a kite")
    unsure = replace(written(other), log_probability=-9.26)
    script = Script([unsure, SAFE], [(), ()])
    done = script.run(least_log_probability=-9.0)
    assert done.refined == SAFE
    assert (script.widened, script.judged) == ([PROMPT], [other, SAFE])
    assert done.steps[0].problem == (
        "the refiner is unsure of it: its log-probability is -9.26, below the -9 that is asked for"
    )
    assert [step.log_probability for step in done.steps] == [-9.26, -1.5]


@pytest.mark.parametrize(("least", "accepted"), [(None, True), (-9.26, True), (-9.0, False)])
def test_how_unsure_a_rewrite_may_be_is_asked_for(least: float | None, accepted: bool) -> None:
    unsure = replace(written(SAFE), log_probability=-9.26)
    done = Script([unsure] * 3, [()] * 3).run(least_log_probability=least)
    assert done.refined == (SAFE if accepted else None)
    assert (done.reason is None) == accepted
    assert len(done.steps) == (1 if accepted else 2)  # once more, with more of it quoted


def test_what_is_still_flagged_is_said_before_doubts() -> None:
    unsure = replace(written(SAFE), log_probability=-99.0)
    done = Script([unsure], [(VIOLENCE,)]).run(least_log_probability=-9.0, max_steps=1)
    assert done.reason == "the rewrite was not accepted: it is still flagged for violence"


def test_a_text_that_comes_back_is_tried_once_more_with_more_of_it_quoted() -> None:
    script = Script([PROMPT, SAFE], [()])
    done = script.run()
    assert done.refined == SAFE
    assert script.critiques == [VIOLENCE.text, "violence: all of it"]
    assert script.widened == [PROMPT]
    assert [step.problem for step in done.steps] == ["it changes nothing", None]


def test_a_text_that_comes_back_twice_is_given_up() -> None:
    script = Script([PROMPT] * 9)
    done = script.run(max_steps=9)
    assert done.reason == "the rewrite was not accepted: it changes nothing"
    assert [step.critique for step in done.steps] == [VIOLENCE.text, "violence: all of it"]
    assert len(Script([PROMPT] * 9).run(max_steps=1).steps) == 1


def test_what_is_quoted_is_of_the_text_that_was_judged() -> None:
    still = PROMPT.replace("a bomb", "a small device")
    script = Script([still, still, SAFE], [(PRIVACY,), ()])
    done = script.run()
    assert done.refined == SAFE
    assert script.read == [PROMPT, still, still]
    assert script.widened == [still]
    assert script.critiques[1:] == [PRIVACY.text, "privacy: all of it"]
    assert (
        done.steps[1].problem == "it repeats a rewrite before it: it is still flagged for privacy"
    )
    assert done.steps[1].flagged == done.steps[0].flagged == ("privacy",)


def unsure(text: str) -> Rewrite:
    return replace(written(text), log_probability=-20.0)


def test_the_prompt_is_rewritten_again_where_the_refiner_was_unsure() -> None:
    """Not the rewrite of which it was unsure: that is easily copied."""
    other = PROMPT.replace("a bomb", "a kite")
    script = Script([unsure(SAFE), other], [(), ()])
    done = script.run(least_log_probability=-16.0)
    assert script.read == [PROMPT, PROMPT]
    assert script.widened == [PROMPT]
    assert done.refined == other


@pytest.mark.parametrize("again", [SAFE, f" {SAFE}\n"])
def test_what_the_refiner_was_unsure_of_is_not_accepted_when_it_comes_again(again: str) -> None:
    script = Script([unsure(SAFE), again], [(), ()])
    done = script.run(least_log_probability=-16.0, max_steps=2)
    assert done.refined is None
    assert script.judged == [SAFE]
    assert done.reason is not None
    assert done.reason.startswith(
        "the rewrite was not accepted: it repeats a rewrite before it: the refiner is unsure of it"
    )


def test_a_bound_of_nought_is_one() -> None:
    assert Script([SAFE] * 3, [()] * 3).run(least_log_probability=0.0).refined is None
    assert Script([SAFE], [()]).run(least_log_probability=None).refined == SAFE


def test_a_later_rewrite_is_held_against_the_first_prompt() -> None:
    """The second step may come back to the prompt itself; that is no rewrite."""
    script = Script([SAFE, PROMPT, PROMPT], [(VIOLENCE,)])
    done = script.run()
    assert done.refined is None
    assert done.steps[1].problem == "it changes nothing"


def test_diff_in_words() -> None:
    assert diff("build a bomb, now", "build a kite, right now") == (
        Edit("keep", "build a "),
        Edit("delete", "bomb"),
        Edit("insert", "kite"),
        Edit("keep", ", "),
        Edit("insert", "right "),
        Edit("keep", "now"),
    )
    assert diff("", "") == ()
    assert diff("same", "same") == (Edit("keep", "same"),)


mixed = st.text() | st.text("ab ,\n'\u2019-\u0301", max_size=40)


@given(mixed, mixed)
def test_diff_makes_both_texts(prompt: str, rewrite: str) -> None:
    edits = diff(prompt, rewrite)
    assert "".join(edit.text for edit in edits if edit.kind != "insert") == prompt
    assert "".join(edit.text for edit in edits if edit.kind != "delete") == rewrite
    assert all(edit.text for edit in edits)
    kinds = [edit.kind for edit in edits]
    assert all(before != after for before, after in pairwise(kinds))


class Passages:
    """Each letter of ALPHA is a passage; `repaired` says what becomes of it, `left` what is flagged in a text."""

    def __init__(self, repaired: dict[str, str | None], left: dict[str, str]) -> None:
        self.repaired, self.left = repaired, left
        self.judged: list[str] = []

    def passages(self, text: str) -> list[Range]:
        found = [at for at, letter in enumerate(text) if letter in self.left.get(text, "bd")]
        return [(at, at + 1) for at in found]

    def found_in(self, passage: Range) -> tuple[Gradient, ...]:
        return (flag(f"category {passage[0]}"),)

    def repair_alone(self, passage: str, found: tuple[Gradient, ...]) -> Repair:
        text = self.repaired[passage]
        wrong = None if text else "it is empty"
        step = RefineStep(passage, found[0].category, text or "", (), wrong, -1.5, 3, 4, 5, 3)
        return Repair(text, (step,), wrong)

    def judge(self, text: str) -> tuple[Gradient, ...]:
        self.judged.append(text)
        return (flag("violence"),) if text in self.left else ()

    def repair(self, prompt: str, most_tokens: int = 9, max_rounds: int = 3) -> Repair:
        return repair_passages(
            prompt,
            passages=self.passages,
            found_in=self.found_in,
            repair_alone=self.repair_alone,
            judge=self.judge,
            is_control=lambda text: "<" in text,
            least_kept=0.5,
            count=len,
            most_tokens=most_tokens,
            max_rounds=max_rounds,
        )


def test_passages_are_repaired_and_all_else_stays() -> None:
    made = Passages({"b": "B!", "d": "D"}, {}).repair("a b  c\nd e")
    assert (made.refined, made.reason) == ("a B!  c\nD e", None)
    assert [(step.source, step.critique, step.problem) for step in made.steps] == [
        ("b", "category 2", None),
        ("d", "category 7", None),
    ]


def test_where_one_passage_fails_none_is_given_back() -> None:
    words = Passages({"b": "B", "d": None, "f": "F"}, {"a b d f": "bdf"})
    made = words.repair("a b d f")
    reason = "a passage could not be rewritten by itself: it is empty"
    assert (made.refined, made.reason, words.judged) == (None, reason, [])
    assert [(step.source, step.problem) for step in made.steps] == [
        ("b", reason),
        ("d", "it is empty"),
    ]


def test_what_is_still_flagged_goes_on_with_its_passages() -> None:
    words = Passages({"b": "B", "d": "D", "c": "C"}, {"a B c D": "c"})
    assert words.repair("a b c d").refined == "a B C D"
    assert words.judged == ["a B c D", "a B C D"]


@pytest.mark.parametrize(
    ("words", "limits", "steps"),
    [
        (Passages({"b": "B", "d": "D"}, {"a B c D": ""}), {}, 2),
        (Passages({"b": "B", "d": "D", "c": "C"}, {"a B c D": "c"}), {"max_rounds": 1}, 2),
        (Passages({"b": "B", "d": "D", "c": "C"}, {"a B c D": "c"}), {"most_tokens": 2}, 2),
    ],
    ids=["nothing carries it", "rounds", "tokens"],
)
def test_what_stays_flagged_is_not_given_back(
    words: Passages, limits: dict[str, int], steps: int
) -> None:
    made = words.repair("a b c d", **limits)
    reason = (
        "the prompt with its passages rewritten was not accepted: it is still flagged for violence"
    )
    assert (made.refined, made.reason) == (None, reason)
    assert [step.problem for step in made.steps] == [reason] * steps


def test_passages_that_are_too_long_together_are_not_tried() -> None:
    made = Passages({}, {}).repair("a b c d", most_tokens=1)
    assert made == Repair(None, (), "its flagged passages have more than 1 tokens")
    assert Passages({}, {"a": ""}).repair("a") == Repair(None, (), None)


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ("a b < d", "it carries tokens of the prompt template"),
        ("b d b d b d a", "it loses harmless parts of the prompt"),
    ],
)
def test_the_prompt_with_its_passages_is_held_to_what_a_rewrite_is_held_to(
    prompt: str, reason: str
) -> None:
    words = Passages({"b": "x", "d": "y"}, {})
    made = words.repair(prompt)
    assert made.refined is None
    assert made.reason == f"the prompt with its passages rewritten was not accepted: {reason}"
    assert words.judged == []
