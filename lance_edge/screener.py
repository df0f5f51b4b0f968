"""Windows of token ids to labels: severities, deviations and token contributions.

Knows tokens, not text. A prompt's labels do not depend on what is scored with it: windows are
padded to a length that follows from their own, and only windows of one padded length share a run.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from lance_edge.bundle import Calibration, CloseReading
from lance_edge.errors import BundleError
from lance_edge.tokenizer import IntArray, Window, narrowed
from lance_edge_engines import Session

FloatArray = npt.NDArray[np.float64]

OUTPUTS = ("mean", "deviation", "contributions")
PAD_MULTIPLE = 8  # tokens
ADDING_UP = 4  # sentences from which on harmless ones can add up to something that is flagged
FEWEST_TOKENS = (
    6  # of such a sentence, with the special ones at its ends: "Hi. Thanks." adds nothing up
)
# A prompt of which nothing is flagged is read by sentence from the one severity on; a sentence counts then from
# the other on, if it is flagged.
LEFT_OPEN, SURE = 0.1, 0.65
RUN_TOKENS = 1024  # tokens in one run at most; past this, larger batches only cost memory


@dataclass(frozen=True)
class WindowLabels:
    """What the screener says of one window; C categories.

    severity       calibrated mean of each category under p(z | x)   [C]
    deviation      its standard deviation   [C]
    contributions  what each token adds to each category's logit   [tokens, C]
    score_ms       the window's share of its run, by tokens
    """

    window: Window
    severity: FloatArray
    deviation: FloatArray
    contributions: FloatArray
    score_ms: float


@dataclass(frozen=True)
class Labels:
    """What the screener says of one prompt: per category, its most severe window decides.

    severity, deviation  [C]
    distribution         over none and the categories, sums to 1   [1 + C]
    windows              the windows' own labels, in order; after them, those of windows that were
                         read closely, and those of the prompt's sentences, if they were read apart
    """

    severity: FloatArray
    deviation: FloatArray
    distribution: FloatArray
    windows: tuple[WindowLabels, ...]


L = TypeVar("L", WindowLabels, Labels)


class Screener:
    """The label-enhancement model behind a session.

    close       when a window is read again in narrower ones; None for never
    thresholds  severities from which on categories are flagged: below its own, none is clear; the
                calibration's if none are given   [C]
    """

    def __init__(
        self,
        session: Session,
        calibration: Sequence[Calibration],
        close: CloseReading | None = None,
        thresholds: FloatArray | None = None,
    ) -> None:
        self._session = session
        self._close = close
        own = np.array([item.threshold for item in calibration])
        self._thresholds = own if thresholds is None else thresholds
        # A category whose threshold was raised still shows that a prompt is not harmless.
        self._telling = np.minimum(own, self._thresholds)
        self._clear = np.maximum(self._thresholds, close.high) if close else self._thresholds
        self._slope = np.array([item.slope for item in calibration])
        self._intercept = np.array([item.intercept for item in calibration])
        names = {spec.name for spec in session.outputs}
        if names != set(OUTPUTS):
            raise BundleError(
                f"the screener's graph has outputs {sorted(names)}, not mean, deviation and contributions"
            )
        width = {spec.shape[-1] for spec in session.outputs} - {None}
        if width - {len(calibration)}:
            raise BundleError(
                f"the screener's graph knows {max(map(str, width))} categories and the taxonomy "
                f"{len(calibration)}"
            )

    @property
    def device(self) -> str:
        return self._session.device

    def score(self, prompts: Sequence[Sequence[Window]]) -> list[Labels]:
        """The labels of each prompt, given as its windows, in order.

        Raises BundleError if the graph gives a value that is not a number.
        """
        wide = self._score_windows([window for windows in prompts for window in windows])
        closer = [self._read_again(labels) for labels in wide]
        scored = iter(self._score_windows([window for windows in closer for window in windows]))
        narrow = [[next(scored) for _ in windows] for windows in closer]
        wide = [self._doubted(*pair) for pair in zip(wide, narrow, strict=True)]
        labels, start = [], 0
        for windows in prompts:
            end = start + len(windows)
            again = [self._discounted(found) for several in narrow[start:end] for found in several]
            labels.append(_combine([*wide[start:end], *again]))
            start = end
        return labels

    def is_by_sentence(self, whole: Labels) -> bool:
        """Whether the sentences of a prompt should be read by themselves: unless it is clearly harmless."""
        return bool((whole.severity >= np.minimum(self._thresholds, LEFT_OPEN)).any())

    def with_sentences(self, whole: Labels, sentences: Sequence[Labels]) -> Labels:
        """A prompt's labels with those of its sentences, each read by itself.

        What is strong in a prompt hides what is weaker beside it: in a category that the whole is not
        flagged for, the worst sentence decides. So can much that is different: where nothing is flagged,
        by the calibration's thresholds or those given, a sentence counts if it is sure, a little less, as a
        narrow window does. And many harmless sentences can add up: what none of them is flagged for is
        doubted, as between windows.
        """
        is_flagged = (whole.severity >= self._telling).any()
        long = [
            labels for labels in sentences if len(labels.windows[0].window.ids) >= FEWEST_TOKENS
        ]
        may_add_up = is_flagged and len(long) >= ADDING_UP
        doubted = self._doubted(whole, sentences if may_add_up else [])
        alone = _combine([window for labels in sentences for window in labels.windows])
        hidden = (doubted.severity < self._thresholds) & (alone.severity > doubted.severity)
        if not is_flagged:
            hidden &= alone.severity >= SURE
            alone = self._discounted(alone) if self._close else alone
            hidden &= alone.severity >= self._thresholds
        severity = np.where(hidden, alone.severity, doubted.severity)
        return Labels(
            severity,
            np.where(hidden, alone.deviation, doubted.deviation),
            distribution(severity),
            (*whole.windows, *alone.windows),
        )

    def close(self) -> None:
        self._session.close()

    def _score_windows(self, windows: Sequence[Window]) -> list[WindowLabels]:
        scored: dict[int, WindowLabels] = {}
        for length, indices in runs([len(window.ids) for window in windows]):
            rows = [windows[index] for index in indices]
            started = time.perf_counter()
            outputs = self._session.run(pad(rows, length))
            if not all(np.isfinite(outputs[name]).all() for name in OUTPUTS):
                raise BundleError(
                    f"the screener's graph gave values that are not numbers on {self.device}; "
                    "run `lance-edge verify`"
                )
            share_ms = (time.perf_counter() - started) * 1000 / len(rows)
            for row, index in enumerate(indices):
                scored[index] = self._calibrate(
                    rows[row],
                    outputs["mean"][row].astype(np.float64),
                    outputs["deviation"][row].astype(np.float64),
                    outputs["contributions"][row].astype(np.float64),
                    share_ms,
                )
        return [scored[index] for index in range(len(windows))]

    def _read_again(self, labels: WindowLabels) -> list[Window]:
        """The narrower windows of one that leaves open what it holds, in any category."""
        close, severity = self._close, labels.severity
        if close is None or not ((close.low <= severity) & (severity < self._clear)).any():
            return []
        return narrowed(labels.window, close.window, close.overlap)

    def _doubted(self, labels: L, parts: Sequence[WindowLabels] | Sequence[Labels]) -> L:
        """What a text says of a category, unless it is clear, counts a little less where none of its parts
        flags it: much harmless text can add up."""
        if self._close is None or not parts:
            return labels
        highest = np.max([part.severity for part in parts], axis=0)
        doubtful = (labels.severity < self._clear) & (highest < self._thresholds)
        less = self._discounted(labels)
        return replace(
            labels,
            severity=np.where(doubtful, less.severity, labels.severity),
            deviation=np.where(doubtful, less.deviation, labels.deviation),
        )

    def _discounted(self, labels: L) -> L:
        """The labels less the discount: a narrow window sees less around a word."""
        assert self._close is not None
        severity = sigmoid(logit(labels.severity) - self._close.discount)
        before = np.clip(labels.severity * (1 - labels.severity), 1e-12, None)
        deviation = labels.deviation * np.sqrt(severity * (1 - severity) / before)
        return replace(labels, severity=severity, deviation=deviation)

    def _calibrate(
        self,
        window: Window,
        mean: FloatArray,
        deviation: FloatArray,
        contributions: FloatArray,
        score_ms: float,
    ) -> WindowLabels:
        mean, deviation = self._slope * mean + self._intercept, self._slope * deviation
        spread = spread_of(deviation)
        severity = sigmoid(mean / spread)
        return WindowLabels(
            window,
            severity,
            severity_deviation(severity, spread),
            contributions[: len(window.ids)] * (self._slope / spread),
            score_ms,
        )


def both_looks(first: Labels, mean: FloatArray, deviation: FloatArray, share: float) -> Labels:
    """The first look's labels with the second look's latent severities mixed in.

    mean, deviation  calibrated  [C]
    share            of the second look in the mix, 0..1
    """
    severity = mix(first.severity, mean, deviation, share)
    second = severity_deviation(severity, spread_of(deviation))
    return replace(
        first,
        severity=severity,
        deviation=(1 - share) * first.deviation + share * second,
        distribution=distribution(severity),
    )


def mix(severity: FloatArray, mean: FloatArray, deviation: FloatArray, share: float) -> FloatArray:
    """Severities of both looks: the second's latent ones mixed with the first's logits  [..., C]"""
    return sigmoid((1 - share) * logit(severity) + share * mean / spread_of(deviation))


def runs(lengths: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
    """How windows of these lengths share runs: (padded length, indices), long ones first."""
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, length in enumerate(lengths):
        by_length[math.ceil(length / PAD_MULTIPLE) * PAD_MULTIPLE].append(index)
    for padded in sorted(by_length, reverse=True):
        rows = max(1, RUN_TOKENS // padded)
        indices = by_length[padded]
        for start in range(0, len(indices), rows):
            yield padded, indices[start : start + rows]


def pad(windows: Sequence[Window], length: int) -> dict[str, IntArray]:
    """The graph's inputs: ids and mask  [windows, length]"""
    ids = np.zeros((len(windows), length), dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, window in enumerate(windows):
        ids[row, : len(window.ids)] = window.ids
        mask[row, : len(window.ids)] = 1
    return {"ids": ids, "mask": mask}


def sigmoid(logit: FloatArray) -> FloatArray:
    """1 / (1 + exp(-logit)), without overflow."""
    result: FloatArray = 0.5 * (1 + np.tanh(0.5 * logit))
    return result


def logit(severity: FloatArray) -> FloatArray:
    """log(s / (1 - s)), with severities kept a little away from 0 and 1."""
    kept = np.clip(severity, 1e-6, 1 - 1e-6)
    result: FloatArray = np.log(kept / (1 - kept))
    return result


def spread_of(deviation: FloatArray) -> FloatArray:
    """sqrt(1 + pi sigma^2 / 8): mean of sigmoid(z) ~ sigmoid(mu / spread), its variance
    ~ s (1 - s) (1 - 1 / spread), for z normal with deviation sigma.

    MacKay, Neural Computation 4(5), 1992; the variance after Daunizeau, arXiv 1703.00091.
    """
    result: FloatArray = np.sqrt(1 + math.pi * deviation**2 / 8)
    return result


def severity_deviation(severity: FloatArray, spread: FloatArray) -> FloatArray:
    """The standard deviation that `spread_of` explains."""
    result: FloatArray = np.sqrt(severity * (1 - severity) * (1 - 1 / spread))
    return result


def distribution(severity: FloatArray) -> FloatArray:
    """Shares of none and the categories: none = prod(1 - s_k), the rest in proportion to s_k.

    severity [C] -> [1 + C]
    """
    none = float(np.prod(1 - severity))
    total = float(severity.sum())
    shares = severity / total if total > 0 else np.zeros_like(severity)
    return np.concatenate([[none], (1 - none) * shares])


def _combine(windows: Sequence[WindowLabels]) -> Labels:
    severities = np.stack([window.severity for window in windows])  # [windows, C]
    deviations = np.stack([window.deviation for window in windows])
    worst = severities.argmax(0)
    columns = np.arange(severities.shape[1])
    severity = severities[worst, columns]
    return Labels(severity, deviations[worst, columns], distribution(severity), tuple(windows))
