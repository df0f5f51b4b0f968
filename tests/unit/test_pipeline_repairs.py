"""A prompt from the screener through rewrites to its verdict, with a refiner that says what it is told."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import Mock

import fake_refiner
import numpy as np
import pytest
import tiny_refiner

import lance_edge
from lance_edge import repairer
from lance_edge.bundle import Calibration, SecondLook
from lance_edge.judge import Judge
from lance_edge.refiner import Reading, Refiner
from lance_edge.verdict import Edit

LANGUAGE = fake_refiner.language()
PROMPT = "hello the bomb"


@pytest.fixture(scope="module")
def refiner_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_refiner.write_bundle(tmp_path_factory.mktemp("bundles") / "refiner")


@contextmanager
def guard_that_writes(
    bundle: Path, rewrite: Callable[[str, str], str], max_chars: int = 1000
) -> Iterator[lance_edge.Pipeline]:
    """A pipeline whose refiner reads 96 tokens and writes `rewrite(prompt, critique)`."""
    graph = fake_refiner.FakeGraph(fake_refiner.writer(LANGUAGE, rewrite))
    decoder = fake_refiner.decoder(graph, LANGUAGE.prefix, tiny_refiner.CONTEXT)
    refiner = Refiner(decoder, LANGUAGE, [Calibration(1, 0, 0.5)] * 2, 96, 0.5)
    with lance_edge.load(bundle, "cpu", looks="1", threads=1, max_chars=max_chars) as guard:
        guard._refiner = refiner  # in place of the bundle's, which writes nonsense
        yield guard


def test_a_hazard_is_rewritten(refiner_bundle: Path) -> None:
    with guard_that_writes(refiner_bundle, lambda text, _: text.replace("bomb", "cake")) as guard:
        verdict = guard.refine(PROMPT)
    assert (verdict.decision, verdict.refined, verdict.reason) == (
        "rewrite",
        "hello the cake",
        None,
    )
    assert verdict.critique == 'violence (extreme) in "bomb": no violence'
    assert verdict.diff == (
        Edit("keep", "hello the "),
        Edit("delete", "bomb"),
        Edit("insert", "cake"),
    )


def test_the_second_step_rewrites_the_first_rewrite(refiner_bundle: Path) -> None:
    def rewrite(text: str, critique: str) -> str:
        return (
            text.replace("bomb", "spy") if "violence" in critique else text.replace("spy", "cake")
        )

    with guard_that_writes(refiner_bundle, rewrite) as guard:
        verdict = guard.refine(PROMPT)
    assert verdict.refined == "hello the cake"
    assert [step.text for step in verdict.steps] == ["hello the spy", "hello the cake"]
    assert [step.flagged for step in verdict.steps] == [("privacy",), ()]
    assert verdict.steps[1].critique == 'privacy (extreme) in "spy": no privacy'


def test_one_text_s_cache_is_held_at_a_time(refiner_bundle: Path) -> None:
    made: list[weakref.ref[Reading]] = []
    held = []

    def rewrite(text: str, critique: str) -> str:
        return text.replace("bomb", "spy") if "bomb" in text else text.replace("spy", "cake")

    with guard_that_writes(refiner_bundle, rewrite) as guard:
        read = guard.refiner.read

        def watched(text: str) -> Reading:
            gc.collect()
            held.append(sum(reading() is not None for reading in made))
            reading = read(text)
            made.append(weakref.ref(reading))
            return reading

        guard.refiner.read = watched  # type: ignore[method-assign]
        assert guard.refine(PROMPT).refined == "hello the cake"
    assert held == [0, 0]


@pytest.mark.parametrize(
    "rewrite",
    [
        lambda text, _: "hello the \0 cake",  # no prompt may have a NUL
        lambda text, _: text + " hello" * 4 + " bomb",  # more than max_chars
    ],
    ids=["nul", "max_chars"],
)
def test_a_rewrite_that_is_no_prompt_is_not_accepted(
    refiner_bundle: Path, rewrite: Callable[[str, str], str]
) -> None:
    """The prompt was valid: whatever the refiner writes is no reason to refuse it as invalid."""
    with guard_that_writes(refiner_bundle, rewrite, max_chars=40) as guard:
        verdict = guard.refine(PROMPT)
    assert (verdict.decision, verdict.refined) == ("block", None)
    assert verdict.reason is not None


def test_a_rewrite_too_long_to_be_read_again_is_not_accepted(refiner_bundle: Path) -> None:
    """It is still flagged, and longer than what the refiner reads."""
    prompt = f"{PROMPT} {'x' * 75}"
    with guard_that_writes(refiner_bundle, lambda text, _: f"{text} and again the bomb") as guard:
        verdict = guard.refine(prompt)
    assert (verdict.decision, verdict.refined) == ("block", None)
    assert verdict.reason is not None


def without_bombs(text: str, _: str) -> str:
    return text.replace("bomb", "cake")


def test_a_passage_that_carries_the_hazard_is_rewritten_alone(refiner_bundle: Path) -> None:
    prompt = "hello  the cake.\nthe bomb!  hello?"
    with guard_that_writes(refiner_bundle, without_bombs) as guard:
        verdict = guard.refine(prompt)
    assert (verdict.decision, verdict.refined) == (
        "rewrite",
        "hello  the cake.\nthe cake!  hello?",
    )
    assert [(step.source, step.text) for step in verdict.steps] == [("the bomb!", "the cake!")]
    assert "".join(edit.text for edit in verdict.diff if edit.kind != "insert") == prompt


def test_neighbouring_passages_are_one_and_others_apart(refiner_bundle: Path) -> None:
    with guard_that_writes(
        refiner_bundle, lambda text, _: text.replace("bomb", "cake").replace("kill", "hello")
    ) as guard:
        verdict = guard.refine("the bomb. kill! hello. the kill")
    assert verdict.refined == "the cake. hello! hello. the hello"
    assert [step.source for step in verdict.steps] == ["the bomb. kill!", "the kill"]


def test_where_all_sentences_are_hazardous_the_prompt_is_rewritten_as_a_whole(
    refiner_bundle: Path,
) -> None:
    with guard_that_writes(refiner_bundle, without_bombs) as guard:
        verdict = guard.refine("the bomb. hello bomb ")
    assert [step.source for step in verdict.steps] == [
        "the bomb. hello bomb "
    ]  # as a passage, without the blank
    assert verdict.refined == "the cake. hello cake "


def test_where_all_sentences_are_hazardous_and_long_they_are_rewritten_apart(
    refiner_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repairer, "LONGEST_JOINED", 18)
    with guard_that_writes(refiner_bundle, without_bombs) as guard:
        verdict = guard.refine("the bomb. bomb!  hello the bomb ")
    assert [step.source for step in verdict.steps] == ["the bomb. bomb!", "hello the bomb"]
    assert verdict.refined == "the cake. cake!  hello the cake "


def test_a_passage_that_cannot_be_repaired_alone_leaves_it_to_the_whole_prompt(
    refiner_bundle: Path,
) -> None:
    def rewrite(text: str, _: str) -> str:
        return text.replace("bomb", "cake") if "hello" in text else ""

    with guard_that_writes(refiner_bundle, rewrite) as guard:
        verdict = guard.refine("hello. the bomb")
    assert verdict.refined == "hello. the cake"
    assert [step.source for step in verdict.steps] == ["the bomb", "hello. the bomb"]
    assert [step.problem for step in verdict.steps] == ["it is empty", None]


def test_of_passages_all_must_be_repaired(refiner_bundle: Path) -> None:
    def rewrite(text: str, _: str) -> str:
        return "" if text == "the kill" else text.replace("bomb", "cake").replace("kill", "cake")

    with guard_that_writes(refiner_bundle, rewrite) as guard:
        verdict = guard.refine("the bomb. hello. the kill")
    assert verdict.refined == "the cake. hello. the cake"
    assert [step.problem for step in verdict.steps] == [
        "a passage could not be rewritten by itself: the rewrite was not accepted: it is empty",
        "it is empty",
        None,
    ]


def test_passages_that_are_clean_apart_and_flagged_together_are_not_given_back(
    refiner_bundle: Path,
) -> None:
    """Half a hazard is left in each sentence: the prompt is read as a whole before it is given back."""

    def rewrite(text: str, _: str) -> str:
        return "hello cake" if "hello" in text else text.replace("bomb", "kill safely")

    with guard_that_writes(refiner_bundle, rewrite) as guard:
        verdict = guard.refine("kill safely hello. the bomb")
    assert [step.text for step in verdict.steps] == ["the kill safely", "hello cake"]
    assert verdict.steps[0].problem == (
        "the prompt with its passages rewritten was not accepted: it is still flagged for violence"
    )
    assert verdict.refined == "hello cake"


def test_what_is_left_is_changed_in_the_sentences_that_carry_it(refiner_bundle: Path) -> None:
    """No sentence is flagged by itself once the bomb is gone: together two still are."""

    def rewrite(text: str, _: str) -> str:
        return text.replace("bomb", "hello") if "bomb" in text else text.replace("kill", "cake")

    prompt = "kill safely. hello the. kill safely? hello. the bomb hello"
    with guard_that_writes(refiner_bundle, rewrite) as guard:
        verdict = guard.refine(prompt)
    assert verdict.refined == "cake safely. hello the. cake safely? hello. the hello hello"
    assert [(step.source, step.critique) for step in verdict.steps] == [
        ("the bomb hello", 'violence (extreme) in "bomb": no violence'),
        ("kill safely.", 'violence (extreme) in "kill": no violence'),
        ("kill safely?", 'violence (extreme) in "kill": no violence'),
    ]
    assert all(step.problem is None for step in verdict.steps)


def test_a_hazard_that_no_sentence_has_by_itself_is_changed_where_it_is(
    refiner_bundle: Path,
) -> None:
    harmless = "hello hello the. " * 9
    prompt = f"{harmless}kill safely. hello. kill safely. {harmless}"
    with guard_that_writes(refiner_bundle, lambda text, _: text.replace("kill", "the")) as guard:
        assert not guard.refiner.fits(prompt)
        verdict = guard.refine(prompt)
    assert (verdict.reason, verdict.refined) == (None, prompt.replace("kill", "the"))


def test_sentences_whose_rewrites_are_alike_do_not_repeat(refiner_bundle: Path) -> None:
    one = "the bomb and the kill. hello. "

    def rewrite(text: str, _: str) -> str:
        return "the cake and the cake."

    with guard_that_writes(refiner_bundle, rewrite) as guard:
        verdict = guard.refine(one * 4)
    assert (verdict.reason, verdict.refined) == (None, "the cake and the cake. hello. " * 4)


def test_passages_that_lose_too_much_together_are_not_given_back(refiner_bundle: Path) -> None:
    """Of each alone it is not asked: it has few words."""

    def rewrite(text: str, _: str) -> str:
        return "cake" if "\n" not in text else text.replace("bomb", "cake")

    prompt = "bomb one two three four\nhello\nbomb one two three five"
    with guard_that_writes(refiner_bundle, rewrite) as guard:
        verdict = guard.refine(prompt)
    assert verdict.steps[0].problem == (
        "the prompt with its passages rewritten was not accepted: it loses harmless parts of the prompt"
    )
    assert verdict.refined == prompt.replace("bomb", "cake")


def test_a_prompt_longer_than_the_refiner_reads_is_repaired_in_its_passages(
    refiner_bundle: Path,
) -> None:
    harmless = "hello the cake. " * 9
    stuck_prompt = f"{harmless}the bomb kill. hello"
    with guard_that_writes(refiner_bundle, without_bombs) as guard:
        assert not guard.refiner.fits(harmless)
        verdict = guard.refine(f"{harmless}the bomb. hello")
        stuck = guard.refine(stuck_prompt)
    assert (verdict.decision, verdict.refined) == ("rewrite", f"{harmless}the cake. hello")
    assert (stuck.decision, stuck.refined) == ("block", None)
    assert stuck.reason is not None
    assert stuck.reason.startswith(
        "a passage could not be rewritten by itself: the rewrite was not accepted: "
    )
    assert "; the refiner reads 96 tokens and the prompt has " in stuck.reason
    assert stuck.steps[0].source == "the bomb kill."
    assert all(step.problem is not None for step in stuck.steps)


def test_a_prompt_that_its_passages_make_too_long_is_no_error(refiner_bundle: Path) -> None:
    with guard_that_writes(
        refiner_bundle, lambda text, _: text.replace("bomb", "cake cake"), max_chars=20
    ) as guard:
        verdict = guard.refine("hello hello. bomb")
    assert (verdict.decision, verdict.refined) == ("block", None)
    assert verdict.steps[0].problem is not None
    assert verdict.steps[0].problem.startswith(
        "the prompt with its passages rewritten was not accepted: it cannot be read as a prompt"
    )


def test_template_tokens_outside_the_passages_are_not_given_back(refiner_bundle: Path) -> None:
    prompt = "<|im_end|>hello. the bomb"
    with guard_that_writes(refiner_bundle, without_bombs) as guard:
        verdict = guard.refine(prompt)
    assert [step.source for step in verdict.steps] == ["the bomb", prompt]
    assert (verdict.decision, verdict.refined) == ("block", None)


def test_passages_are_together_no_longer_than_what_the_refiner_reads(refiner_bundle: Path) -> None:
    with guard_that_writes(refiner_bundle, without_bombs) as guard:
        most = guard.refiner.prompt_tokens // guard.refiner.tokenizer.count("bomb.")
        few = guard.refine("bomb. hello. " * most)
        many = guard.refine("bomb. hello. " * (most + 1))
    assert (few.decision, len(few.steps)) == ("rewrite", most)
    assert (many.decision, many.steps) == ("block", ())
    assert many.reason is not None
    assert many.reason.startswith("its flagged passages have ")


def test_a_line_that_nobody_sees_within_a_span_is_no_passage(refiner_bundle: Path) -> None:
    def rewrite(text: str, _: str) -> str:
        return text.replace("bomb", "cake").replace("kill", "cake")

    with guard_that_writes(refiner_bundle, rewrite) as guard:
        (span,) = guard.screen("hello. the bomb\n\u200b\nkill").spans
        assert (span.start, span.end) == (11, 22)  # over all three lines
        verdict = guard.refine("hello. the bomb\n\u200b\nkill")
    assert verdict.refined == "hello. the cake\n\u200b\ncake"


def test_a_passage_in_another_language_is_not_rewritten(refiner_bundle: Path) -> None:
    """Known words around it do not make it one that the refiner writes."""
    known = "hello the cake the cake hello. hello the cake the hello."
    with guard_that_writes(refiner_bundle, without_bombs) as guard:
        guard.refiner.least_known = 0.5
        assert guard.refine(f"{known} the bomb").decision == "rewrite"
        verdict = guard.refine(f"{known} wie baue ich bomb")
    assert (verdict.decision, verdict.steps) == ("block", ())
    assert verdict.reason is not None
    assert verdict.reason.startswith("a passage does not seem to be in a language that the refiner")


def test_where_no_sentence_is_flagged_alone_the_whole_prompt_goes_first(
    refiner_bundle: Path,
) -> None:
    prompt = "kill safely. hello. kill safely."

    def rewrite(text: str, _: str) -> str:
        return "" if text == prompt else text.replace("kill", "cake")

    with guard_that_writes(refiner_bundle, rewrite) as guard:
        verdict = guard.refine(prompt)
    assert [step.source for step in verdict.steps] == [prompt, "kill safely.", "kill safely."]
    assert verdict.refined == "cake safely. hello. cake safely."


def test_of_a_prompt_that_is_mostly_hazard_the_rest_is_changed_with_all_in_view(
    refiner_bundle: Path,
) -> None:
    prompt = "one bomb two bomb three bomb four. kill safely. hello. kill safely."

    def rewrite(text: str, _: str) -> str:
        return text.replace("bomb", "hello").replace("kill", "cake")

    with guard_that_writes(refiner_bundle, rewrite) as guard:
        verdict = guard.refine(prompt)
    assert [step.source for step in verdict.steps] == [
        "one bomb two bomb three bomb four.",
        prompt,
    ]
    assert verdict.refined == rewrite(prompt, "")


def test_a_second_look_at_the_whole_does_not_hide_a_sentence(refiner_bundle: Path) -> None:
    """It reads the prompt as a whole; the hazardous sentence counts as it did before."""
    reading = Reading((), Mock(), 0, np.full(3, -20.0), np.ones(3), 0.0)
    calm = Mock(Refiner, fits=lambda _: True, read=lambda _: reading)
    look = SecondLook({}, low=0.0, high=0.0, share=0.9)
    with lance_edge.load(refiner_bundle, "cpu", looks="1", threads=1) as guard:
        policy = guard.policy
        judge = Judge(guard.tokenizer, guard.screener, policy, 1000, "2", look, lambda: calm, None)
        alone = judge.read("hello the bomb")
        beside = judge.read("hello the bomb. hello the cake.")
    assert policy.flagged(alone.labels.severity) == ()
    assert policy.flagged(beside.whole.severity) == ()
    assert policy.flagged(beside.labels.severity) == ("violence",)
