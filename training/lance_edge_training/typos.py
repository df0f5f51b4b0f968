"""Prompts as people mistype them, so that a screener learns to read them. Pure functions."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import replace
from string import ascii_lowercase

from lance_edge_training.data import Example

RATES = (0.1, 0.3, 0.6)  # of an example's long words
_LONG_WORD = re.compile(r"[A-Za-z]{4,}")


def with_typos(examples: Sequence[Example], share: float, seed: int) -> list[Example]:
    """The examples in order, a share of them mistyped."""
    rng = random.Random(f"typos-{seed}")
    return [mistyped(item, rng) if rng.random() < share else item for item in examples]


def mistyped(example: Example, rng: random.Random) -> Example:
    """The example with some long words mistyped, in its spans too."""
    rate = rng.choice(RATES)
    words = sorted(set(_LONG_WORD.findall(example.prompt)))
    typos = {word: typo(word, rng) for word in words if rng.random() < rate}

    def typed(text: str) -> str:
        return _LONG_WORD.sub(lambda match: typos.get(match[0], match[0]), text)

    return replace(
        example, prompt=typed(example.prompt), spans=tuple(typed(span) for span in example.spans)
    )


def typo(word: str, rng: random.Random) -> str:
    """The word with one slip behind its first letter: two letters in the wrong order, one left out, one
    typed twice, or another in its place."""
    at = rng.randrange(1, len(word) - 1)
    before, letter, after = word[:at], word[at], word[at + 1 :]
    slips = (
        before + after[0] + letter + after[1:],
        before + after,
        before + letter + letter + after,
        before + rng.choice(ascii_lowercase) + after,
    )
    return rng.choice(slips)
