"""From a flagged text to an accepted rewrite, or to the reason why there is none.

Knows texts and what is said of them; who rewrites and who judges is handed over.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from lance_edge.acceptance import UNCHANGED, problem
from lance_edge.errors import InvalidPrompt
from lance_edge.passages import Range
from lance_edge.refiner import Rewrite
from lance_edge.verdict import Edit, Gradient, RefineStep

_PIECE = re.compile(r"\s+|\w+(?:['\u2019-]\w+)*|[^\w\s]")


@dataclass(frozen=True)
class Repair:
    """The accepted rewrite with the steps that led to it, or the reason why there is none."""

    refined: str | None
    steps: tuple[RefineStep, ...]
    reason: str | None


def repair(
    prompt: str,
    found: tuple[Gradient, ...],
    *,
    compose: Callable[[Sequence[Gradient]], str],
    rewrite: Callable[[str, str], Rewrite],
    judge: Callable[[str], tuple[Gradient, ...]],
    widen: Callable[[str, Sequence[Gradient]], tuple[Gradient, ...]],
    is_control: Callable[[str], bool],
    least_kept: float,
    least_log_probability: float | None,
    max_steps: int,
) -> Repair:
    """Rewrite, read the rewrite as any prompt is read, accept it or go on with what is left.

    A text that comes back as it was, or as it was tried before, or of which the refiner is unsure, is tried
    once more, with a critique that quotes more of it.

    compose  gradients -> critique
    rewrite  text and a critique of it -> a rewrite; the text is the prompt, or the last rewrite that
             was still flagged
    judge    text -> gradients of what is flagged in it
    widen    text and its gradients -> the same, quoting more

    least_log_probability  of a rewrite as a whole, in nats; None for any
    """
    least = -math.inf if least_log_probability is None else least_log_probability
    steps: list[RefineStep] = []
    text, left = prompt, found
    told = compose(left)
    while True:
        made = rewrite(text, told)
        wrong = problem(prompt, made.text, made.ended, found, is_control, least_kept)
        before = next((step for step in steps if step.text.strip() == made.text.strip()), None)
        flagged: tuple[str, ...] = ()
        still: tuple[Gradient, ...] = ()
        unsure = False
        if wrong is None and before is not None:
            wrong, flagged = f"it repeats a rewrite before it: {before.problem}", before.flagged
        elif wrong is None:
            wrong, still = objections(judge, made.text)
            flagged = tuple(item.category for item in still)
            unsure = wrong is None and made.log_probability < least
        if unsure:
            wrong = (
                f"the refiner is unsure of it: its log-probability is {made.log_probability:.2f}, below "
                f"the {least:g} that is asked for"
            )
        steps.append(
            RefineStep(
                source=text,
                critique=told,
                text=made.text,
                flagged=flagged,
                problem=wrong,
                log_probability=made.log_probability,
                tokens=len(made.ids),
                decode_steps=made.steps,
                drafted=made.drafted,
                accepted=made.accepted,
            )
        )
        if wrong is None:
            return Repair(made.text, tuple(steps), None)
        if still:
            text, left = made.text, still
        elif unsure or before is not None or wrong == UNCHANGED:
            left = widen(text, left)
        last, told = told, compose(left)
        if len(steps) == max_steps or (not still and told == last):
            return Repair(None, tuple(steps), f"the rewrite was not accepted: {wrong}")


def repair_passages(
    prompt: str,
    places: Sequence[Range],
    *,
    repair_alone: Callable[[str], Repair | None],
    wrong_with: Callable[[str], str | None],
) -> Repair:
    """Rewrite these passages of a prompt, each by itself; all else stays as it is.

    repair_alone  passage -> its repair; None if it may not be rewritten by itself
    wrong_with    the prompt with all of them repaired -> why it cannot stand for it; None if it can
    """
    pieces: list[str] = []
    steps: tuple[RefineStep, ...] = ()
    behind = 0
    for start, end in places:
        done = repair_alone(prompt[start:end])
        if done is None or done.refined is None:
            tried, why = ((), "it may not be") if done is None else (done.steps, done.reason)
            reason = f"a passage could not be rewritten by itself: {why}"
            return _given_up((*steps, *tried), "another passage was not repaired", reason)
        steps += done.steps
        pieces += [prompt[behind:start], done.refined]
        behind = end
    refined = "".join([*pieces, prompt[behind:]])
    if wrong := wrong_with(refined):
        reason = f"the prompt with its passages rewritten was not accepted: {wrong}"
        return _given_up(steps, f"the prompt with it: {wrong}", reason)
    return Repair(refined, steps, None)


def _given_up(steps: Sequence[RefineStep], problem: str, reason: str) -> Repair:
    """Rewrites of passages that are not given back, whatever each of them is worth."""
    refused = (step if step.problem else replace(step, problem=problem) for step in steps)
    return Repair(None, tuple(refused), reason)


def objections(
    judge: Callable[[str], tuple[Gradient, ...]], text: str
) -> tuple[str | None, tuple[Gradient, ...]]:
    """What the screener holds against a rewrite, and the gradients of it; None and nothing if it is clean."""
    try:
        still = judge(text)
    except InvalidPrompt as error:
        return f"it cannot be read as a prompt: {error}", ()
    if not still:
        return None, ()
    return f"it is still flagged for {', '.join(item.category for item in still)}", still


def diff(prompt: str, rewrite: str) -> tuple[Edit, ...]:
    """The word diff; kept and deleted stretches make the prompt, kept and inserted the rewrite."""
    before, after = _PIECE.findall(prompt), _PIECE.findall(rewrite)
    edits: list[Edit] = []
    matcher = difflib.SequenceMatcher(None, before, after)  # autojunk: quick on repetitive text
    for _, a, b, c, d in matcher.get_opcodes():
        if before[a:b] == after[c:d]:
            edits.append(Edit("keep", "".join(before[a:b])))
            continue
        if a < b:
            edits.append(Edit("delete", "".join(before[a:b])))
        if c < d:
            edits.append(Edit("insert", "".join(after[c:d])))
    return tuple(edits)
