"""What the looks say of prompts: of each as a whole, of its sentences by themselves, and the second look
where the first leaves it open."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from lance_edge.bundle import SecondLook, Templates
from lance_edge.errors import InvalidPrompt
from lance_edge.gradient import gradients
from lance_edge.passages import Range, apart
from lance_edge.policy import Policy
from lance_edge.refiner import Reading, Refiner
from lance_edge.screener import FloatArray, Labels, Screener, both_looks
from lance_edge.spans import hazard_spans
from lance_edge.tokenizer import Tokenizer, Window
from lance_edge.verdict import Gradient, Span

Looks = Literal["1", "2", "auto"]

FEWEST_JUDGED = 3  # words from which on a prompt is asked for its language


@dataclass(frozen=True)
class Prompt:
    """A text that has been tokenised: ready to be screened."""

    text: str
    windows: list[Window]
    encode_ms: float


@dataclass(frozen=True)
class Judged:
    """A prompt with all that the looks say of it.

    labels     what they say of it, with its sentences
    whole      what they say of it as a whole
    sentences  what the first look says of each by itself, if there are several and the prompt is not
               clearly harmless
    reading    the second look's cache; None if there was none
    """

    prompt: Prompt
    labels: Labels
    whole: Labels
    sentences: Mapping[Range, Labels] = field(default_factory=dict)
    reading: Reading | None = None


class Judge:
    """Reads prompts, and says of what it read what a policy flags and where.

    looks         "1": the screener alone; "2": every prompt is read twice; "auto": those that the first look
                  leaves open
    second_look   how both looks are mixed; None where there is no refiner
    open_refiner  gives the refiner, whose reading is the second look
    templates     what gradients are made of; None if the bundle has none
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        screener: Screener,
        policy: Policy,
        max_chars: int,
        looks: Looks,
        second_look: SecondLook | None,
        open_refiner: Callable[[], Refiner],
        templates: Templates | None,
    ) -> None:
        self.tokenizer = tokenizer
        self.screener = screener
        self.policy = policy
        self.max_chars = max_chars
        self.looks = looks
        self.second_look = second_look
        self.templates = templates
        self._open_refiner = open_refiner

    def encode(self, text: str) -> Prompt:
        """Check and tokenise a prompt. Raises InvalidPrompt."""
        started = time.perf_counter()
        if isinstance(text, str) and len(text) > self.max_chars:
            raise InvalidPrompt(
                f"the prompt has {len(text):,} characters and the limit is {self.max_chars:,}; "
                "split it, or raise the limit (max_chars; --max-chars on the command line)"
            )
        windows = self.tokenizer.encode(text)
        return Prompt(text, windows, (time.perf_counter() - started) * 1000)

    def encode_all(self, texts: Iterable[str]) -> list[Prompt]:
        """Raises InvalidPrompt, which names the prompt's index."""
        if isinstance(texts, str):
            raise InvalidPrompt("one text was given and a list of texts was expected")
        prompts = []
        for index, text in enumerate(texts):
            try:
                prompts.append(self.encode(text))
            except InvalidPrompt as error:
                raise InvalidPrompt(f"prompt {index}: {error}") from error
        return prompts

    def read(self, text: str) -> Judged:
        """What the looks say of a text. Raises InvalidPrompt."""
        return self.look_again(self.first_looks([self.encode(text)])[0])

    def first_looks(self, prompts: Sequence[Prompt]) -> list[Judged]:
        """What the screener says of prompts: of each as a whole and, unless it is clearly harmless, of each of
        its sentences."""
        wholes = self.screener.score([prompt.windows for prompt in prompts])
        places = [
            apart(prompt.text) if self.screener.is_by_sentence(whole) else []
            for prompt, whole in zip(prompts, wholes, strict=True)
        ]
        parts = [
            self.tokenizer.encode_part(prompt.text, *place)
            for prompt, several in zip(prompts, places, strict=True)
            for place in several
        ]
        alone = iter(self.screener.score(parts))
        looks = []
        for prompt, whole, several in zip(prompts, wholes, places, strict=True):
            found = {place: next(alone) for place in several}
            looks.append(Judged(prompt, self._with_sentences(whole, found), whole, found))
        return looks

    def look_again(self, judged: Judged) -> Judged:
        """With a second look at the prompt, if the first leaves it open and the refiner can read it."""
        look = self.second_look
        if look is None or self.looks == "1":
            return judged
        is_open = (
            look.low
            <= self.policy.margin(judged.labels.severity, judged.labels.deviation)
            <= look.high
        )
        if not (is_open or self.looks == "2"):
            return judged
        refiner = self._open_refiner()
        if not refiner.fits(judged.prompt.text):
            return judged
        reading = refiner.read(judged.prompt.text)
        whole = both_looks(judged.whole, reading.mean, reading.deviation, look.share)
        labels = self._with_sentences(whole, judged.sentences)
        return replace(judged, labels=labels, whole=whole, reading=reading)

    def _with_sentences(self, whole: Labels, sentences: Mapping[Range, Labels]) -> Labels:
        alone = [*sentences.values()]
        return self.screener.with_sentences(whole, alone) if alone else whole

    def gradients(self, text: str, labels: Labels) -> tuple[Gradient, ...]:
        """One for each flagged category, if the bundle has templates."""
        if self.templates is None:
            return ()
        flagged = self.policy.flagged(labels.severity)
        return gradients(text, labels, flagged, self.policy.categories, self.templates)

    def to_change(self, text: str, labels: Labels) -> tuple[Gradient, ...]:
        """The gradients of categories that the policy does not let pass."""
        found = self.gradients(text, labels)
        return tuple(item for item in found if self.policy.stops(item.category))

    def stopped(self, severity: FloatArray) -> list[str]:
        """The flagged categories that the policy does not let pass  [C]"""
        return [name for name in self.policy.flagged(severity) if self.policy.stops(name)]

    def spans(self, judged: Judged, flagged: Sequence[str]) -> tuple[Span, ...]:
        """The words that these categories are flagged for."""
        policy, text = self.policy, judged.prompt.text
        return hazard_spans(
            text, judged.labels.windows, flagged, policy.thresholds, policy.categories
        )

    def unknown_language(self, text: str, least_known: float) -> str | None:
        """What says that a text is in a language that was not trained; None if nothing does."""
        known, total = self.tokenizer.known_words(text)
        # One known word is added, so that a short prompt is not judged by one rare word.
        if total < FEWEST_JUDGED or (known + 1) / (total + 1) >= least_known:
            return None
        return f"of its {total} words {known} are known"
