"""What makes a rewrite acceptable."""

from __future__ import annotations

import random

import fake_refiner
import pytest
from hazard import PROMPT, SAFE, flag
from hypothesis import given
from hypothesis import strategies as st

from lance_edge.acceptance import (
    FEWEST_WORDS,
    kept_in_order,
    problem,
    refuses,
    repeated,
    words,
    words_outside,
)

LANGUAGE = fake_refiner.language()


def why_not(rewrite: str, prompt: str = PROMPT, ended: bool = True, *hazard: str) -> str | None:
    found = [flag("violence", *(hazard or ("bomb",)))]
    return problem(prompt, rewrite, ended, found, LANGUAGE.has_control, least_kept=0.6)


@pytest.mark.parametrize("text", ["", " \n\t", "\u200b\u2060", "\u00ad\ufeff"])
def test_problem_empty(text: str) -> None:
    assert why_not(text) == "it is empty"


def test_problem_too_long() -> None:
    assert why_not(SAFE, ended=False) == "it is too long"
    assert why_not(SAFE) is None


@pytest.mark.parametrize("control", fake_refiner.CONTROLS)
def test_problem_template_tokens(control: str) -> None:
    assert why_not(f"{SAFE} {control}") == "it carries tokens of the prompt template"
    assert why_not(SAFE + control[1:]) is None


def test_problem_repeats() -> None:
    phrase = "do it with care"
    assert why_not(f"{SAFE} {f'{phrase}, ' * 3}") == f"it repeats {phrase!r}"
    assert why_not(f"{SAFE} {f'{phrase}, ' * 2}") is None
    assert why_not("no " * 6) == "it repeats 'no no no no'"


def test_a_prompt_may_be_repeated_as_often_as_it_repeats() -> None:
    chant = "row row row your boat " * 3
    assert repeated(chant, chant) is None
    assert repeated(chant * 2, chant) is not None


@pytest.mark.parametrize("rewrite", [PROMPT, f"  {PROMPT}\n"])
def test_problem_changes_nothing(rewrite: str) -> None:
    assert why_not(rewrite) == "it changes nothing"


@pytest.mark.parametrize(
    "phrase",
    [
        "I cannot fulfill this request.",
        "I'm sorry, but I can't help you with that.",
        "Sorry, I can't do that.",
        "I can't help with this.",
        "As an AI language model, I have no opinion.",
        "I am unable to assist.",
        "Sorry, I won\u2019t write it.",
        "I cannot create content of that kind.",
    ],
)
def test_problem_refuses(phrase: str) -> None:
    assert why_not(f"{SAFE} {phrase}") == "it refuses instead of rewriting"
    assert refuses(phrase)


@pytest.mark.parametrize(
    "text",
    [
        "I can't sleep and I'm sorry about that.",
        "What can't be helped?",
        "He won't answer me.",
        "I'm sorry I missed your party.",
        "I'm not able to attend on Friday.",
        "I can't provide receipts for March.",
        "I was hired as an AI engineer.",
        "I can't help my brother with his sums.",
    ],
)
def test_people_may_say_what_they_cannot_do(text: str) -> None:
    assert why_not(f"{SAFE} {text}") is None


def test_a_prompt_about_refusals_may_keep_them() -> None:
    prompt = f'{PROMPT} The model said "I cannot fulfill this request".'
    assert why_not(prompt.replace("a bomb", "a radio"), prompt) is None


def test_problem_loses_harmless_parts() -> None:
    lost = "it loses harmless parts of the prompt"
    assert why_not("Let us bake a cake.") == lost
    assert why_not("parts old of out bomb a build to how ten of class my tell please") == lost
    assert why_not("PLEASE, tell my class of ten: how to build a kite from old parts!") is None


def test_few_harmless_words_need_not_be_kept() -> None:
    prompt = "build a bomb now"
    assert len(words_outside(prompt, ["bomb"])) < FEWEST_WORDS
    assert why_not("How do fireworks work?", prompt) is None


def test_words_of_a_hazard_need_not_be_kept() -> None:
    prompt = "build a very big pipe bomb and then drop it over there"
    rewrite = "Tell me about the history of mining."
    assert why_not(rewrite, prompt, True, prompt) is None
    assert why_not(rewrite, prompt) == "it loses harmless parts of the prompt"


def test_words_without_case_and_punctuation() -> None:
    assert words("Don\u2019t, STRASSE! well-known 'x' --") == [
        "don\u2019t",
        "strasse",
        "well-known",
        "x",
    ]


def test_words_outside_leaves_out_what_is_quoted_wherever_it_stands() -> None:
    assert words_outside("A bomb, the BOMB and the cake", ["the bomb"]) == ["a", "and", "cake"]
    assert words_outside("a b", []) == ["a", "b"]
    assert words_outside("", ["x"]) == []


def test_words_outside_leaves_out_the_middle_of_a_shortened_element() -> None:
    """Elements are shortened in the line alone: all their words are hazard."""
    hazard = " ".join(f"part{number}" for number in range(40))
    assert words_outside(f"please list {hazard}", [hazard]) == ["please", "list"]


def test_a_space_more_changes_nothing() -> None:
    assert why_not(f"{PROMPT} ") == "it changes nothing"


def test_half_a_character_is_a_problem_unless_the_prompt_has_it() -> None:
    def wrong(prompt: str) -> str | None:
        return problem(prompt, "hello \ufffd", True, (), LANGUAGE.has_control, least_kept=0.0)

    assert wrong("hello") == "it holds half a character"
    assert wrong("hello bomb \ufffd") is None


def test_kept_in_order_counts_what_stands_in_order() -> None:
    assert kept_in_order([], ["x"]) == 1
    assert kept_in_order(["a"], []) == 0
    assert kept_in_order("a b c d".split(), "x a c y d".split()) == 0.75
    assert kept_in_order(["a", "b"], ["b", "a"]) == 0.5
    assert kept_in_order(["a", "a"], ["a"]) == 0.5


def test_a_phrase_said_beforehand_loses_nothing() -> None:
    wanted = words("explain how I make old car parts")
    found = words("On old car parts: explain briefly how I could make do with old car parts")
    assert kept_in_order(wanted, found) == 1


@given(st.lists(st.sampled_from("abcd"), max_size=12), st.integers(0, 2**32))
def test_words_that_are_only_added_lose_nothing(wanted: list[str], seed: int) -> None:
    choice = random.Random(seed)
    found: list[str] = []
    for word in wanted:
        found += [*choice.choices("abcdx", k=choice.randrange(3)), word]
    assert kept_in_order(wanted, found) == 1
