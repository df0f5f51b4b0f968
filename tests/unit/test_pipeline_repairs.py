"""A prompt from the screener through rewrites to its verdict, with a refiner that says what it is told."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import fake_refiner
import pytest
import tiny_refiner

import lance_edge
from lance_edge.bundle import Calibration
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
    with lance_edge.load(bundle, "cpu", looks="1", threads=1, max_chars=max_chars) as pipeline:
        pipeline._refiner = refiner  # in place of the bundle's, which writes nonsense
        yield pipeline


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
