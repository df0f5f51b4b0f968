"""From a flagged prompt to an accepted rewrite, or to the reason why there is none.

What is acceptable is decided by pure functions over texts; the loop only calls them.
"""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from lance_edge.errors import InvalidPrompt
from lance_edge.refiner import Rewrite
from lance_edge.tokenizer import readable
from lance_edge.verdict import Edit, Gradient, RefineStep

UNCHANGED = "it changes nothing"
FEWEST_WORDS = 6  # outside the hazard, from which on it is asked whether they were kept
BROKEN = "\ufffd"  # what is left of bytes that are no UTF-8
LONGEST_REPEAT = 4  # words in a phrase that may not stand three times

_WORD = re.compile(r"\w+(?:['\u2019-]\w+)*")
# What a model says that declines to answer. People too say "I can't sleep" or "I'm sorry I missed
# your party", and that may stay.
_CANNOT = r"I(?: can ?not| can['\u2019]t| won['\u2019]t|(?: am|['\u2019]m) (?:unable|not able) to)"
_REFUSAL = re.compile(
    r"\bas an AI(?:,| (?:language )?model| assistant)"
    rf"|\bsorry,? (?:but )?{_CANNOT}"
    rf"|\b{_CANNOT} (?:fulfil|assist|comply|(?:help|answer|provide|continue)(?: you)?(?: with)? th(?:at|is)\b"
    r"|(?:create|generate|write) (?:such|this|that|content)\b)",
    re.IGNORECASE,
)
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


def problem(
    prompt: str,
    rewrite: str,
    ended: bool,
    gradients: Sequence[Gradient],
    is_control: Callable[[str], bool],
    least_kept: float,
) -> str | None:
    """Why a text cannot stand for the prompt, whatever the screener says of it; None if it can.

    ended       whether the rewrite came to an end by itself
    is_control  whether a text spells out a token of the prompt template
    least_kept  share of the words outside the gradients' elements that it must keep, in order
    """
    if not readable(rewrite):
        return "it is empty"
    if not ended:
        return "it is too long"
    if is_control(rewrite):
        return "it carries tokens of the prompt template"
    if phrase := repeated(rewrite, prompt):
        return f"it repeats {phrase!r}"
    if BROKEN in rewrite and BROKEN not in prompt:
        return "it holds half a character"
    if refuses(rewrite) and not refuses(prompt):
        return "it refuses instead of rewriting"
    if rewrite.strip() == prompt.strip():
        return UNCHANGED
    outside = words_outside(prompt, [word for item in gradients for word in item.elements])
    if len(outside) >= FEWEST_WORDS and kept_in_order(outside, words(rewrite)) < least_kept:
        return "it loses harmless parts of the prompt"
    return None


def words(text: str) -> list[str]:
    """The words of a text, without case."""
    return [match.group().casefold() for match in _WORD.finditer(text)]


def words_outside(prompt: str, elements: Sequence[str]) -> list[str]:
    """The prompt's words that are in none of the quoted elements."""
    hazard = {word for element in elements for word in words(element)}
    return [word for word in words(prompt) if word not in hazard]


def kept_in_order(wanted: Sequence[str], found: Sequence[str]) -> float:
    """Share of the wanted words that the found ones hold in the same order; 1 if none is wanted."""
    return common_length(wanted, found) / len(wanted) if wanted else 1.0


def common_length(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """The length of the longest common subsequence.

    Bit-parallel (Hyyro, "Bit-parallel LCS-length computation revisited", 2004): bit i of `open_` is
    0 where the subsequence of a's first i + 1 words is longer than that of its first i.
    """
    places: dict[Hashable, int] = {}
    for index, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << index
    every = (1 << len(a)) - 1
    open_ = every
    for word in b:
        matched = open_ & places.get(word, 0)
        open_ = ((open_ + matched) | (open_ - matched)) & every
    return len(a) - open_.bit_count()


def refuses(text: str) -> bool:
    """Whether a text holds a phrase with which models decline to answer."""
    return _REFUSAL.search(text) is not None


def repeated(rewrite: str, prompt: str) -> str | None:
    """A phrase that stands three times in the rewrite and not so often in the prompt."""
    phrases, allowed = _phrases(rewrite), _phrases(prompt)
    found = (phrase for phrase, count in phrases.items() if count >= 3 and count > allowed[phrase])
    return next(found, None)


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


def _phrases(text: str) -> Counter[str]:
    found = words(text)
    return Counter(
        " ".join(found[start : start + LONGEST_REPEAT])
        for start in range(len(found) - LONGEST_REPEAT + 1)
    )
