"""From a flagged text to an accepted rewrite, or to the reason why there is none.

Knows texts and what is said of them; who rewrites and who judges is handed over.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from lance_edge.acceptance import UNCHANGED, problem, unfit
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
    *,
    passages: Callable[[str], Sequence[Range]],
    found_in: Callable[[Range], tuple[Gradient, ...]],
    repair_alone: Callable[[str, tuple[Gradient, ...]], Repair],
    judge: Callable[[str], tuple[Gradient, ...]],
    is_control: Callable[[str], bool],
    least_kept: float,
    count: Callable[[str], int],
    most_tokens: int,
    max_rounds: int,
) -> Repair:
    """Rewrite the passages of a prompt that carry its hazard, each by itself, and go on with those that carry
    what is left; all else stays as it is. Without a reason if there is no such passage.

    passages      text -> what to rewrite of it, in order; the text is the prompt, or what became of it
                  and was still flagged
    found_in      passage of that text -> gradients of what is to change in it
    repair_alone  passage and its gradients -> its repair
    judge         text -> gradients of what is flagged in it
    count         how many tokens the refiner reads a text as; it reads `most_tokens` of passages in all
    """
    text, tokens = prompt, 0
    steps: tuple[RefineStep, ...] = ()
    quoted: tuple[Gradient, ...] = ()
    reason: str | None = None
    for _ in range(max_rounds):
        chosen = passages(text)
        tokens += sum(count(text[start:end]) for start, end in chosen)
        if tokens > most_tokens:
            reason = reason or f"its flagged passages have more than {most_tokens} tokens"
        if not chosen or tokens > most_tokens:
            break
        pieces: list[str] = []
        behind = 0
        for start, end in chosen:
            found = found_in((start, end))
            done = repair_alone(text[start:end], found)
            steps += done.steps
            if done.refined is None:
                reason = f"a passage could not be rewritten by itself: {done.reason}"
                return _given_up(steps, reason)
            quoted += found
            pieces += [text[behind:start], done.refined]
            behind = end
        text = "".join([*pieces, text[behind:]])
        still: tuple[Gradient, ...] = ()
        wrong = unfit(prompt, text, quoted, is_control, least_kept)
        if wrong is None:
            wrong, still = objections(judge, text)
        if wrong is None:
            return Repair(text, steps, None)
        reason = f"the prompt with its passages rewritten was not accepted: {wrong}"
        if not still:
            break
    return _given_up(steps, reason)


def _given_up(steps: Sequence[RefineStep], reason: str | None) -> Repair:
    """Rewrites of passages that are not given back, whatever each of them is worth."""
    refused = (step if step.problem else replace(step, problem=reason) for step in steps)
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
