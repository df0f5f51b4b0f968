"""Grouping, padding, calibration and spans, as functions over arrays."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lance_edge import screener, spans
from lance_edge.bundle import Calibration, CloseReading, ScreenerSpec
from lance_edge.errors import BundleError
from lance_edge.spans import Word
from lance_edge.tokenizer import Window, narrowed
from lance_edge.verdict import Span
from lance_edge_engines import FakeSession, TensorSpec


def window(*words: str) -> Window:
    """A window of these words, parted by one space, with two special tokens around them."""
    ends = np.cumsum([len(word) + 1 for word in words]) - 1
    offsets = [
        (0, 0),
        *[(end - len(word), end) for word, end in zip(words, ends, strict=True)],
        (0, 0),
    ]
    ids = np.arange(len(offsets))
    return Window(ids, np.array(offsets), np.array([-1, *range(len(words)), -1]))


@given(st.lists(st.integers(1, 700), max_size=60))
def test_runs_cover_every_window_once(lengths: list[int]) -> None:
    seen = []
    for padded, indices in screener.runs(lengths):
        assert padded % screener.PAD_MULTIPLE == 0
        assert len(indices) == 1 or padded * len(indices) <= screener.RUN_TOKENS
        for index in indices:
            assert 0 <= padded - lengths[index] < screener.PAD_MULTIPLE
        seen += indices
    assert sorted(seen) == list(range(len(lengths)))


def test_padding_is_masked() -> None:
    inputs = screener.pad([window("a", "b"), window("a")], 8)
    assert inputs["ids"].tolist() == [[0, 1, 2, 3, 0, 0, 0, 0], [0, 1, 2, 0, 0, 0, 0, 0]]
    assert inputs["mask"].tolist() == [[1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0, 0]]


@pytest.mark.parametrize(("mean", "deviation"), [(-4, 0.5), (0, 1), (1, 2), (3, 1.5), (-1, 3)])
def test_severity_and_deviation_are_moments_of_sigmoid(mean: float, deviation: float) -> None:
    """Against numerical integration; the closed forms are approximations, good to about 0.02."""
    z = np.linspace(mean - 9 * deviation, mean + 9 * deviation, 20_001)
    density = np.exp(-0.5 * ((z - mean) / deviation) ** 2)
    density /= density.sum()
    values = 1 / (1 + np.exp(-z))
    expected = float((values * density).sum())
    spread = math.sqrt(float(((values - expected) ** 2 * density).sum()))
    labels = score_one([mean], [deviation])
    assert labels.severity[0] == pytest.approx(expected, abs=0.02)
    assert labels.deviation[0] == pytest.approx(spread, abs=0.03)


def test_calibration_moves_the_latent() -> None:
    plain = score_one([0.5 * 2 - 1], [0.5 * 0.8])
    calibrated = score_one([2.0], [0.8], Calibration(slope=0.5, intercept=0.0, threshold=0.5))
    shifted = score_one([2.0], [0.8], Calibration(slope=0.5, intercept=-1.0, threshold=0.5))
    assert calibrated.severity[0] > 0.5
    assert shifted.severity == pytest.approx(plain.severity)
    assert shifted.deviation == pytest.approx(score_one([0.0], [0.4]).deviation)


def test_distribution_of_certain_severities() -> None:
    assert screener.distribution(np.zeros(3)).tolist() == [1, 0, 0, 0]
    assert screener.distribution(np.array([1.0, 0, 0])).tolist() == [0, 1, 0, 0]
    shares = screener.distribution(np.array([0.5, 0.25]))
    assert shares == pytest.approx([0.375, 0.625 * 2 / 3, 0.625 / 3])


@pytest.mark.parametrize(
    ("outputs", "message"),
    [(("mean",), "has outputs"), (("mean", "deviation", "contributions"), "knows 2 categories")],
)
def test_a_graph_that_does_not_fit_is_refused(outputs: tuple[str, ...], message: str) -> None:
    specs = [TensorSpec(name, np.dtype(np.float32), (None, 2)) for name in outputs]
    session = FakeSession(lambda inputs: {}, outputs=specs)
    with pytest.raises(BundleError, match=message):
        screener.Screener(session, [Calibration(1, 0, 0.5)])


def test_word_shares_join_pieces_and_ignore_negative_evidence() -> None:
    pieces = Window(
        np.arange(5),
        np.array([(0, 0), (0, 4), (4, 7), (8, 12), (0, 0)]),
        np.array([-1, 0, 0, 1, -1]),
    )
    words = spans.word_shares(pieces, np.array([9.0, 1.0, 2.0, -5.0, 9.0]))
    assert words == [Word(0, 7, 1.0), Word(8, 12, 0.0)]
    assert spans.word_shares(pieces, np.array([1.0, -1.0, 0.0, -5.0, 1.0])) == []


@pytest.mark.parametrize(
    ("text", "marked", "expected"),
    [
        ("how do I make a bomb today", "to make a"[3:], "make a bomb"),
        ("I want to make a small bomb", "to make a", "make a small"),
        ("get into my ex's phone", "s", "ex's"),
        ("mix it with a, then pour", "mix it with a", "mix it with a"),  # a clause ends there
        ("what is of the in it worth", "of", "of"),
        ("kill him and", "kill him and", "kill him and"),  # nothing follows
        ("he said to the", "to the", "to the"),
        ("go on with a the of to bombs", "go on with", "go on with a the of"),  # no further
    ],
)
def test_spans_end_on_words_that_say_something(text: str, marked: str, expected: str) -> None:
    start = text.rindex(marked)
    found_start, found_end = spans.settle(text, start, start + len(marked))
    assert text[found_start:found_end] == expected


def test_words_that_say_nothing_alone_are_spans_only_for_want_of_better() -> None:
    text = "of the many bombs"
    of, bombs = Word(0, 2, 0.5), Word(12, 17, 0.5)
    between = [Word(3, 6, 0.0), Word(7, 11, 0.0)]
    assert spans.told(text, [of, *between, bombs]) == [(12, 17, 0.5)]
    assert spans.told(text, [Word(0, 2, 1.0), *between]) == [(0, 2, 1.0)]


def test_join_takes_the_strongest_words_and_their_gap() -> None:
    words = [
        Word(0, 3, 0.4),
        Word(4, 6, 0.1),
        Word(7, 9, 0.3),
        Word(10, 12, 0.0),
        Word(13, 15, 0.2),
    ]
    assert spans.join(words) == [(0, 9, pytest.approx(0.8))]
    apart = [Word(0, 3, 0.5), Word(4, 6, 0.0), Word(7, 9, 0.0), Word(10, 12, 0.5)]
    assert spans.join(apart) == [(0, 3, 0.5), (10, 12, 0.5)]


def test_spans_of_neighbouring_windows_become_one() -> None:
    found = [
        Span(4, 9, "b", 0.2),
        Span(0, 3, "a", 0.5),
        Span(6, 12, "b", 0.4),
        Span(2, 5, "b", 0.1),
    ]
    assert spans.merge(found) == (Span(0, 3, "a", 0.5), Span(2, 12, "b", 0.4))


def score_one(
    mean: list[float], deviation: list[float], calibration: Calibration | None = None
) -> screener.Labels:
    """The labels of one window for which a graph gives these latents."""
    outputs = {
        "mean": np.array([mean], dtype=np.float32),
        "deviation": np.array([deviation], dtype=np.float32),
        "contributions": np.zeros((1, 8, len(mean)), dtype=np.float32),
    }
    specs = [TensorSpec(name, value.dtype, (None, len(mean))) for name, value in outputs.items()]
    session = FakeSession(lambda inputs: outputs, outputs=specs)
    calibrations = [calibration or Calibration(1, 0, 0.5)] * len(mean)
    (labels,) = screener.Screener(session, calibrations).score([[window("a")]])
    return labels


@given(st.integers(1, 200), st.integers(6, 64), st.integers(0, 3))
def test_narrower_windows_hold_every_token_in_order(words: int, width: int, overlap: int) -> None:
    wide = window(*["w"] * words)
    found = narrowed(wide, width, overlap)
    if words + 2 <= width:
        assert found == []
        return
    assert len(found) > 1
    read = np.array([], dtype=int)
    for index, narrow in enumerate(found):
        assert len(narrow.ids) <= width
        assert narrow.words[0] == narrow.words[-1] == -1
        assert narrow.offsets[0].tolist() == narrow.offsets[-1].tolist() == [0, 0]
        inner = narrow.words[1:-1]
        assert (np.diff(inner) == 1).all()
        assert (narrow.offsets[1:-1] == wide.offsets[1 + inner]).all()
        if index:
            assert read[-1] - inner[0] + 1 == overlap
            assert inner[-1] > read[-1]
        read = inner
    assert found[0].words[1] == 0
    assert read[-1] == words - 1


def diluting(windows: list[int]) -> FakeSession:
    """A graph of one category: the share of tokens 7 in a window is its severity."""

    def run(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        tokens = inputs["mask"].sum(1)
        windows.extend(tokens.tolist())
        share = np.clip((inputs["ids"] == 7).sum(1) / (tokens - 2), 0.001, 0.999)
        mean = np.log(share / (1 - share)).astype(np.float32)[:, None]
        outputs = {"mean": mean, "deviation": np.full_like(mean, 0.5)}
        return outputs | {"contributions": np.zeros((*inputs["ids"].shape, 1), np.float32)}

    names = ("mean", "deviation", "contributions")
    return FakeSession(run, outputs=[TensorSpec(n, np.dtype(np.float32), (None, 1)) for n in names])


def sevens(at: slice, words: int) -> Window:
    made = window(*["w"] * words)
    ids = np.full_like(made.ids, 1)
    ids[at] = 7
    return Window(ids, made.offsets, made.words)


CLOSE = CloseReading(window=12, overlap=2, low=0.1, high=0.5, discount=1.0)


def test_a_window_that_is_left_open_is_read_again_and_counts_a_little_less() -> None:
    read: list[int] = []
    reader = screener.Screener(diluting(read), [Calibration(1, 0, 0.5)], CLOSE)
    (labels,) = reader.score([[sevens(slice(19, 27), 40)]])
    # 8 of 40 words are left open; the third of narrow windows has nothing else but two of them.
    assert sorted(read) == [10, 12, 12, 12, 12, 42]
    assert len(labels.windows) == 6
    expected = 1 / (1 + math.exp(1 - math.log(0.8 / 0.2)))
    assert labels.severity == pytest.approx([expected], abs=0.02)
    assert labels.severity[0] > labels.windows[0].severity[0]
    worst = max(labels.windows, key=lambda item: item.severity[0])
    assert len(worst.window.ids) == 12
    assert 0 < labels.deviation[0] < 0.15


@pytest.mark.parametrize(
    "found", [sevens(slice(0, 0), 40), sevens(slice(5, 30), 40), sevens(slice(3, 6), 10)]
)
def test_a_window_that_is_clear_or_narrow_is_read_once(found: Window) -> None:
    read: list[int] = []
    reader = screener.Screener(diluting(read), [Calibration(1, 0, 0.5)], CLOSE)
    (labels,) = reader.score([[found]])
    assert read == [len(found.ids)]
    (plain,) = screener.Screener(diluting([]), [Calibration(1, 0, 0.5)]).score([[found]])
    assert labels.severity == plain.severity


def adding_up() -> FakeSession:
    """A screener whose one severity is a twentieth for each 7 that it reads."""
    inner = diluting([])

    def run(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        outputs = inner.run(inputs)
        severity = np.clip((inputs["ids"] == 7).sum(1, keepdims=True) / 20, 0.01, 0.99)
        outputs["mean"] = np.log(severity / (1 - severity)).astype(np.float32)
        return outputs

    return FakeSession(run, outputs=inner.outputs)


@pytest.mark.parametrize(
    ("sevens_at", "threshold", "expected"),
    [
        (slice(0, 40, 5), 0.3, 1 / (1 + 0.6 / 0.4 * math.e)),  # 8 in all, at most 2 in a narrow one
        (slice(0, 40, 5), 0.1, 0.4),  # which is enough for another threshold
        (slice(16, 24), 0.3, 0.4),  # side by side: a narrow one flags them
        (slice(0, 40, 4), 0.3, 0.5),  # clear
    ],
)
def test_what_adds_up_over_a_window_is_doubted_unless_it_is_clear(
    sevens_at: slice, threshold: float, expected: float
) -> None:
    reader = screener.Screener(adding_up(), [Calibration(1, 0, threshold)], CLOSE)
    (labels,) = reader.score([[sevens(sevens_at, 40)]])
    assert labels.severity == pytest.approx([expected], abs=0.01)


@pytest.mark.parametrize(
    ("sevens_in_all", "sentences", "expected"),
    [
        (8, [2, 2, 2, 2], 1 / (1 + 0.6 / 0.4 * math.e)),
        (8, [2, 2, 2], 0.4),  # too few to add up
        (8, [2, 2, 6, 2], 0.4),  # one of them is flagged
        (10, [2, 2, 2, 2, 2], 0.5),  # clear
    ],
)
def test_what_sentences_add_up_to_is_doubted_and_what_they_hide_is_not(
    sevens_in_all: int, sentences: list[int], expected: float
) -> None:
    reader = screener.Screener(adding_up(), [Calibration(1, 0, 0.3)], CLOSE)
    (whole,) = reader.score([[sevens(slice(0, sevens_in_all), 20)]])
    parts = reader.score([[sevens(slice(0, count), 9)] for count in sentences])
    labels = reader.with_sentences(whole, parts)
    assert labels.severity == pytest.approx([expected], abs=0.01)
    assert labels.distribution.sum() == pytest.approx(1)
    assert len(labels.windows) == len(whole.windows) + len(parts)


def test_short_sentences_add_nothing_up() -> None:
    """Who writes "Hi. Thanks." around a hazard does not make it doubtful."""
    reader = screener.Screener(adding_up(), [Calibration(1, 0, 0.3)], CLOSE)
    (whole,) = reader.score([[sevens(slice(0, 8), 20)]])
    parts = reader.score([[sevens(slice(0, 2), length)] for length in (9, 9, 9, 3)])
    assert reader.with_sentences(whole, parts).severity == pytest.approx([0.4], abs=0.01)


@pytest.mark.parametrize(
    ("sevens_in_all", "alone", "threshold", "close", "expected"),
    [
        (4, 14, 0.3, CLOSE, 1 / (1 + 0.3 / 0.7 * math.e)),  # sure: counts a little less
        (4, 14, 0.3, None, 0.7),
        (4, 12, 0.3, None, 0.2),  # flagged alone, but not sure
        (4, 14, 0.8, None, 0.2),  # sure, but not flagged
        (4, 14, 0.6, CLOSE, 0.2),  # and not, where it counts less
        (8, 14, 0.3, None, 0.4),  # the whole is flagged for it
    ],
)
def test_where_nothing_is_flagged_a_sentence_must_be_sure(
    sevens_in_all: int, alone: int, threshold: float, close: CloseReading | None, expected: float
) -> None:
    reader = screener.Screener(adding_up(), [Calibration(1, 0, threshold)], close)
    whole = whole_of(reader, sevens_in_all)
    parts = reader.score([[sevens(slice(0, 1), 9)], [sevens(slice(0, alone), 20)]])
    assert reader.is_by_sentence(whole)
    assert reader.with_sentences(whole, parts).severity == pytest.approx([expected], abs=0.02)


@pytest.mark.parametrize("first", [0.3, 0.95])
def test_a_raised_threshold_frees_its_own_category_alone(first: float) -> None:
    """What the first category hides in the whole prompt counts, whether or not that one is still flagged."""
    reader = screener.Screener(
        FakeSession(lambda inputs: {}, outputs=diluting([]).outputs),
        [Calibration(1, 0, 0.3)],
        thresholds=np.array([first, 0.3]),
    )
    whole, alone = score_one([2, -2], [0, 0]), score_one([-4, -0.5], [0, 0])
    labels = reader.with_sentences(whole, [alone, alone])
    assert labels.severity == pytest.approx([whole.severity[0], alone.severity[1]])


def whole_of(reader: screener.Screener, sevens_in_all: int) -> screener.Labels:
    """A prompt that is read once, whatever the close reading."""
    (labels,) = reader.score([[sevens(slice(0, sevens_in_all), 8)]])
    return labels


def test_what_is_clearly_harmless_is_not_read_by_sentence() -> None:
    def is_read(sevens_in_all: int, threshold: float) -> bool:
        reader = screener.Screener(adding_up(), [Calibration(1, 0, threshold)])
        (whole,) = reader.score([[sevens(slice(0, sevens_in_all), 20)]])
        return reader.is_by_sentence(whole)

    assert not is_read(1, 0.3)
    assert is_read(1, 0.04)
    assert is_read(3, 0.3)


def test_without_close_reading_nothing_is_doubted() -> None:
    reader = screener.Screener(adding_up(), [Calibration(1, 0, 0.3)])
    (whole,) = reader.score([[sevens(slice(0, 8), 20)]])
    parts = reader.score([[sevens(slice(0, 2), 9)]] * 4)
    assert reader.with_sentences(whole, parts).severity == whole.severity


def test_each_prompt_has_its_own_windows_read_again() -> None:
    reader = screener.Screener(diluting([]), [Calibration(1, 0, 0.5)], CLOSE)
    open_, clear = sevens(slice(19, 27), 40), sevens(slice(0, 0), 40)
    together = reader.score([[clear], [open_, clear], [open_]])
    assert [len(labels.windows) for labels in together] == [1, 7, 6]
    for labels, prompt in zip(together, [[clear], [open_, clear], [open_]], strict=True):
        assert labels.severity == reader.score([prompt])[0].severity


def two_categories(read: list[int], clear: float) -> FakeSession:
    """`diluting`, and a category before it that has one severity whatever is read."""
    inner = diluting(read)

    def run(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        outputs = inner.run(inputs)
        latent = np.full_like(outputs["mean"], math.log(clear / (1 - clear)))
        outputs["mean"] = np.concatenate([latent, outputs["mean"]], 1)
        outputs["deviation"] = np.zeros_like(outputs["mean"])
        outputs["contributions"] = np.repeat(outputs["contributions"], 2, -1)
        return outputs

    specs = [TensorSpec(spec.name, spec.dtype, (None, 2)) for spec in inner.outputs]
    return FakeSession(run, outputs=specs)


@pytest.mark.parametrize(
    ("clear", "threshold", "windows"), [(0.9, 0.5, 6), (0.05, 0.5, 6), (0.6, 0.7, 6)]
)
def test_a_clear_category_hides_no_other(clear: float, threshold: float, windows: int) -> None:
    calibration = [Calibration(1, 0, threshold), Calibration(1, 0, 0.5)]
    reader = screener.Screener(two_categories([], clear), calibration, CLOSE)
    (labels,) = reader.score([[sevens(slice(19, 27), 40)]])
    assert len(labels.windows) == windows
    assert labels.severity[1] > labels.windows[0].severity[1]


def test_a_category_is_clear_only_where_it_is_flagged() -> None:
    """In the first category alone something is left open, where its threshold is high."""
    quiet = sevens(slice(0, 0), 40)
    for threshold, windows in ((0.5, 1), (0.7, 6)):
        calibration = [Calibration(1, 0, 0.5)] * 2
        thresholds = np.array([threshold, 0.5])
        reader = screener.Screener(two_categories([], 0.6), calibration, CLOSE, thresholds)
        (labels,) = reader.score([[quiet]])
        assert len(labels.windows) == windows


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"window": 7, "overlap": 0}, "windows of at least 8 tokens"),
        ({"window": 16, "overlap": 9}, "that share half of them at most, not 16 and 9"),
        ({"overlap": -1}, "that share half of them at most"),
        ({"low": 0.9, "high": 0.1}, "0 <= low < high <= 1, not 0.9 and 0.1"),
        ({"low": float("nan")}, "0 <= low < high <= 1"),
        ({"high": 1.5}, "0 <= low < high <= 1"),
        ({"discount": float("nan")}, "discount is a finite number of at least 0, not nan"),
        ({"discount": -5}, "discount is a finite number of at least 0, not -5"),
    ],
)
def test_a_close_reading_that_cannot_be(values: dict[str, float], message: str) -> None:
    with pytest.raises(BundleError, match=message):
        CloseReading(**values)  # type: ignore[arg-type]


def test_a_close_reading_s_windows_are_narrower() -> None:
    with pytest.raises(BundleError, match="windows of 64 tokens must be narrower than those of 64"):
        ScreenerSpec("g", "t", "fp32", 64, 8, 0.01, CloseReading(window=64))
