"""One request from top to bottom."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType

import numpy as np

from lance_edge.bundle import Bundle, default_bundle, open_bundle
from lance_edge.errors import InvalidOption, InvalidPrompt
from lance_edge.policy import Policy, policy
from lance_edge.screener import FloatArray, Labels, Screener
from lance_edge.spans import hazard_spans
from lance_edge.tokenizer import Tokenizer, Window
from lance_edge.verdict import Timings, Verdict
from lance_edge_engines import BACKENDS, open_session

MAX_CHARS = 1_000_000


@dataclass(frozen=True)
class Prompt:
    """A text that has been tokenised: ready to be screened."""

    text: str
    windows: list[Window]
    encode_ms: float


class Pipeline:
    """Screens prompts. Made by `load`; may be used from several threads at once."""

    def __init__(
        self,
        bundle: Bundle,
        tokenizer: Tokenizer,
        screener: Screener,
        policy: Policy,
        max_chars: int,
    ) -> None:
        self.bundle = bundle
        self.tokenizer = tokenizer
        self.screener = screener
        self.policy = policy
        self.max_chars = max_chars

    @property
    def device(self) -> str:
        """Where the graphs run; what "auto" chose."""
        return self.screener.device

    def screen(self, text: str) -> Verdict:
        """The verdict on one prompt.

        Raises InvalidPrompt if the text is empty, not valid Unicode or longer than max_chars.
        """
        return self.judge([self.encode(text)])[0]

    def screen_many(self, texts: Iterable[str]) -> list[Verdict]:
        """The verdicts on several prompts, in order; each is what `screen` says of it alone.

        Raises InvalidPrompt, which names the prompt's index, before any of them is screened.
        To go on with the others, `encode` each prompt yourself and `judge` those that pass.
        """
        prompts = []
        for index, text in enumerate(texts):
            try:
                prompts.append(self.encode(text))
            except InvalidPrompt as error:
                raise InvalidPrompt(f"prompt {index}: {error}") from error
        return self.judge(prompts)

    def encode(self, text: str) -> Prompt:
        """Check and tokenise a prompt. Raises InvalidPrompt."""
        started = time.perf_counter()
        if isinstance(text, str) and len(text) > self.max_chars:
            raise InvalidPrompt(
                f"the prompt has {len(text):,} characters and the limit is {self.max_chars:,}; "
                "split it, or raise the limit (max_chars)"
            )
        windows = self.tokenizer.encode(text)
        return Prompt(text, windows, (time.perf_counter() - started) * 1000)

    def judge(self, prompts: Sequence[Prompt]) -> list[Verdict]:
        """The verdicts on encoded prompts, in order."""
        labels = self.screener.score([prompt.windows for prompt in prompts])
        return [self._verdict(prompt, item) for prompt, item in zip(prompts, labels, strict=True)]

    def close(self) -> None:
        """Free the models' memory."""
        self.screener.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _verdict(self, prompt: Prompt, labels: Labels) -> Verdict:
        names = self.policy.categories
        flagged = self.policy.flagged(labels.severity)
        return Verdict(
            decision=self.policy.decide(flagged),
            flagged=flagged,
            severity=_by_name(names, labels.severity),
            deviation=_by_name(names, labels.deviation),
            distribution=_by_name(("none", *names), labels.distribution),
            spans=hazard_spans(labels.windows, self.policy.thresholds, names),
            tokens=sum(len(window.ids) for window in prompt.windows),
            windows=len(prompt.windows),
            bundle=self.bundle.sha256,
            device=self.device,
            timings=Timings(prompt.encode_ms, sum(window.score_ms for window in labels.windows)),
        )


def load(
    bundle: str | os.PathLike[str] | None = None,
    device: str = "auto",
    *,
    thresholds: Mapping[str, float] | float | None = None,
    threads: int | None = None,
    max_chars: int = MAX_CHARS,
) -> Pipeline:
    """A pipeline from a bundle's folder; the default bundle if none is given.

    device      "auto", or one of `lance_edge_engines.BACKENDS`; only "auto" may choose another
    thresholds  severities from which on categories are flagged, in place of the bundle's: one for
                all, or by category, where "*" stands for those that are not named
    threads     CPU threads for one request; None for one per physical core
    max_chars   longer prompts are refused: they are read in full, which takes time

    Raises BundleError, InvalidOption, or lance_edge_engines.DeviceUnavailable.
    """
    if threads is not None and threads < 1:
        raise InvalidOption(f"threads must be at least 1, not {threads}")
    if device not in ("auto", *BACKENDS):
        raise InvalidOption(
            f"there is no device {device!r}; choose from auto, {', '.join(BACKENDS)}"
        )
    opened = open_bundle(default_bundle() if bundle is None else bundle)
    rules = policy(opened, thresholds)
    spec = opened.manifest.screener
    tokenizer = Tokenizer(opened.read(spec.tokenizer), spec.window, spec.overlap)
    session = open_session(opened.read(spec.graph), device, threads)
    calibration = [opened.calibration[name] for name in rules.categories]
    return Pipeline(opened, tokenizer, Screener(session, calibration), rules, max_chars)


def _by_name(names: Sequence[str], values: FloatArray) -> dict[str, float]:
    clipped = np.clip(values, 0.0, 1.0)
    return {name: float(value) for name, value in zip(names, clipped, strict=True)}
