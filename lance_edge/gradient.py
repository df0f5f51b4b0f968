"""Labels to textual gradients and their critique. Pure functions: the same labels, the same text.

One gradient per category: what is hazardous, how strongly, in which words, and which way to
change it. The critique is the gradients, strongest first: what the refiner reads.
Textual gradients as feedback in words: Yuksekgonul et al., "TextGrad", arXiv 2406.07496;
one per rejection category: LANCE, arXiv 2605.07883.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from lance_edge.bundle import Templates
from lance_edge.passages import sentences
from lance_edge.screener import Labels, WindowLabels
from lance_edge.spans import told, word_shares
from lance_edge.verdict import Gradient

MAX_ELEMENTS = 3  # quoted per category; more would only repeat the prompt
MAX_ELEMENT_CHARS = 80

_LONG_WORD = re.compile(r"\w{4}")  # "of" and "so" carry no hazard


def gradients(
    text: str,
    labels: Labels,
    flagged: Sequence[str],
    categories: Sequence[str],
    templates: Templates,
) -> tuple[Gradient, ...]:
    """One gradient for each flagged category, the most severe first.

    categories  the taxonomy's names, in the order of the labels' columns
    """
    columns = sorted(
        (categories.index(name) for name in flagged), key=lambda k: -labels.severity[k]
    )
    found: list[Gradient] = []
    for k in columns:
        words = elements(text, labels.windows, k)
        found.append(gradient(categories[k], float(labels.severity[k]), words, templates, found))
    return tuple(found)


def gradient(
    category: str,
    severity: float,
    words: Sequence[str],
    templates: Templates,
    before: Sequence[Gradient] = (),
    direction: str | None = None,
) -> Gradient:
    """One category's feedback. Its line does not quote again what the lines before it quote.

    direction  in place of the template's
    """
    if direction is None:
        direction = templates.categories[category].direction
    quoted = {word for item in before for word in item.elements}
    fresh = [word for word in words if word not in quoted]
    text = line(category, severity, fresh, direction, templates)
    return Gradient(category, severity, tuple(words), direction, text)


def widened(text: str, found: Sequence[Gradient], templates: Templates) -> tuple[Gradient, ...]:
    """The same gradients, each quoting the whole sentences that its elements stand in.

    For a refiner that left the text as it is: it edits more where more is quoted.
    """
    whole = [text[start:end] for start, end in sentences(text)]
    wider: list[Gradient] = []
    for item in found:
        holding = [s for s in whole if any(element in s for element in item.elements)]
        words = list(dict.fromkeys(holding))[:MAX_ELEMENTS] or item.elements
        wider.append(
            gradient(item.category, item.severity, words, templates, wider, item.direction)
        )
    return tuple(wider)


def line(
    category: str, severity: float, words: Sequence[str], direction: str, templates: Templates
) -> str:
    """A gradient in one line."""
    quoted = ", ".join(f'"{quotable(word)}"' for word in words)
    return templates.line.format(
        topic=templates.categories[category].topic,
        strength=templates.strength(severity),
        elements=templates.elements.format(quoted=quoted) if words else "",
        direction=direction,
    )


def critique(found: Sequence[Gradient], count: Callable[[str], int], templates: Templates) -> str:
    """The gradients' lines, strongest first, as many as fit the templates' budget of tokens.

    A line that does not fit alone goes without its quoted words.

    count  how many tokens the refiner reads a text as
    """
    text = ""
    for item in found:
        longer = f"{text}\n{item.text}" if text else item.text
        if count(longer) > templates.tokens:
            if text:
                break
            longer = line(item.category, item.severity, (), item.direction, templates)
        text = longer
    return text


def elements(text: str, windows: Sequence[WindowLabels], category: int) -> tuple[str, ...]:
    """The words that carry a category, from its most severe window: the strongest, in order."""
    worst = max(windows, key=lambda window: window.severity[category])
    found = told(text, word_shares(worst.window, worst.contributions[:, category]))
    strongest = sorted(found, key=lambda span: -span[2])[:MAX_ELEMENTS]
    ranges = _disjoint(sorted((start, end) for start, end, _ in strongest))
    words = [text[start:end] for start, end in ranges]
    telling = [word for word in words if _LONG_WORD.search(word)]
    return tuple(telling or words)


def _disjoint(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    result: list[tuple[int, int]] = []
    for start, end in ranges:
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        else:
            result.append((start, end))
    return result


def quotable(words: str) -> str:
    """On one line, without double quotes, shortened in the middle."""
    line = re.sub(r"\s+", " ", words).replace('"', "'").strip()
    if len(line) <= MAX_ELEMENT_CHARS:
        return line
    half = MAX_ELEMENT_CHARS // 2 - 3
    head, tail = line[:half].rsplit(" ", 1)[0], line[-half:].split(" ", 1)[-1]
    return f"{head} ... {tail}"
