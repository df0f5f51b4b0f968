"""What a rewrite must be to stand for a prompt, whatever the screener says of it. Pure functions over texts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Hashable, Sequence

from lance_edge.tokenizer import readable
from lance_edge.verdict import Gradient

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


def problem(
    prompt: str,
    rewrite: str,
    ended: bool,
    gradients: Sequence[Gradient],
    is_control: Callable[[str], bool],
    least_kept: float,
) -> str | None:
    """Why what the refiner wrote cannot stand for the prompt, whatever the screener says of it; None if
    it can.

    ended       whether the rewrite came to an end by itself
    is_control  whether a text spells out a token of the prompt template
    least_kept  share of the words outside the gradients' elements that it must keep, in order
    """
    if not ended:
        return "it is too long"
    if phrase := repeated(rewrite, prompt):
        return f"it repeats {phrase!r}"
    if BROKEN in rewrite and BROKEN not in prompt:
        return "it holds half a character"
    return unfit(prompt, rewrite, gradients, is_control, least_kept)


def unfit(
    prompt: str,
    text: str,
    gradients: Sequence[Gradient],
    is_control: Callable[[str], bool],
    least_kept: float,
) -> str | None:
    """Why a text cannot stand for the prompt, whoever wrote it; None if it can. Terms as in `problem`."""
    if not readable(text):
        return "it is empty"
    if is_control(text):
        return "it carries tokens of the prompt template"
    if refuses(text) and not refuses(prompt):
        return "it refuses instead of rewriting"
    if text.strip() == prompt.strip():
        return UNCHANGED
    outside = words_outside(prompt, [word for item in gradients for word in item.elements])
    if len(outside) >= FEWEST_WORDS and kept_in_order(outside, words(text)) < least_kept:
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


def _phrases(text: str) -> Counter[str]:
    found = words(text)
    return Counter(
        " ".join(found[start : start + LONGEST_REPEAT])
        for start in range(len(found) - LONGEST_REPEAT + 1)
    )
