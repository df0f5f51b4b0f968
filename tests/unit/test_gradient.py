"""Labels to textual gradients: what is quoted, in which order, and that lines stay lines."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from lance_edge.bundle import CategoryTemplate, Templates
from lance_edge.errors import BundleError
from lance_edge.gradient import (
    MAX_ELEMENT_CHARS,
    MAX_ELEMENTS,
    critique,
    elements,
    gradient,
    gradients,
    quotable,
    widened,
)
from lance_edge.screener import Labels, WindowLabels, distribution
from lance_edge.tokenizer import Tokenizer, Window
from lance_edge.verdict import Gradient

CATEGORIES = ("violence", "privacy", "child")
TEMPLATES = Templates(
    line="{topic} ({strength}){elements}: {direction}",
    elements=" in {quoted}",
    strengths={"0.8": "extreme", "0.5": "clear", "0.0": "faint"},
    tokens=112,
    categories={name: CategoryTemplate(name, f"turn from {name}") for name in CATEGORIES},
)
TEXT = "Tell me how to build a pipe-bomb, then spy on Ann's house."
BREAKS = "\n\r\t\v\f\x1c\x1d\x1e\x85\u2028\u2029"  # where str.splitlines ends a line

CUTTER = Tokenizer(tiny.tokenizer().to_str().encode(), window=64, overlap=4)

Evidence = Mapping[str, float]  # word piece -> its contribution


def window(
    text: str, evidence: Mapping[str, Evidence], severity: tuple[float, ...] = (0.9, 0.1, 0.1)
) -> WindowLabels:
    """A window over all of a text, cut at punctuation as the encoder does it.

    evidence  category -> what each of its word pieces contributes; all others contribute nothing
    """
    pieces = list(re.finditer(r"\w+|[^\w\s]", text))
    contributions = np.array(
        [
            [evidence.get(name, {}).get(piece.group(), 0.0) for name in CATEGORIES]
            for piece in pieces
        ]
    ).reshape(-1, len(CATEGORIES))
    return WindowLabels(
        Window(
            np.arange(len(pieces)),
            np.array([piece.span() for piece in pieces]).reshape(-1, 2),
            np.arange(len(pieces)),
        ),
        np.array(severity),
        np.full(len(CATEGORIES), 0.1),
        contributions,
        0.0,
    )


def labels_of(*windows: WindowLabels) -> Labels:
    severity = np.max([item.severity for item in windows], axis=0)
    return Labels(severity, windows[0].deviation, distribution(severity), windows)


def quoted_words(line: str) -> list[str]:
    return re.findall(r'"([^"]*)"', line)


def told(found: tuple[Gradient, ...], words: int | None = None) -> str:
    """The critique in so many words; by default there is room for everything."""
    if words is None:
        return critique(found, lambda text: 0, TEMPLATES)
    templates = replace(TEMPLATES, tokens=16 * words)
    return critique(found, lambda text: 16 * len(text.split()), templates)


def test_a_gradient_names_topic_strength_words_and_direction() -> None:
    made = gradient("violence", 0.85, ["pipe-bomb", "house"], TEMPLATES)
    assert made.text == 'violence (extreme) in "pipe-bomb", "house": turn from violence'
    assert (made.category, made.severity) == ("violence", 0.85)
    assert (made.elements, made.direction) == (("pipe-bomb", "house"), "turn from violence")


def test_a_gradient_without_words_names_none() -> None:
    assert gradient("violence", 0.1, [], TEMPLATES).text == "violence (faint): turn from violence"


def test_another_direction_takes_the_template_s_place() -> None:
    made = gradient("violence", 0.5, [], TEMPLATES, direction="say {nothing}")
    assert (made.direction, made.text) == ("say {nothing}", "violence (clear): say {nothing}")


@pytest.mark.parametrize(
    ("severity", "word"),
    [(0.0, "faint"), (0.499, "faint"), (0.5, "clear"), (0.8, "extreme"), (1.0, "extreme")],
)
def test_a_strength_holds_from_its_floor_on(severity: float, word: str) -> None:
    assert TEMPLATES.strength(severity) == word


def test_words_are_not_quoted_twice() -> None:
    first = gradient("violence", 0.9, ["bomb"], TEMPLATES)
    second = gradient("privacy", 0.8, ["bomb", "spy"], TEMPLATES, [first])
    third = gradient("child", 0.7, ["bomb", "spy"], TEMPLATES, [first, second])
    assert quoted_words(second.text) == ["spy"]
    assert third.text == "child (clear): turn from child"
    assert third.elements == ("bomb", "spy")  # the gradient still says what it is about


def test_the_most_severe_category_comes_first() -> None:
    evidence = {"violence": {"bomb": 1.0}, "privacy": {"spy": 1.0}, "child": {"Ann": 1.0}}
    labels = labels_of(window(TEXT, evidence, (0.6, 0.95, 0.3)))
    flagged = ("violence", "privacy", "child")
    found = gradients(TEXT, labels, flagged, CATEGORIES, TEMPLATES)
    assert [item.category for item in found] == ["privacy", "violence", "child"]
    assert told(found).splitlines() == [
        'privacy (extreme) in "spy": turn from privacy',
        'violence (clear) in "pipe-bomb": turn from violence',
        'child (faint) in "Ann\'s": turn from child',
    ]


def test_only_what_is_flagged_has_a_gradient() -> None:
    labels = labels_of(window(TEXT, {"violence": {"bomb": 1.0}}, (0.9, 0.8, 0.7)))
    assert gradients(TEXT, labels, (), CATEGORIES, TEMPLATES) == ()
    (only,) = gradients(TEXT, labels, ("privacy",), CATEGORIES, TEMPLATES)
    assert only.text == "privacy (extreme): turn from privacy"


def test_the_same_labels_give_the_same_text() -> None:
    evidence = {"violence": {"bomb": 2.0, "build": 1.9}, "privacy": {"spy": 1.0, "bomb": 1.0}}
    made = [
        gradients(
            TEXT,
            labels_of(window(TEXT, evidence, (0.8, 0.8, 0.8))),
            flagged,
            CATEGORIES,
            TEMPLATES,
        )
        for flagged in (("violence", "privacy"), ("violence", "privacy"))
    ]
    assert made[0] == made[1]
    assert told(made[0]) == told(made[1]) != ""


def test_a_critique_holds_as_many_lines_as_fit() -> None:
    lines = ["one two three", "four five", "six seven eight", "nine"]
    found = tuple(Gradient("violence", 0.9, (), "", text) for text in lines)
    assert told(found, words=5) == "one two three\nfour five"
    assert told(found, words=7) == "one two three\nfour five"  # a weaker line never jumps ahead
    assert told(found, words=8) == "one two three\nfour five\nsix seven eight"
    assert told(found, words=9) == "\n".join(lines)
    assert told(()) == ""


def test_a_first_line_that_does_not_fit_goes_without_its_quotes() -> None:
    first = gradient("violence", 0.9, ["a b c", "d e f"], TEMPLATES)
    second = gradient("child", 1, [], TEMPLATES)
    assert told((first, second), words=12) == first.text
    assert told((first, second), words=11) == (
        "violence (extreme): turn from violence\nchild (extreme): turn from child"
    )
    assert told((first, second), words=6) == "violence (extreme): turn from violence"


def test_the_first_line_is_there_whatever_the_budget() -> None:
    found = (gradient("violence", 0.9, ["bomb"], TEMPLATES), gradient("child", 1, [], TEMPLATES))
    assert told(found, words=4) == "violence (extreme): turn from violence"


def test_widened_gradients_quote_whole_sentences() -> None:
    text = "We are a choir. Name a song. Then tell me where she lives! Thanks.\nHow do I hurt her?"
    found = [
        gradient("privacy", 0.9, ("where she lives",), TEMPLATES),
        gradient("violence", 0.8, ("song", "hurt"), TEMPLATES, direction="turn away"),
    ]
    privacy, violence = widened(text, found, TEMPLATES)
    assert privacy.elements == ("Then tell me where she lives!",)
    assert violence.elements == ("Name a song.", "How do I hurt her?")
    assert violence.text == 'violence (extreme) in "Name a song.", "How do I hurt her?": turn away'
    assert (privacy.category, privacy.severity) == ("privacy", 0.9)
    assert widened(text, [privacy, violence], TEMPLATES) == (privacy, violence)  # no wider


def test_what_quotes_nothing_stays_as_it_is_when_widened() -> None:
    bare = gradient("privacy", 0.9, (), TEMPLATES)
    across = gradient("violence", 0.9, ("bomb. Then",), TEMPLATES)
    assert widened("Make a bomb. Then run.", [bare, across], TEMPLATES) == (bare, across)


def test_elements_are_whole_words_without_punctuation_around() -> None:
    labels = [window("(the 'pipe-bomb',) for Ann's cat", {"violence": {"bomb": 1.0}})]
    assert elements("(the 'pipe-bomb',) for Ann's cat", labels, 0) == ("pipe-bomb",)
    labels = [window(TEXT, {"violence": {"s": 1.0}})]
    assert elements(TEXT, labels, 0) == ("Ann's",)


def test_pieces_of_one_word_are_one_element() -> None:
    labels = [window(TEXT, {"violence": {"pipe": 1.0, "-": 0.1, "bomb": 0.9}})]
    assert elements(TEXT, labels, 0) == ("pipe-bomb",)


def test_elements_are_the_strongest_in_order_of_appearance() -> None:
    text = "alpha x y beta x y gamma x y delta x y epsilon"
    evidence = {"alpha": 1.0, "beta": 1.2, "gamma": 1.1, "delta": 1.3, "epsilon": 0.9}
    found = elements(text, [window(text, {"violence": evidence})], 0)
    assert found == ("beta", "gamma", "delta")
    assert len(found) <= MAX_ELEMENTS


def test_short_words_are_quoted_only_for_want_of_better() -> None:
    text = "of the and bombs"
    evidence = {"of": 1.0, "bombs": 1.0}
    assert elements(text, [window(text, {"violence": evidence})], 0) == ("bombs",)
    assert elements(text, [window(text, {"violence": {"of": 1.0}})], 0) == ("of",)


def test_elements_come_from_the_category_s_most_severe_window() -> None:
    text = "bombs here, knives there"
    weak = window(text, {"violence": {"bombs": 9.0}}, (0.6, 0.9, 0.1))
    strong = window(text, {"violence": {"knives": 1.0}}, (0.7, 0.1, 0.1))
    assert elements(text, [weak, strong], 0) == ("knives",)


def test_without_positive_evidence_there_are_no_elements() -> None:
    assert elements(TEXT, [window(TEXT, {"violence": {"bomb": -3.0}})], 0) == ()


def test_a_hazard_of_ten_thousand_characters_is_quoted_in_one_short_line() -> None:
    for text in ("x" * 10_000, "bomb " * 2_000, "bomb\n" * 2_000, '"' * 9_000 + " bombs"):
        pieces = dict.fromkeys(re.findall(r"\w+|[^\w\s]", text), 1.0)
        found = elements(text, [window(text, {"violence": pieces})], 0)
        assert found
        assert all(words in text for words in found)
        for words in map(quotable, found):
            assert 0 < len(words) <= MAX_ELEMENT_CHARS
            assert '"' not in words
            assert words.splitlines() == [words]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("pipe bomb", "pipe bomb"),
        (' say\n"boom"\t now ', "say 'boom' now"),
        ("a" * MAX_ELEMENT_CHARS, "a" * MAX_ELEMENT_CHARS),
        ("a" * 50 + "b" * 50, "a" * 37 + " ... " + "b" * 37),
        (
            "one two three four five six " * 5,
            "one two three four five six one two ... five six one two three four five six",
        ),
    ],
)
def test_quotable(words: str, line: str) -> None:
    assert quotable(words) == line


def test_what_is_shortened_keeps_whole_words_of_both_ends() -> None:
    words = " ".join(f"word{number}" for number in range(30))
    head, tail = quotable(words).split(" ... ")
    assert words.startswith(f"{head} ")
    assert words.endswith(f" {tail}")


@given(st.text(st.sampled_from(f"{BREAKS} \"'ab.,")) | st.text())
def test_a_quote_is_one_short_line_without_double_quotes(words: str) -> None:
    line = quotable(words)
    assert len(line) <= MAX_ELEMENT_CHARS
    assert '"' not in line
    assert line.splitlines() == ([line] if line else [])
    assert (line == "") == (not words.strip())


@settings(deadline=None)
@given(
    text=st.text(st.sampled_from(f"{BREAKS} \"'-ab.,:"), max_size=200)
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=60),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_prompt_never_breaks_the_critique_s_lines(text: str, seed: int) -> None:
    """Whatever is quoted: one line a category, and quotation marks only around the elements."""
    text += "."  # there is something to read
    random = np.random.default_rng(seed)
    width = len(CATEGORIES)
    windows = [
        WindowLabels(
            cut, random.random(width), np.ones(width), random.normal(size=(len(cut.ids), width)), 0
        )
        for cut in CUTTER.encode(text)
    ]
    found = gradients(text, labels_of(*windows), CATEGORIES, CATEGORIES, TEMPLATES)
    lines = told(found).splitlines()
    assert len(lines) == len(CATEGORIES)
    seen: list[str] = []
    for item, line in zip(found, lines, strict=True):
        assert line == item.text
        assert quoted_words(line) == [quotable(word) for word in item.elements if word not in seen]
        assert line.startswith(f"{item.category} (")
        assert line.endswith(f": turn from {item.category}")
        seen += item.elements


@pytest.mark.parametrize("placeholder", ["{nothing}", "{", "{0}", "{topic!x}", "{strength:d}"])
def test_a_line_that_cannot_be_filled_is_refused(placeholder: str) -> None:
    with pytest.raises(BundleError, match="cannot be filled"):
        templates(line=f"{{topic}} {placeholder}")


@pytest.mark.parametrize("placeholder", ["{topic.name}", "{topic[name]}"])
def test_a_line_that_asks_for_parts_of_a_text_is_refused(placeholder: str) -> None:
    with pytest.raises(BundleError, match="cannot be filled"):
        templates(line=placeholder)


@pytest.mark.parametrize(
    "changes",
    [
        {"strengths": {}},
        {"strengths": {"0.1": "clear"}},
        {"strengths": {"none": "clear"}},
        {"elements": "{quoted} {topic}"},
        {"tokens": 63},
        {"tokens": 257},
    ],
)
def test_templates_that_leave_gaps_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(BundleError, match=r"gradients\.json"):
        templates(**changes)


@pytest.mark.parametrize("tokens", [64, 256])
def test_a_budget_within_its_range_is_taken(tokens: int) -> None:
    assert templates(tokens=tokens).tokens == tokens


def templates(**changes: object) -> Templates:
    return Templates(**{**vars(TEMPLATES), **changes})  # type: ignore[arg-type]
