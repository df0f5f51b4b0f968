"""One request from top to bottom."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

import numpy as np

from lance_edge.bundle import Bundle, RefinerSpec, open_bundle
from lance_edge.decoder import Decoder
from lance_edge.errors import BundleError, InvalidOption, InvalidPrompt, LanceError
from lance_edge.gradient import critique, gradients, widened
from lance_edge.graphs import Graphs, open_graphs
from lance_edge.language import LanguageTokenizer
from lance_edge.passages import Range, apart, carrying, joined
from lance_edge.policy import STRENGTH, Policy, check_whole, policy
from lance_edge.refiner import Reading, Refiner, Rewrite
from lance_edge.repair import Repair, diff, repair, repair_passages
from lance_edge.screener import FloatArray, Labels, Screener, both_looks
from lance_edge.spans import hazard_spans
from lance_edge.tokenizer import Tokenizer, Window
from lance_edge.verdict import Decision, Gradient, RefineStep, Span, Timings, Verdict
from lance_edge_engines import BACKENDS, SessionError

if TYPE_CHECKING:
    from lance_edge_engines.plan_record import PlanEntry

Looks = Literal["1", "2", "auto"]
T = TypeVar("T")

MAX_CHARS = 1_000_000
LONGEST_JOINED = 96  # tokens of neighbouring sentences that are rewritten as one passage
MOST_THREADS = 256
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

    sentences  what the first look says of each by itself, if there are several and the prompt is not
               clearly harmless
    reading    the second look's cache; None if there was none
    """

    prompt: Prompt
    labels: Labels
    sentences: Mapping[Range, Labels] = field(default_factory=dict)
    reading: Reading | None = None


class Pipeline:
    """Screens and refines prompts. Made by `load`; may be used from several threads at once."""

    def __init__(
        self,
        bundle: Bundle,
        tokenizer: Tokenizer,
        screener: Screener,
        policy: Policy,
        max_chars: int,
        looks: Looks = "1",
        open_refiner: Callable[[], Refiner] | None = None,
        plans: Mapping[str, PlanEntry] | None = None,
    ) -> None:
        """`open_refiner` is called when a refiner is first needed; None if there is none.

        plans  what runs as TensorRT plans, by part

        looks  "1": the screener alone; "2": every prompt is read twice; "auto": those that the
               first look leaves open
        """
        self.bundle = bundle
        self.tokenizer = tokenizer
        self.screener = screener
        self.policy = policy
        self.max_chars = max_chars
        self.looks = looks
        self.plans = plans or {}
        self.templates = bundle.gradients() if bundle.manifest.gradients else None
        self.second_look = bundle.second_look() if open_refiner else None
        self._open_refiner = open_refiner
        self._refiner: Refiner | None = None
        self._opening = threading.Lock()

    @property
    def device(self) -> str:
        """Where the screener runs; what "auto" chose."""
        return self.screener.device

    @property
    def refiner(self) -> Refiner:
        """The refiner, opened when it is first asked for.

        Raises BundleError if the bundle has none, RefinerMissing if it was never pulled.
        """
        with self._opening:
            if self._refiner is None:
                if self._open_refiner is None:
                    raise BundleError(
                        f"the bundle {self.bundle.manifest.name} has no refiner: it can screen "
                        "prompts, not refine them"
                    )
                self._refiner = self._open_refiner()
            return self._refiner

    def screen(self, text: str) -> Verdict:
        """The verdict on one prompt.

        Raises InvalidPrompt if the text is empty, not valid Unicode or longer than max_chars.
        """
        return self.judge([self.encode(text)])[0]

    def screen_many(self, texts: Iterable[str]) -> list[Verdict]:
        """The verdicts on several prompts, in order; each is what `screen` says of it alone, but for
        the order of sums.

        Raises InvalidPrompt, which names the prompt's index, before any of them is screened.
        To go on with the others, `encode` each prompt yourself and `judge` those that pass.
        """
        return self.judge(self._encode_all(texts))

    def refine(self, text: str) -> Verdict:
        """The verdict on one prompt, with an accepted rewrite where it should be rewritten.

        A prompt that is not flagged comes back as it is: `refined` is None, the decision "allow" (or
        the policy's `other_language`).
        Raises InvalidPrompt as `screen` does; BundleError or RefinerMissing without a refiner.
        """
        return next(self.repair([self.encode(text)]))

    def refine_many(self, texts: Iterable[str]) -> list[Verdict]:
        """What `refine` says of each prompt, in order. Raises InvalidPrompt, which names the index."""
        return list(self.repair(self._encode_all(texts)))

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

    def judge(self, prompts: Sequence[Prompt]) -> list[Verdict]:
        """The verdicts on encoded prompts, in order."""
        return [self._verdict(self._look_again(judged)) for judged in self._first_looks(prompts)]

    def repair(self, prompts: Sequence[Prompt]) -> Iterator[Verdict]:
        """The verdicts on encoded prompts, in order, with rewrites: each as soon as it is there."""
        refiner, looks = self.refiner, self._first_looks(prompts)
        return (self._repaired(judged, refiner) for judged in looks)

    def close(self) -> None:
        """Free the models' memory."""
        self.screener.close()
        if self._refiner is not None:
            self._refiner.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _encode_all(self, texts: Iterable[str]) -> list[Prompt]:
        if isinstance(texts, str):
            raise InvalidPrompt("one text was given and a list of texts was expected")
        prompts = []
        for index, text in enumerate(texts):
            try:
                prompts.append(self.encode(text))
            except InvalidPrompt as error:
                raise InvalidPrompt(f"prompt {index}: {error}") from error
        return prompts

    def _first_looks(self, prompts: Sequence[Prompt]) -> list[Judged]:
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
            labels = self.screener.with_sentences(whole, [*found.values()]) if found else whole
            looks.append(Judged(prompt, labels, found))
        return looks

    def _read(self, text: str) -> Judged:
        """What the looks say of a text."""
        return self._look_again(self._first_looks([self.encode(text)])[0])

    def _look_again(self, judged: Judged) -> Judged:
        """With a second look at the prompt, if the first leaves it open and the refiner can read it."""
        look = self.second_look
        if look is None or self.looks == "1":
            return judged
        is_open = (
            look.low
            <= self.policy.margin(judged.labels.severity, judged.labels.deviation)
            <= look.high
        )
        if not (is_open or self.looks == "2") or not self.refiner.fits(judged.prompt.text):
            return judged
        reading = self.refiner.read(judged.prompt.text)
        labels = both_looks(judged.labels, reading.mean, reading.deviation, look.share)
        return replace(judged, labels=labels, reading=reading)

    def _repaired(self, judged: Judged, refiner: Refiner) -> Verdict:
        try:
            judged = self._look_again(judged)
            verdict = self._verdict(judged)
            return self._rewritten(judged, verdict, refiner)
        except SessionError as error:
            verdict = self._verdict(judged)
            decision = self.policy.decide_without(verdict.decision)
            reasons = filter(None, (f"the refiner failed: {error}", verdict.reason))
            return replace(verdict, decision=decision, reason="; ".join(reasons))

    def _rewritten(self, judged: Judged, verdict: Verdict, refiner: Refiner) -> Verdict:
        """The verdict with an accepted rewrite, if it asks for one, or the reason why there is none."""
        if verdict.decision != "rewrite":
            return verdict
        prompt = judged.prompt.text
        if count := self._unknown_language(prompt, refiner.least_known):
            reason = f"it does not seem to be in a language that the refiner writes: {count}"
            return replace(verdict, decision=self.policy.unrepaired, reason=reason)
        started = time.perf_counter()
        done = self._repair_prompt(judged, refiner)
        refine_ms = (time.perf_counter() - started) * 1000
        return replace(
            verdict,
            decision="rewrite" if done.refined is not None else self.policy.unrepaired,
            refined=done.refined,
            critique=done.steps[0].critique if done.steps else None,
            steps=done.steps,
            diff=() if done.refined is None else diff(prompt, done.refined),
            reason=done.reason,
            timings=replace(verdict.timings, refine_ms=refine_ms),
        )

    def _repair_prompt(self, judged: Judged, refiner: Refiner) -> Repair:
        """Rewrites the passages that carry the hazard; where that does not do, the prompt as a whole. Where
        no sentence is hazardous by itself, the other way round: what makes it so is around it."""
        prompt = judged.prompt.text
        for start, end in self._passages(judged, refiner):
            if count := self._unknown_language(prompt[start:end], refiner.least_known):
                reason = (
                    f"a passage does not seem to be in a language that the refiner writes: {count}"
                )
                return Repair(None, (), reason)
        attempts = [self._repair_passages, self._repair_whole]
        if not any(self._stopped(alone.severity) for alone in judged.sentences.values()):
            attempts.reverse()
        steps: list[RefineStep] = []
        reasons: list[str] = []
        for attempt in attempts:
            made = attempt(judged, refiner)
            steps += made.steps
            if made.refined is not None:
                return replace(made, steps=tuple(steps))
            if made.reason is not None:
                reasons.append(made.reason)
        return Repair(None, tuple(steps), "; ".join(reasons))

    def _repair_whole(self, judged: Judged, refiner: Refiner) -> Repair:
        """Rewrites the prompt, if the refiner can read it."""
        prompt = judged.prompt.text
        if refiner.fits(prompt):
            found = self._to_change(prompt, judged.labels)
            return self._repair_text(prompt, found, refiner, judged.reading)
        reason = (
            f"the refiner reads {refiner.prompt_tokens} tokens and the prompt has "
            f"{refiner.tokenizer.count(prompt)}"
        )
        return Repair(None, (), reason)

    def _repair_passages(self, judged: Judged, refiner: Refiner) -> Repair:
        """Rewrites the passages that carry the hazard, each by itself."""
        prompt, latest, count = judged.prompt.text, judged, refiner.tokenizer.count
        # Of a prompt that is mostly hazard, what is left is better changed with the rest in view.
        part = sum(count(prompt[start:end]) for start, end in self._passages(judged, refiner))
        is_lesser = 2 * part < count(prompt)

        def judge(text: str) -> tuple[Gradient, ...]:
            nonlocal latest
            latest = replace(self._read(text), reading=None)  # which holds a cache
            return self._to_change(text, latest.labels)

        return repair_passages(
            prompt,
            passages=lambda _: self._passages(latest, refiner),
            found_in=lambda passage: self._found_in(passage, latest),
            repair_alone=lambda text, found: self._repair_text(text, found, refiner),
            judge=judge,
            is_control=refiner.tokenizer.has_control,
            least_kept=refiner.least_kept,
            count=count,
            most_tokens=refiner.prompt_tokens,
            max_rounds=self.policy.max_steps if is_lesser else 1,
        )

    def _passages(self, judged: Judged, refiner: Refiner) -> list[Range]:
        """The sentences that would be stopped if they stood alone, or, if there are none, those that carry
        what is to change; neighbours as one, if they are short. None if that is all of the prompt."""
        text, parts = judged.prompt.text, [*judged.sentences]
        chosen = [part for part in parts if self._stopped(judged.sentences[part].severity)]
        if not chosen:
            chosen = carrying(parts, self._spans(judged, self._stopped(judged.labels.severity)))

        def is_short(start: int, end: int) -> bool:
            return refiner.tokenizer.count(text[start:end]) <= LONGEST_JOINED

        passages = joined(parts, chosen, is_short)
        return [] if len(passages) < 2 and len(chosen) == len(parts) else passages

    def _found_in(self, passage: Range, judged: Judged) -> tuple[Gradient, ...]:
        """The gradients of a passage: of what its sentences would be stopped for, or else of what the
        prompt is flagged for, in their words."""
        start, end = passage
        inside = [read for part, read in judged.sentences.items() if start <= part[0] < end]
        windows = tuple(window for read in inside for window in read.windows)
        severity = np.max([read.severity for read in inside], axis=0)
        if not self._stopped(severity):
            severity = judged.labels.severity
        labels = replace(judged.labels, severity=severity, windows=windows)
        return self._to_change(judged.prompt.text, labels)

    def _stopped(self, severity: FloatArray) -> list[str]:
        """The flagged categories that the policy does not let pass  [C]"""
        return [name for name in self.policy.flagged(severity) if self.policy.stops(name)]

    def _repair_text(
        self,
        text: str,
        found: tuple[Gradient, ...],
        refiner: Refiner,
        reading: Reading | None = None,
    ) -> Repair:
        """Rewrites a text that the refiner can read."""
        # Of the text in hand alone: each reading holds a cache of keys and values.
        readings = {text: reading}

        def rewrite(text: str, critique: str) -> Rewrite:
            reading = readings.get(text)
            if reading is None:
                readings.clear()
                reading = readings[text] = refiner.read(text)
            return refiner.rewrite(reading, critique)

        def judge(text: str) -> tuple[Gradient, ...]:
            if not refiner.fits(text):
                raise InvalidPrompt(f"it has more than {refiner.prompt_tokens} tokens")
            again = self._read(text)
            left = self._to_change(text, again.labels)
            if left:  # it is the next text to be rewritten
                readings.clear()
                readings[text] = again.reading
            return left

        templates = self.templates
        assert templates is not None  # `open_bundle` sees to it where there is a refiner
        return repair(
            text,
            found,
            compose=lambda found: critique(found, refiner.tokenizer.count, templates),
            rewrite=rewrite,
            judge=judge,
            widen=lambda text, found: widened(text, found, templates),
            is_control=refiner.tokenizer.has_control,
            least_kept=refiner.least_kept,
            least_log_probability=self.policy.least_log_probability,
            max_steps=self.policy.max_steps,
        )

    def _unknown_language(self, text: str, least_known: float) -> str | None:
        """What says that a text is in a language that was not trained; None if nothing does."""
        known, total = self.tokenizer.known_words(text)
        # One known word is added, so that a short prompt is not judged by one rare word.
        if total < FEWEST_JUDGED or (known + 1) / (total + 1) >= least_known:
            return None
        return f"of its {total} words {known} are known"

    def _decide(self, prompt: str, flagged: Sequence[str]) -> tuple[Decision, str | None]:
        """The decision on a prompt, and the reason if it is not its categories'."""
        decision, other = self.policy.decide(flagged), self.policy.other_language
        if other == "read" or STRENGTH.index(decision) >= STRENGTH.index(other):
            return decision, None
        count = self._unknown_language(prompt, self.bundle.least_known)
        if count is None:
            return decision, None
        return other, f"it does not seem to be in a language that the screener knows: {count}"

    def _gradients(self, text: str, labels: Labels) -> tuple[Gradient, ...]:
        """One for each flagged category, if the bundle has templates."""
        if self.templates is None:
            return ()
        flagged = self.policy.flagged(labels.severity)
        return gradients(text, labels, flagged, self.policy.categories, self.templates)

    def _to_change(self, text: str, labels: Labels) -> tuple[Gradient, ...]:
        """The gradients of categories that the policy does not let pass."""
        found = self._gradients(text, labels)
        return tuple(item for item in found if self.policy.stops(item.category))

    def _spans(self, judged: Judged, flagged: Sequence[str]) -> tuple[Span, ...]:
        policy, text = self.policy, judged.prompt.text
        return hazard_spans(
            text, judged.labels.windows, flagged, policy.thresholds, policy.categories
        )

    def _verdict(self, judged: Judged) -> Verdict:
        prompt, labels, names = judged.prompt, judged.labels, self.policy.categories
        flagged = self.policy.flagged(labels.severity)
        decision, reason = self._decide(prompt.text, flagged)
        reading = judged.reading
        return Verdict(
            decision=decision,
            reason=reason,
            flagged=flagged,
            severity=_by_name(names, labels.severity),
            deviation=_by_name(names, labels.deviation),
            distribution=_by_name(("none", *names), labels.distribution),
            spans=self._spans(judged, flagged),
            gradients=self._gradients(prompt.text, labels),
            look=1 if reading is None else 2,
            tokens=sum(len(read.window.ids) for read in labels.windows),
            windows=len(labels.windows),
            bundle=self.bundle.sha256,
            device=self.device,
            timings=Timings(
                prompt.encode_ms,
                sum(window.score_ms for window in labels.windows),
                0.0 if reading is None else reading.read_ms,
            ),
        )


def load(
    bundle: str | os.PathLike[str] | None = None,
    device: str = "auto",
    *,
    thresholds: Mapping[str, float] | float | None = None,
    rules: Mapping[str, Any] | str | os.PathLike[str] | None = None,
    looks: Looks = "auto",
    threads: int | None = None,
    max_chars: int = MAX_CHARS,
    public_key: str | os.PathLike[str] | None = None,
    plans: str | os.PathLike[str] | None = None,
) -> Pipeline:
    """A pipeline from a bundle's folder; the default bundle if none is given.

    device      "auto": the CPU for int8 graphs, for others CUDA if it is there; or one of
                `lance_edge_engines.BACKENDS`, and no other
    thresholds  severities from which on categories are flagged, in place of the bundle's: one for
                all, or by category, where "*" stands for those that are not named
    rules       other changes to the bundle's policy, or a file of them: see `lance_edge.policy.policy`
    looks       "1": the screener alone decides; "2": the refiner's language model reads every
                prompt too; "auto": it reads those that the screener leaves open, if its weights
                are on this machine
    threads     CPU threads for one request; None for one per physical core
    max_chars   longer prompts are refused: they are read in full, which takes time
    public_key  PEM file; only a bundle that its owner signed is loaded. $LANCE_EDGE_PUBLIC_KEY if
                none is given; without either, signatures are not looked at
    plans       folder that `lance-edge plan` wrote: TensorRT runs the graphs that it has plans of, on
                the first GPU, and `device` those that it has not

    Raises BundleError, InvalidOption (also for looks="2" where the refiner has no second look),
    lance_edge_engines.DeviceUnavailable, SessionError for plans that do not fit the bundle or this
    machine, or, with looks="2", RefinerMissing.
    """
    public_key = public_key or os.environ.get("LANCE_EDGE_PUBLIC_KEY") or None
    if public_key is not None and plans is not None:
        raise InvalidOption(
            "plans are not signed, so a public key cannot vouch for them; leave out one of the two "
            "(a public key may come from $LANCE_EDGE_PUBLIC_KEY)"
        )
    return assemble(
        open_bundle(bundle, None if public_key is None else Path(public_key)),
        device,
        thresholds=thresholds,
        rules=rules,
        looks=looks,
        threads=threads,
        max_chars=max_chars,
        plans=plans,
    )


def assemble(
    bundle: Bundle,
    device: str = "auto",
    *,
    thresholds: Mapping[str, float] | float | None = None,
    rules: Mapping[str, Any] | str | os.PathLike[str] | None = None,
    looks: Looks = "auto",
    threads: int | None = None,
    max_chars: int = MAX_CHARS,
    plans: str | os.PathLike[str] | None = None,
) -> Pipeline:
    """`load`, of a bundle that is open: whether it is signed was looked at then."""
    if threads is not None:
        check_whole("threads", threads)
        if threads > MOST_THREADS:
            raise InvalidOption(f"threads must be at most {MOST_THREADS}, not {threads:,}")
    check_whole("max_chars", max_chars)
    if device not in ("auto", *BACKENDS):
        raise InvalidOption(
            f"there is no device {device!r}; choose from auto, {', '.join(BACKENDS)}"
        )
    if looks not in get_args(Looks):
        raise InvalidOption(f"looks must be one of {', '.join(get_args(Looks))}, not {looks!r}")
    chosen = policy(bundle, thresholds, rules)
    refiner = bundle.manifest.refiner
    if looks == "2" and refiner is not None and bundle.second_look().share == 0:
        raise InvalidOption(
            f"the refiner of {bundle.path} has no second look; choose looks auto or 1"
        )
    spec = bundle.manifest.screener
    tokenizer = Tokenizer(bundle.read(spec.tokenizer), spec.window, spec.overlap)
    graphs = open_graphs(bundle, device, threads, None if plans is None else Path(plans))
    session = graphs.screener()
    calibration = [bundle.calibration[name] for name in chosen.categories]
    screener = Screener(session, calibration, spec.close, chosen.thresholds)
    if looks == "auto" and not graphs.has_refiner():
        looks = "1"
    opener = partial(open_refiner, graphs, refiner) if refiner else None
    pipeline = Pipeline(bundle, tokenizer, screener, chosen, max_chars, looks, opener, graphs.plans)
    if looks == "2":
        try:
            _ = pipeline.refiner  # a second look that cannot be had is an error now, not later
        except (LanceError, SessionError):
            pipeline.close()
            raise
    return pipeline


def open_refiner(graphs: Graphs, spec: RefinerSpec) -> Refiner:
    """The bundle's refiner. Raises RefinerMissing, BundleError, SessionError."""
    bundle = graphs.bundle
    # Hashing takes a tenth of a second. The session is opened here: in a thread, it would take 40 MB more.
    weights = _beside(partial(graphs.weights, spec))
    tokenizer = LanguageTokenizer(bundle.read(spec.tokenizer), spec.template)
    session = graphs.refiner(spec, weights())
    decoder = Decoder(session, bundle.arrays(spec.prefix), len(tokenizer.prefix), spec.context)
    look = bundle.second_look()
    calibration = [look.calibration[category.name] for category in bundle.categories]
    return Refiner(
        decoder, tokenizer, calibration, spec.prompt_tokens, spec.least_kept, spec.least_known
    )


def _beside(task: Callable[[], T]) -> Callable[[], T]:
    """Starts a task in a thread; what comes back waits for its result, or raises its error."""
    results: list[T] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            results.append(task())
        except Exception as error:
            errors.append(error)

    def result() -> T:
        thread.join()
        if errors:
            raise errors[0]
        return results[0]

    thread = threading.Thread(target=run)
    thread.start()
    return result


def _by_name(names: Sequence[str], values: FloatArray) -> dict[str, float]:
    clipped = np.clip(values, 0.0, 1.0)
    return {name: float(value) for name, value in zip(names, clipped, strict=True)}
