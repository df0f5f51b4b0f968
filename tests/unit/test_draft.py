"""Drafts by copying: what is proposed, what is kept, and that the output is greedy decoding's."""

from __future__ import annotations

import zlib
from array import array
from dataclasses import replace

import fake_refiner
import pytest
from fake_refiner import FakeGraph, Following
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lance_edge.draft import (
    EVIDENCE,
    FIRST,
    LONGEST,
    REACH,
    UNSURE,
    Alignment,
    accepted,
    advance,
    propose,
    realign,
)
from lance_edge.refiner import generate

END, OPEN = 0, 1  # control tokens of these tests; text tokens start at 2
SOURCE = (*range(100, 130), END)
PREFIX, OPENING = (51, 52, 53), [OPEN, 54]

Written = tuple[list[int], tuple[int, int, int], float]

ids = st.lists(st.integers(100, 104), max_size=12)


@pytest.mark.parametrize(
    ("alignment", "draft"),
    [
        (Alignment(SOURCE), list(range(100, 100 + FIRST))),
        (Alignment(SOURCE, pointer=3, length=2), [103, 104]),
        (Alignment(SOURCE, pointer=28, length=8), [128, 129, END]),  # no further than its end
        (Alignment(SOURCE, pointer=None), []),
        (Alignment((END,)), [END]),
    ],
)
def test_draft_is_what_the_source_says_next(alignment: Alignment, draft: list[int]) -> None:
    assert propose(alignment) == draft


@pytest.mark.parametrize(
    ("draft", "following", "kept"),
    [
        ([], [5], 0),
        ([5, 6, 7], [5, 6, 7, 8], 3),
        ([5, 6, 7], [5, 9, 7, 8], 1),  # what agrees after a disagreement does not count
        ([5, 6, 7], [9, 6, 7, 8], 0),
    ],
)
def test_a_draft_is_kept_up_to_the_first_disagreement(
    draft: list[int], following: list[int], kept: int
) -> None:
    assert accepted(draft, following) == kept


@given(ids, ids)
def test_kept_is_the_longest_common_start(draft: list[int], following: list[int]) -> None:
    kept = accepted(draft, following)
    assert draft[:kept] == following[:kept]
    assert draft[kept : kept + 1] != following[kept : kept + 1] or kept == len(draft)


def test_a_draft_that_holds_is_followed_by_one_twice_as_long() -> None:
    alignment = Alignment(SOURCE, pointer=2, reached=2, length=3)
    written = [102, 103, 104, 105]  # the draft and the token after it
    after = advance(alignment, written, 3, [100, 101, *written])
    assert after == Alignment(SOURCE, pointer=6, reached=6, length=6)
    for _ in range(4):
        after = advance(replace(after, pointer=6), [106], 0, [106])
    assert after.length == LONGEST


def test_after_a_substitution_the_source_is_found_again() -> None:
    """100..103 copied, 104 and 105 become 7 and 8, then 106 on."""
    output = [100, 101, 102, 103, 7]
    lost = advance(Alignment(SOURCE, pointer=2, reached=2), [102, 103, 7], 2, output)
    assert (lost.pointer, lost.reached) == (None, 4)
    lost = advance(lost, [8], 0, [*output, 8])
    assert propose(lost) == []
    found = advance(lost, [106], 0, [*output, 8, 106])
    assert propose(found) == list(range(107, 107 + UNSURE))


def test_after_a_deletion_the_draft_goes_on_behind_it() -> None:
    after = advance(Alignment(SOURCE, pointer=2, reached=2), [102, 110], 1, [100, 101, 102, 110])
    assert (after.pointer, after.reached, after.length) == (11, 11, UNSURE)


def test_after_an_insertion_the_draft_goes_on_where_it_was() -> None:
    alignment = Alignment(SOURCE, pointer=4, reached=4)
    lost = advance(alignment, [7], 0, [100, 101, 102, 103, 7])
    found = advance(lost, [104], 0, [100, 101, 102, 103, 7, 104])
    assert found.pointer == 5


def test_one_token_aligns_only_if_the_source_has_it_once_ahead() -> None:
    twice = (100, 101, 102, 101, 103, END)
    assert realign(Alignment(twice), [7, 101]).pointer is None
    assert realign(Alignment(twice, reached=2), [7, 101]).pointer == 4
    assert realign(Alignment(twice), [102, 101]).pointer == 4  # two tokens decide


def test_the_longest_match_wins_and_among_equals_the_nearest() -> None:
    source = (9, 101, 102, 5, 8, 101, 102, 6, 8, 101, 102, 7, END)
    found = realign(Alignment(source), [8, 101, 102])
    assert (found.pointer, found.length) == (7, FIRST)
    found = realign(Alignment(source), [3, 101, 102])
    assert (found.pointer, found.length) == (3, UNSURE)


def test_nothing_is_sought_behind_what_was_copied_or_out_of_reach() -> None:
    assert realign(Alignment(SOURCE, reached=8), [105, 106, 107]).pointer is None
    long = (*range(100, 400), END)
    assert realign(Alignment(long), [100 + REACH - 1]).pointer == REACH
    assert realign(Alignment(long), [100 + REACH]).pointer is None


@given(st.lists(st.integers(100, 104)), st.integers(0, 60), st.lists(ids, min_size=1))
def test_an_alignment_stands_right_behind_the_last_token(
    tokens: list[int], reached: int, outputs: list[list[int]]
) -> None:
    alignment = Alignment((*tokens, END), reached=min(reached, len(tokens)))
    for output in outputs:
        if not output:
            continue
        after = realign(alignment, output)
        if after.pointer is None:
            assert after == replace(alignment, pointer=None)
            continue
        assert alignment.reached < after.pointer == after.reached < len(after.source)
        assert after.source[after.pointer - 1] == output[-1]
        surely = list(after.source[: after.pointer][-EVIDENCE:]) == output[-EVIDENCE:]
        assert after.length == (FIRST if surely and len(output) >= EVIDENCE else UNSURE)


def editor(source: tuple[int, ...], start: int, seed: int, edits: int) -> Following:
    """A model that copies `source` behind position `start`, with `edits` of 100 tokens changed.

    What it does next hangs on every token before, so that a wrong one in the cache shows.
    """

    def following(ids: list[int]) -> int:
        output = ids[start:]
        at = [k + 1 for k, token in enumerate(source) if output and token == output[-1]]
        pointer = min(at, key=lambda k: abs(k - len(output)), default=len(output))
        roll = zlib.crc32(array("q", ids).tobytes(), seed)
        change, value = roll % 100, roll // 100
        if change < edits and value % 4 == 0:
            return END if value % 16 == 0 else 2 + value % 7  # an early end, or a new token
        if change < edits:
            pointer += value % 4  # a deletion
        return source[pointer] if pointer < len(source) else 2 + value % 200

    return following


def write(model: Following, source: tuple[int, ...], limit: int, speculative: bool) -> Written:
    """What `generate` writes after the prefix, the source and the opening; checks every run."""
    graph = FakeGraph(model)
    decoder = fake_refiner.decoder(graph, PREFIX)
    cache = decoder.start(len(source) + len(OPENING) + limit)
    decoder.step(cache, source, first=len(source) - 1)
    written = generate(decoder, cache, OPENING, source, limit, speculative)
    assert all(len(read) >= 2 for _, read in graph.runs)  # never a single row
    assert written[1][0] == len(graph.runs) - 1  # the first run read the source
    return written


def greedy(model: Following, source: tuple[int, ...], limit: int) -> list[int]:
    """Greedy decoding in five lines, without a cache."""
    sequence, output = [*PREFIX, *source, *OPENING], list[int]()
    while len(output) < limit and END not in output:
        output.append(model([*sequence, *output]))
    return output


def start_of(source: tuple[int, ...]) -> int:
    return len(PREFIX) + len(source) + len(OPENING)


@settings(max_examples=400, deadline=None)
@given(
    tokens=st.integers(3, 60).flatmap(
        lambda size: st.lists(st.integers(2, size), min_size=0, max_size=60)
    ),
    seed=st.integers(0, 2**32 - 1),
    edits=st.sampled_from([0, 3, 10, 30, 60, 100]),
    limit=st.integers(1, 90),
)
@example(tokens=[], seed=1, edits=0, limit=5)  # a source of one token: its end
@example(tokens=[2], seed=1, edits=0, limit=1)
@example(tokens=[7] * 40, seed=1, edits=30, limit=60)
def test_speculative_output_is_greedy_output(
    tokens: list[int], seed: int, edits: int, limit: int
) -> None:
    source = (*tokens, END)
    model = editor(source, start_of(source), seed, edits)
    expected = greedy(model, source, limit)
    plain, (plain_steps, *drafts), sure = write(model, source, limit, speculative=False)
    assert plain == expected
    assert (plain_steps, drafts) == (len(expected), [0, 0])
    fast, (steps, drafted, kept), as_sure = write(model, source, limit, speculative=True)
    assert (fast, as_sure) == (expected, sure)
    assert 0 <= kept <= drafted
    assert len(expected) - kept <= steps <= len(expected)


@pytest.mark.parametrize("length", [1, 2, 7, 40, 200])
def test_a_copy_takes_few_steps(length: int) -> None:
    source = (*range(100, 100 + length), END)
    output, (steps, drafted, kept), _ = write(copy_of(source), source, 300, speculative=True)
    assert output == list(source)
    assert kept == drafted
    assert steps <= 6 + length // LONGEST
    if length == 40:
        assert steps <= 6


@pytest.mark.parametrize("limit", [1, 2, 3, 5, FIRST + 1, 20, 21, 22])
def test_a_draft_never_exceeds_the_limit(limit: int) -> None:
    source = (*range(100, 120), END)
    output, (_, drafted, _), _ = write(copy_of(source), source, limit, speculative=True)
    assert output == list(source)[:limit]
    assert drafted < limit


@pytest.mark.parametrize("end", range(12))
def test_an_end_inside_or_behind_a_draft_ends_the_output(end: int) -> None:
    """The model copies `end` tokens, then ends, and would go on copying if it were asked."""
    source = (*range(100, 112), END)
    start = start_of(source)

    def model(ids: list[int]) -> int:
        return END if len(ids) - start == end else source[min(len(ids) - start, 11)]

    output, *_ = write(model, source, 30, speculative=True)
    assert output == [*source[:end], END]


def test_an_end_within_the_source_ends_the_output() -> None:
    source = (100, 101, END, 102, 103, END)
    output, *_ = write(copy_of(source), source, 30, speculative=True)
    assert output == [100, 101, END]


@pytest.mark.parametrize("speculative", [True, False])
def test_a_cache_rolled_back_is_as_good_as_a_fresh_one(speculative: bool) -> None:
    source = (*range(100, 140), END)
    model = editor(source, start_of(source), seed=5, edits=20)
    decoder = fake_refiner.decoder(FakeGraph(model), PREFIX)
    cache = decoder.start(len(source) + 100)
    decoder.step(cache, source, first=len(source) - 1)
    read = cache.length

    def again(opening: list[int]) -> Written:
        cache.rollback(read)
        return generate(decoder, cache, opening, source, 60, speculative)

    first, other = again(OPENING), again([OPEN, 77])
    assert first != other  # the second run did change what the cache holds
    assert again(OPENING) == first == write(model, source, 60, speculative)
    assert again([OPEN, 77]) == other


def test_the_cache_holds_what_was_written_and_nothing_of_rejected_drafts() -> None:
    source = (*range(100, 160), END)
    model = editor(source, start_of(source), seed=9, edits=15)
    decoder = fake_refiner.decoder(FakeGraph(model), PREFIX)
    cache = decoder.start(200)
    decoder.step(cache, source, first=len(source) - 1)
    output, (_, drafted, kept), _ = generate(decoder, cache, OPENING, source, 30, True)
    assert kept < drafted  # some were rejected
    held = cache.state.read("ids")[: cache.length].tolist()
    assert held == [*PREFIX, *source, *OPENING, *output[:-1]]


def copy_of(source: tuple[int, ...]) -> Following:
    return editor(source, start_of(source), seed=0, edits=0)
