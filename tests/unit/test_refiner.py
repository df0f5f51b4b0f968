"""Reading and rewriting over a fake decoder: what is read once, what is cut, what comes back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import fake_refiner
import numpy as np
import pytest
from fake_refiner import TEMPLATE, FakeGraph, Following
from hypothesis import given, settings
from hypothesis import strategies as st

from lance_edge.bundle import BaseSpec, Calibration, FileEntry, RefinerSpec
from lance_edge.decoder import Decoder
from lance_edge.errors import BundleError
from lance_edge.llama import LlamaShape
from lance_edge.refiner import CRITIQUE_TOKENS, Refiner, Rewrite, longest_rewrite
from lance_edge_engines import FakeSession, SessionError, TensorSpec

LANGUAGE = fake_refiner.language()
PROMPT = "how to build the bomb in the kitchen"


def by_critique(prompt: str, critique: str) -> str:
    """A model that puts the critique's words for the bomb."""
    return prompt.replace("bomb", critique)


def refiner_of(
    following: Following, context: int = 2048, prompt_tokens: int = 512
) -> tuple[Refiner, FakeGraph]:
    graph = FakeGraph(following)
    decoder = fake_refiner.decoder(graph, LANGUAGE.prefix, context)
    calibration = [Calibration(2.0, 1.0, 0.5), Calibration(0.5, -3.0, 0.5)]
    return Refiner(decoder, LANGUAGE, calibration, prompt_tokens, 0.6), graph


def writer(rewrite: Callable[[str, str], str]) -> Following:
    return fake_refiner.writer(LANGUAGE, rewrite)


def settled(made: Rewrite) -> Rewrite:
    """Without the time it took."""
    return replace(made, write_ms=0.0)


def test_reading_sees_prefix_and_prompt_and_calibrates_the_look() -> None:
    refiner, graph = refiner_of(writer(by_critique))
    reading = refiner.read(PROMPT)
    sequence = LANGUAGE.before_critique(LANGUAGE.encode(PROMPT))
    assert graph.runs == [(len(LANGUAGE.prefix), sequence[len(LANGUAGE.prefix) :])]
    assert reading.cache.state.read("ids").tolist() == sequence
    assert reading.length == reading.cache.length == len(sequence)
    # The graph's latent means are the last token and the length, its deviations 1 and 2.
    assert reading.mean.tolist() == [2 * sequence[-1] + 1, 0.5 * len(sequence) - 3]
    assert reading.deviation.tolist() == [2, 1]


def test_rewrite_goes_on_from_the_reading() -> None:
    """The prompt is read once; a rewrite reads only the critique and its own tokens."""
    refiner, graph = refiner_of(writer(by_critique))
    reading = refiner.read(PROMPT)
    graph.runs.clear()
    made = refiner.rewrite(reading, "cake")
    assert made.text == "how to build the cake in the kitchen"
    assert graph.runs[0] == (reading.length, LANGUAGE.after_prompt("cake"))
    assert min(past for past, _ in graph.runs) == reading.length
    new = sum(len(read) for _, read in graph.runs)
    # Every token of critique and rewrite is read once, rejected drafts and fillers aside.
    extra = made.drafted - made.accepted + len(graph.runs)
    assert new <= len(LANGUAGE.after_prompt("cake")) + len(made.ids) + extra
    assert new < len(LANGUAGE.encode(PROMPT)) + len(made.ids) + extra
    assert made.steps == len(graph.runs) < len(made.ids)
    assert 0 < made.accepted <= made.drafted


@pytest.mark.parametrize("speculative", [True, False])
def test_a_rewrite_is_as_likely_as_its_tokens_together(speculative: bool) -> None:
    refiner, _ = refiner_of(writer(by_critique))
    made = refiner.rewrite(refiner.read(PROMPT), "cake", speculative)
    tokens = np.array([*made.ids, LANGUAGE.end])
    assert made.log_probability == fake_refiner.log_probabilities(tokens).sum() < 0


def test_a_rewrite_whose_likelihood_is_not_a_number_is_a_fault_of_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refiner, _ = refiner_of(writer(by_critique))
    reading = refiner.read(PROMPT)
    nothing = np.array([np.nan])
    monkeypatch.setattr(fake_refiner, "log_probabilities", lambda tokens: nothing)
    with pytest.raises(SessionError, match="not numbers"):
        refiner.rewrite(reading, "cake")


def test_one_reading_serves_several_critiques() -> None:
    refiner, _ = refiner_of(writer(by_critique))
    reading = refiner.read(PROMPT)
    first = refiner.rewrite(reading, "cake")
    second = refiner.rewrite(reading, "a shelf for the pans")
    assert second.text == "how to build the a shelf for the pans in the kitchen"
    assert settled(refiner.rewrite(reading, "cake")) == settled(first)


def test_rewrite_is_the_same_without_drafts() -> None:
    refiner, graph = refiner_of(writer(by_critique))
    reading = refiner.read(PROMPT)
    fast = refiner.rewrite(reading, "cake")
    graph.runs.clear()
    plain = refiner.rewrite(reading, "cake", speculative=False)
    assert (plain.ids, plain.text, plain.ended) == (fast.ids, fast.text, True)
    assert (plain.steps, plain.drafted, plain.accepted) == (len(plain.ids) + 1, 0, 0)
    assert all(len(read) > 1 for _, read in graph.runs)


@pytest.mark.parametrize("speculative", [True, False])
def test_a_rewrite_without_end_is_cut(speculative: bool) -> None:
    refiner, _ = refiner_of(writer(lambda prompt, _: prompt * 9))
    made = refiner.rewrite(refiner.read(PROMPT), "", speculative)
    limit = longest_rewrite(len(LANGUAGE.encode(PROMPT)))
    assert (len(made.ids), made.ended) == (limit, False)
    assert made.text == LANGUAGE.decode(LANGUAGE.encode(PROMPT * 9)[:limit])


def test_a_rewrite_that_ends_at_the_limit_is_whole() -> None:
    limit = longest_rewrite(len(LANGUAGE.encode("x")))
    for length, ended in ((limit - 1, True), (limit, False)):
        refiner, _ = refiner_of(writer(lambda *_, n=length: "q" * n))
        made = refiner.rewrite(refiner.read("x"), "")
        assert (made.text, made.ended) == ("q" * length, ended)


def test_an_empty_rewrite_has_no_tokens() -> None:
    refiner, _ = refiner_of(writer(lambda *_: ""))
    made = refiner.rewrite(refiner.read(PROMPT), "cake")
    assert (made.ids, made.text, made.ended, made.steps) == ((), "", True, 1)


@settings(max_examples=60, deadline=None)
@given(
    prompt=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30),
    rewrite=st.text(st.characters(exclude_categories=["Cs"]), max_size=10),
)
def test_text_comes_back_as_it_was_written(prompt: str, rewrite: str) -> None:
    """Whatever its script: a prompt copied with something written before it."""
    following = writer(lambda prompt, _: rewrite + prompt)
    refiner, _ = refiner_of(following)
    made = refiner.rewrite(refiner.read(prompt), "turn to safety")
    if made.ended:
        assert made.text == rewrite + prompt
        assert LANGUAGE.decode(list(made.ids)) == made.text
    else:
        assert len(LANGUAGE.encode(rewrite + prompt)) >= len(made.ids)


def test_a_prompt_fits_up_to_its_tokens() -> None:
    refiner, _ = refiner_of(lambda ids: 0, prompt_tokens=3)
    assert refiner.fits("abc")
    assert not refiner.fits("abcd")
    assert not refiner.fits("\N{GRINNING FACE}")  # four bytes


@pytest.mark.parametrize("prompt_tokens", [16, 100, 512])
def test_the_longest_prompt_fits_the_least_context(prompt_tokens: int) -> None:
    """A context that a bundle may name has room for the longest prompt the bundle names."""
    context = next(size for size in range(3, 100_000) if accepts(size, prompt_tokens))
    following = writer(lambda prompt, _: prompt)
    refiner, _ = refiner_of(following, context, prompt_tokens)
    longest = "a" * prompt_tokens
    assert refiner.fits(longest)
    assert refiner.rewrite(refiner.read(longest), "turn to safety").text == longest


def test_the_exported_context_has_room_for_every_prompt() -> None:
    """The figures of `lance_edge_export.refiner`."""
    following = writer(lambda prompt, _: prompt)
    refiner, _ = refiner_of(following, context=2048, prompt_tokens=512)
    for length in (1, 100, 300, 400, 450, 512):
        reading = refiner.read("a" * length)
        assert reading.cache.capacity <= 2048


def test_a_critique_has_its_room_and_no_more() -> None:
    refiner, _ = refiner_of(writer(lambda prompt, _: prompt * 9))
    reading = refiner.read("a" * 50)
    longest = refiner.rewrite(reading, "x" * CRITIQUE_TOKENS)
    assert len(longest.ids) == longest_rewrite(50)  # and the longest rewrite fits behind it
    with pytest.raises(ValueError, match=f"more than {CRITIQUE_TOKENS} tokens"):
        refiner.rewrite(reading, "x" * (CRITIQUE_TOKENS + 1))


def test_looks_that_are_not_numbers_are_a_fault_of_the_device() -> None:
    outputs = {
        "tokens": [0],
        "log_probabilities": [0.0],
        "mean": [float("nan"), 0],
        "deviation": [1, 1],
    }
    specs = [TensorSpec(name, np.dtype(np.float32), (None,)) for name in outputs]
    session = FakeSession(
        lambda inputs, state: {name: np.array(value) for name, value in outputs.items()},
        outputs=specs,
    )
    decoder = Decoder(session, {}, len(LANGUAGE.prefix), 2048)
    refiner = Refiner(decoder, LANGUAGE, [Calibration(1, 0, 0.5)] * 2, 512, 0.6)
    with pytest.raises(SessionError, match="not numbers"):
        refiner.read(PROMPT)


def test_a_cache_longer_than_the_context_is_refused() -> None:
    decoder = fake_refiner.decoder(FakeGraph(lambda ids: 0), (1, 2), context=10)
    assert decoder.start(7).capacity == 10
    with pytest.raises(ValueError, match="11 tokens do not fit a context of 10"):
        decoder.start(8)


def test_a_step_of_one_token_is_what_it_is_among_several() -> None:
    graph = FakeGraph(lambda ids: sum(ids) % 1000)
    decoder = fake_refiner.decoder(graph, (5,))
    cache = decoder.start(3)
    assert decoder.step(cache, [10, 20, 30]).tokens == [15, 35, 65]
    cache.rollback(1)
    assert [decoder.step(cache, [token]).tokens for token in (10, 20, 30)] == [[15], [35], [65]]
    assert cache.length == 4
    cache.rollback(1)
    assert decoder.step(cache, [10, 20, 30], first=2).tokens == [65]


def test_a_graph_without_looks_is_refused() -> None:
    specs = [TensorSpec("tokens", np.dtype(np.int64), (None,))]
    with pytest.raises(BundleError, match="graph has no deviation, log_probabilities, mean"):
        Decoder(FakeSession(lambda inputs: {}, outputs=specs), {}, 0, 16)


def test_a_closed_refiner_cannot_be_used() -> None:
    refiner, _ = refiner_of(lambda ids: 0)
    refiner.close()
    with pytest.raises(SessionError, match="closed"):
        refiner.read(PROMPT)


def accepts(context: int, prompt_tokens: int) -> bool:
    """Whether a bundle may have a refiner with these sizes."""
    try:
        RefinerSpec(
            graph="refiner.onnx",
            tokenizer="refiner.json",
            delta="delta.safetensors",
            prefix="prefix.npz",
            second_look="second_look.json",
            precision="fp32",
            context=context,
            prompt_tokens=prompt_tokens,
            least_kept=0.6,
            shape=LlamaShape(1, 8, 8, 1, 1, 300, context, 1e4, 1e-5),
            template=TEMPLATE,
            base=BaseSpec("tiny==1", "tiny.gguf", "0" * 64, 1),
            weights=FileEntry("0" * 64, 1),
        )
    except BundleError:
        return False
    return True
