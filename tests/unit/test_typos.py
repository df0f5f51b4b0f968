"""Mistyped prompts for training."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from lance_edge_training.data import Example
from lance_edge_training.typos import RATES, mistyped, typo, with_typos

PROMPT = "Could you explain to grandmother how sharpened knives wound, and why knives matter?"


def example(prompt: str = PROMPT, spans: tuple[str, ...] = ("sharpened knives wound",)) -> Example:
    return Example(prompt, "own", "harmful", {}, {"violence": 0.5}, True, spans)


@pytest.mark.parametrize("word", ["bomb", "Grandmother", "aaaa"])
def test_a_typo_is_one_slip_behind_the_first_letter(word: str) -> None:
    rng = random.Random(3)
    for _ in range(200):
        made = typo(word, rng)
        assert made[0] == word[0]
        assert abs(len(made) - len(word)) <= 1
        changed = Counter(made) - Counter(word) + (Counter(word) - Counter(made))
        assert changed.total() <= 2  # a swap changes none, a wrong letter two


def test_spans_are_mistyped_as_the_prompt_is() -> None:
    rng = random.Random(5)
    changed = 0
    for _ in range(50):
        made = mistyped(example(), rng)
        (span,) = made.spans
        assert span in made.prompt
        assert made.prompt.count(span.split()[1]) >= 2  # both "knives" alike
        assert len(made.prompt.split()) == len(PROMPT.split())
        changed += made.prompt != PROMPT
    assert changed > 30


def test_short_words_and_signs_stay() -> None:
    assert mistyped(example("how do I fix it, now?", ()), random.Random(1)).prompt == (
        "how do I fix it, now?"
    )


def test_a_share_of_the_examples_is_mistyped_in_order_and_by_seed() -> None:
    rows = [example(f"{PROMPT} {number}") for number in range(400)]
    made = with_typos(rows, 0.25, seed=7)
    assert [item.prompt.split()[-1] for item in made] == [str(n) for n in range(400)]
    changed = sum(item.prompt != row.prompt for item, row in zip(made, rows, strict=True))
    least = 1 - (1 - min(RATES)) ** 9  # a lowest rate may spare all nine long words
    assert 400 * 0.25 * least * 0.6 < changed <= 400 * 0.25 * 1.3
    assert made == with_typos(rows, 0.25, seed=7) != with_typos(rows, 0.25, seed=8)
    assert with_typos(rows, 0.0, seed=7) == rows
