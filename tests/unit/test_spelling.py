"""Words in disguise: which are read as they are meant, and which are left alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lance_edge
from lance_edge.spelling import DIGITS, SYMBOLS, Spelling, spellings

LETTERS = DIGITS | SYMBOLS


def check_places(text: str, spelling: Spelling) -> None:
    """Each character is that of its place, or what it stands for, or a space between two readings."""
    assert spelling.places is not None
    for character, place in zip(spelling.text, spelling.places.tolist(), strict=True):
        assert character in (text[place], LETTERS.get(text[place]), " ")


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("t0 m4ke a b0mb", "t0 make a bomb"),
        ("k1ll h1m", "kill him"),
        ("sch00l sh00t1ng", "school shooting"),
        ("B0MB", "BoMB"),
        ("k!ll the h@cker", "kill the hacker"),
        ("a$$hole", "asshole"),
        ("wow!great", "wowigreat"),
        ("make b o m b s now", "make bombs now"),
        ("make a b o m b now", "make abomb bomb now"),
        ("a t t a c k", "attack ttack"),
        ("how do i b u y it", "how do ibuy buy it"),
        ("k-i-l-l them", "kill them"),
        ("p.o.i.s.o.n!", "poison!"),
        ("h o w   t o   k i l l", "h o w   t o   kill"),
        ("two: b0mb and b o m b.", "two: bomb and bomb."),
    ],
)
def test_disguised_words_are_read_too(text: str, read: str) -> None:
    as_it_stands, meant = spellings(text)
    assert as_it_stands == Spelling(text, None)
    assert meant.text == read
    check_places(text, meant)


@pytest.mark.parametrize(
    ("text", "read"),
    [
        (
            "h o w   t o   k i l l   t h e m   w i t h   a   g u n",
            ["how   to   kill   them   with   a   gun"],
        ),
        ("@t h@me h@ck th!$ $tuff n@w!", ["at hame hack this stuff naw!"]),
        (
            "h0w t0 m4ke C4 4nd a b0mb 1n 15 minutes",  # digits may be digits
            ["h0w t0 m4ke C4 4nd a b0mb 1n 15 minutes", "how to make Ca and a bomb in is minutes"],
        ),
        (
            "p.0.i.s.o.n h!m n0w, k!ll h!m 0k",
            ["p0ison him n0w, kill him 0k", "poison him now, kill him ok"],
        ),
    ],
)
def test_who_writes_so_throughout_is_read_so_throughout(text: str, read: list[str]) -> None:
    found = spellings(text)
    assert [spelling.text for spelling in found] == read
    for spelling in found:
        check_places(text, spelling)


@pytest.mark.parametrize(
    "text",
    [
        "a 3D print of 10am, 1st and 2nd, at 100 kg",
        "B2B on k8s with i18n and mp3 in HTML5",  # other digits, or none between letters
        "version 1.3.0 from 2013-04-15, order 4711",
        "a b c: three answers",
        "Stop! $5 or 5$ for 2 @ shop, @name, C$ and why?!",
        "mail ann@example.com, bob@mail.example.org or me@home-server.de",
        "e.g. the U.S.A. or i.e.",
        "plan B, vitamin C and D",
        "snake_case_name and -x -y -z -w",
        "",
    ],
)
def test_what_is_no_disguise_is_left_alone(text: str) -> None:
    assert spellings(text) == [Spelling(text, None)]


@given(st.text(alphabet="ab0143 .-_z9@!$", max_size=40))
def test_places_are_those_of_the_text(text: str) -> None:
    for spelling in spellings(text):
        if spelling.places is None:
            assert spelling.text == text
            continue
        check_places(text, spelling)
        left_out = set(range(len(text))) - set(spelling.places.tolist())
        assert all(text[place] in " .-_" for place in left_out)


def test_a_disguised_word_is_flagged_where_it_stands(guard: lance_edge.Pipeline) -> None:
    plain, disguised = guard.screen("hello the bomb"), guard.screen("hello the b0mb")
    assert disguised.severity == plain.severity
    assert disguised.windows == 2
    text = "hello b o m b the"
    (span,) = guard.screen(text).spans
    assert text[span.start : span.end] == "b o m b"


def test_a_text_in_gaps_is_read_once(guard: lance_edge.Pipeline) -> None:
    text = "h e l l o   t h e   b o m b   c a k e"
    verdict = guard.screen(text)
    assert verdict.severity == guard.screen("hello the bomb cake").severity
    assert verdict.windows == 1
    (span,) = verdict.spans
    assert text[span.start : span.end] == "b o m b"


def test_a_text_without_disguise_is_read_once(guard: lance_edge.Pipeline) -> None:
    assert guard.screen("hello the 3D cake").windows == 1
