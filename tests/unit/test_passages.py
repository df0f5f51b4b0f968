"""Sentences and lines of a prompt, and the passages that they make."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lance_edge.passages import apart, carrying, joined, sentences
from lance_edge.verdict import Span

LINE = "a line that is as long as those that editors break"


def texts(text: str) -> list[str]:
    return [text[start:end] for start, end in sentences(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One sentence", ["One sentence"]),
        ("Bake it. Then what? Eat!", ["Bake it.", "Then what?", "Eat!"]),
        ("no full stops\nbut lines\n\n and gaps", ["no full stops", "but lines", "and gaps"]),
        ('He said "go." She went.', ['He said "go."', "She went."]),
        ("Wait... what?!  Oh\u2026 well.)  ok", ["Wait...", "what?!", "Oh\u2026", "well.)", "ok"]),
        ("It costs 3.50 at shop.example, v1.2.", ["It costs 3.50 at shop.example, v1.2."]),
        ("Ask Dr. No, e.g. by mail. Now", ["Ask Dr. No, e.g. by mail.", "Now"]),
        ("Is it the Dr? Yes", ["Is it the Dr?", "Yes"]),
        ("Put it first. Then go", ["Put it first.", "Then go"]),  # not "st."
        ("Call. Dr. No e.g. Mr. X", ["Call.", "Dr. No e.g. Mr. X"]),
        ("By J. K. Rowling. Read it", ["By J. K. Rowling.", "Read it"]),
        (
            "In U.S. history (E. coli). So do I. Good",
            ["In U.S. history (E. coli).", "So do I.", "Good"],
        ),
        ("On a PC. Then", ["On a PC.", "Then"]),
        ("1. Mix\n2. Bake", ["1.", "Mix", "2.", "Bake"]),
        (f"{LINE}\ngoes on. Then", [f"{LINE}\ngoes on.", "Then"]),  # an editor broke it
        (f"{LINE}\nGoes on", [LINE, "Goes on"]),
        (f"{LINE}:\ngoes on", [f"{LINE}:", "goes on"]),
        (f"{LINE}.\ngoes on", [f"{LINE}.", "goes on"]),
        (f"{LINE}\n\ngoes on", [LINE, "goes on"]),
        (f"short\n{LINE[:30]}\nlines", ["short", LINE[:30], "lines"]),
        ("  \n ", []),
        ("", []),
    ],
)
def test_sentences(text: str, expected: list[str]) -> None:
    assert texts(text) == expected


@given(st.text(alphabet="aB .!?\n\"'()\u2026", max_size=60))
def test_sentences_hold_all_but_blanks_in_order(text: str) -> None:
    found = sentences(text)
    assert [c for part in texts(text) for c in part if not c.isspace()] == [
        c for c in text if not c.isspace()
    ]
    assert all(before[1] <= after[0] for before, after in pairwise(found))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Bake it. Eat!", ["Bake it.", "Eat!"]),
        ("Bake it", []),
        ("Bake it.\n\u200b\n", []),  # nobody sees the second line
        ("", []),
    ],
)
def test_sentences_stand_apart_where_there_are_several(text: str, expected: list[str]) -> None:
    assert [text[start:end] for start, end in apart(text)] == expected


def test_carrying_are_the_parts_that_a_span_touches() -> None:
    parts = [(0, 5), (6, 10), (11, 20)]
    assert carrying(parts, [Span(4, 7, "violence", 1.0)]) == [(0, 5), (6, 10)]
    assert carrying(parts, [Span(10, 11, "violence", 1.0)]) == []  # between two of them
    assert carrying(parts, []) == []


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ([], []),
        ([(0, 1)], [(0, 1)]),
        ([(0, 1), (2, 3)], [(0, 3)]),
        ([(0, 1), (4, 5)], [(0, 1), (4, 5)]),
        ([(0, 1), (4, 5), (6, 7)], [(0, 1), (4, 7)]),
    ],
)
def test_chosen_neighbours_are_one(
    chosen: list[tuple[int, int]], expected: list[tuple[int, int]]
) -> None:
    assert joined([(0, 1), (2, 3), (4, 5), (6, 7)], chosen, lambda start, end: True) == expected


def test_neighbours_are_one_as_long_as_they_are_short() -> None:
    parts = [(0, 1), (2, 3), (4, 5), (6, 7), (8, 18), (19, 20)]
    found = joined(parts, parts, lambda start, end: end - start <= 5)
    assert found == [(0, 5), (6, 7), (8, 18), (19, 20)]


@pytest.mark.parametrize("run", [" ", ".", "\n", ".)", "e.g. ", "a. ", "A. ", " \n"])
def test_long_runs_are_read_once(run: str) -> None:
    """Quadratic, a million characters would take hours, and this test with them."""
    text = f"a{run * (1_000_000 // len(run))}b"
    parts = sentences(text)
    spans = [Span(0, 1, "violence", 1.0), Span(len(text) - 1, len(text), "violence", 1.0)]
    passages = joined(parts, carrying(parts, spans), lambda start, end: True)
    assert len(passages) == len({parts[0], parts[-1]}) - (len(parts) == 2)
