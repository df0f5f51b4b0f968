"""The parts of a prompt that a repair may be limited to. Pure functions."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Collection, Sequence
from itertools import accumulate

from lance_edge.tokenizer import readable
from lance_edge.verdict import Span

Range = tuple[int, int]  # start and end, in characters of the prompt

# The end of a sentence, with what closes it, or of a line. Each run of signs is looked at once.
_BREAK = re.compile(r"(?<![.!?\u2026])[.!?\u2026]+[\"'\u2019\u201d)\]*]*\s+|\n")
# Their full stop ends no sentence; nor does an initial's ("J. K. Rowling", "U.S. history").
LONGEST_ABBREVIATION = 6  # characters, with what stands before it
_ABBREVIATION = re.compile(
    r"(?:^|[\s(\"'])(?i:mr|mrs|ms|dr|prof|st|vs|e\.g|i\.e)$|(?:^|[\s(\"'.])[A-HJ-Z]$"
)
SHORTEST_WRAPPED = 45  # characters of a line that an editor may have broken


def sentences(text: str) -> list[Range]:
    """Where each sentence or line stands, without the blanks around it."""
    found: list[Range] = []
    start = 0
    for match in _BREAK.finditer(text):
        word = max(0, match.start() - LONGEST_ABBREVIATION)
        if match[0][0] == "." and _ABBREVIATION.search(text, word, match.start()):
            continue
        if match[0] == "\n" and _is_wrapped(text, match.start()):
            continue
        found.append((start, match.end()))
        start = match.end()
    found.append((start, len(text)))
    stripped = (_stripped(text, *item) for item in found)
    return [(start, end) for start, end in stripped if start < end]


def apart(text: str) -> list[Range]:
    """The sentences that can be read by themselves; none if it is but one."""
    found = [(start, end) for start, end in sentences(text) if readable(text[start:end])]
    return found if len(found) > 1 else []


def carrying(parts: Sequence[Range], spans: Sequence[Span]) -> list[Range]:
    """The parts that hold some of a span."""
    ordered = sorted((span.start, span.end) for span in spans)
    starts = [start for start, _ in ordered]
    reached = list(accumulate((end for _, end in ordered), max))
    before = [(part, bisect_left(starts, part[1])) for part in parts]
    return [part for part, count in before if count and reached[count - 1] > part[0]]


def joined(
    parts: Sequence[Range], chosen: Collection[Range], is_short: Callable[[int, int], bool]
) -> list[Range]:
    """The chosen parts, neighbours as one where that is short."""
    chosen = set(chosen)
    found: list[Range] = []
    previous = False
    for start, end in parts:
        is_chosen = (start, end) in chosen
        if is_chosen and previous and is_short(found[-1][0], end):
            found[-1] = (found[-1][0], end)
        elif is_chosen:
            found.append((start, end))
        previous = is_chosen
    return found


def _is_wrapped(text: str, end: int) -> bool:
    """Whether a sentence goes on behind the line that ends here: a long one, and the next begins small."""
    length = end - text.rfind("\n", 0, end) - 1
    return (
        length >= SHORTEST_WRAPPED
        and text[end - 1] not in ":;"
        and text[end + 1 : end + 2].islower()
    )


def _stripped(text: str, start: int, end: int) -> Range:
    part = text[start:end]
    return end - len(part.lstrip()), start + len(part.rstrip())
