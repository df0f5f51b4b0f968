"""Token contributions to the words that carry a hazard. Pure functions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lance_edge.screener import FloatArray, WindowLabels
from lance_edge.tokenizer import Window
from lance_edge.verdict import Span

COVER = 0.7  # spans hold the strongest words that together make this share of the evidence
JOIN = 1  # words left out between two chosen ones that still belong to one span
# English words that say nothing without the one after them: no span begins with one or ends on one.
LEADING = frozenset(
    "a an the this that these those my your his her its our their some any i he she we they "
    "and or but of to for with without from in into on onto at by about than as if".split()
)
REACH = 3  # words by which a span grows at most, to end on one that says something

_NEXT_WORD = re.compile(r"\s+\S+")
_FIRST_WORD = re.compile(r"\S+\s+")


@dataclass(frozen=True)
class Word:
    """A word of a window: its characters and its share of the positive evidence."""

    start: int
    end: int
    share: float


def hazard_spans(
    text: str,
    windows: Sequence[WindowLabels],
    flagged: Iterable[str],
    thresholds: FloatArray,
    categories: Sequence[str],
) -> tuple[Span, ...]:
    """The spans of every flagged category, in the windows that put it at or above its threshold  [C]

    Where none does (a second look flagged it), they are those of its most severe window.
    """
    found = []
    for name in flagged:
        k = categories.index(name)
        reaching = [labels for labels in windows if labels.severity[k] >= thresholds[k]]
        for labels in reaching or [max(windows, key=lambda labels: labels.severity[k])]:
            words = word_shares(labels.window, labels.contributions[:, k])
            found += [Span(start, end, name, share) for start, end, share in told(text, words)]
    return merge(found)


def word_shares(window: Window, contributions: FloatArray) -> list[Word]:
    """Each word's share of the positive contributions  [tokens]; empty if there are none.

    The bias stays out: it says how rare a category is, not where it is.
    """
    words: list[tuple[int, int, float]] = []
    previous = -1
    for token, word in enumerate(window.words):
        if word < 0:
            continue
        start, end = window.offsets[token]
        if word == previous:
            first, _, sum_so_far = words.pop()
            words.append((first, int(end), sum_so_far + float(contributions[token])))
        else:
            words.append((int(start), int(end), float(contributions[token])))
        previous = word
    total = sum(max(0.0, weight) for _, _, weight in words)
    if total <= 0:
        return []
    return [Word(start, end, max(0.0, weight) / total) for start, end, weight in words]


def told(text: str, words: Sequence[Word]) -> list[tuple[int, int, float]]:
    """The ranges of a text that carry the evidence of its words: (start, end, share)."""
    ranges = [(*settle(text, start, end), share) for start, end, share in join(words)]
    telling = [item for item in ranges if not _only_leads(text[item[0] : item[1]])]
    return telling or ranges


def join(words: Sequence[Word]) -> list[tuple[int, int, float]]:
    """The strongest words that cover the evidence, neighbours joined: (start, end, share)."""
    chosen: set[int] = set()
    covered = 0.0
    for index in sorted(range(len(words)), key=lambda i: -words[i].share):
        if covered >= COVER:
            break
        chosen.add(index)
        covered += words[index].share
    spans: list[tuple[int, int, float]] = []
    last = -1
    for index in sorted(chosen):
        word = words[index]
        if spans and index - last <= 1 + JOIN:
            start, _, share = spans.pop()
            spans.append(
                (start, word.end, share + sum(w.share for w in words[last + 1 : index + 1]))
            )
        else:
            spans.append((word.start, word.end, word.share))
        last = index
    return spans


def settle(text: str, start: int, end: int) -> tuple[int, int]:
    """The range as a person would mark it: whole words, neither "to make a" nor "a bomb and"
    but "make a bomb". A range of leading words alone stays as it is.
    """
    start, end = snap(text, start, end)
    if _only_leads(text[start:end]):
        return start, end
    for _ in range(REACH):
        following = _NEXT_WORD.match(text, end)
        if following is None or text[start:end].split()[-1].casefold() not in LEADING:
            break
        _, end = snap(text, start, following.end())
    while (first := _FIRST_WORD.match(text, start, end)) and first[0].strip().casefold() in LEADING:
        start = first.end()
    return start, end


def _only_leads(words: str) -> bool:
    return all(word.casefold() in LEADING for word in words.split())


def snap(text: str, start: int, end: int) -> tuple[int, int]:
    """The range widened to whole words, without the punctuation around them.

    The encoder's words end at apostrophes and hyphens; a person's do not.
    """
    while start > 0 and not text[start - 1].isspace():
        start -= 1
    while end < len(text) and not text[end].isspace():
        end += 1
    inner_start, inner_end = start, end
    while inner_start < inner_end and not text[inner_start].isalnum():
        inner_start += 1
    while inner_end > inner_start and not text[inner_end - 1].isalnum():
        inner_end -= 1
    return (inner_start, inner_end) if inner_start < inner_end else (start, end)


def merge(spans: Sequence[Span]) -> tuple[Span, ...]:
    """Overlapping spans of one category, from neighbouring windows, become one; ordered by start."""
    merged: list[Span] = []
    for span in sorted(spans, key=lambda s: (s.category, s.start, s.end)):
        last = merged[-1] if merged else None
        if last and last.category == span.category and span.start < last.end:
            weight = max(last.weight, span.weight)
            merged[-1] = Span(last.start, max(last.end, span.end), span.category, weight)
        else:
            merged.append(span)
    clipped = (Span(s.start, s.end, s.category, min(1.0, s.weight)) for s in merged)
    return tuple(sorted(clipped, key=lambda s: (s.start, s.end, s.category)))
