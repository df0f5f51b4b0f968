"""One request from top to bottom."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import numpy as np

from lance_edge.bundle import Bundle, RefinerSpec, open_bundle
from lance_edge.decoder import Decoder
from lance_edge.errors import BundleError, InvalidOption, LanceError
from lance_edge.graphs import Graphs, open_graphs
from lance_edge.judge import Judge, Judged, Looks, Prompt
from lance_edge.language import LanguageTokenizer
from lance_edge.policy import STRENGTH, Policy, check_whole, policy
from lance_edge.refiner import Refiner
from lance_edge.repair import diff
from lance_edge.repairer import Repairer
from lance_edge.screener import FloatArray, Screener
from lance_edge.tokenizer import Tokenizer
from lance_edge.verdict import Decision, Timings, Verdict
from lance_edge_engines import BACKENDS, SessionError

if TYPE_CHECKING:
    from lance_edge_engines.plan_record import PlanEntry

T = TypeVar("T")

MAX_CHARS = 1_000_000
MOST_THREADS = 256


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
        self.plans = plans or {}
        self.templates = bundle.gradients() if bundle.manifest.gradients else None
        self.second_look = bundle.second_look() if open_refiner else None
        self._judge = Judge(
            tokenizer,
            screener,
            policy,
            max_chars,
            looks,
            self.second_look,
            lambda: self.refiner,
            self.templates,
        )
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
        return self.judge(self._judge.encode_all(texts))

    def refine(self, text: str) -> Verdict:
        """The verdict on one prompt, with an accepted rewrite where it should be rewritten.

        A prompt that is not flagged comes back as it is: `refined` is None, the decision "allow" (or
        the policy's `other_language`).
        Raises InvalidPrompt as `screen` does; BundleError or RefinerMissing without a refiner.
        """
        return next(self.repair([self.encode(text)]))

    def refine_many(self, texts: Iterable[str]) -> list[Verdict]:
        """What `refine` says of each prompt, in order. Raises InvalidPrompt, which names the index."""
        return list(self.repair(self._judge.encode_all(texts)))

    def encode(self, text: str) -> Prompt:
        """Check and tokenise a prompt. Raises InvalidPrompt."""
        return self._judge.encode(text)

    def judge(self, prompts: Sequence[Prompt]) -> list[Verdict]:
        """The verdicts on encoded prompts, in order."""
        looks = self._judge.first_looks(prompts)
        return [self._verdict(self._judge.look_again(judged)) for judged in looks]

    def repair(self, prompts: Sequence[Prompt]) -> Iterator[Verdict]:
        """The verdicts on encoded prompts, in order, with rewrites: each as soon as it is there."""
        refiner, looks = self.refiner, self._judge.first_looks(prompts)
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

    def _repaired(self, judged: Judged, refiner: Refiner) -> Verdict:
        try:
            judged = self._judge.look_again(judged)
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
        if count := self._judge.unknown_language(prompt, refiner.least_known):
            reason = f"it does not seem to be in a language that the refiner writes: {count}"
            return replace(verdict, decision=self.policy.unrepaired, reason=reason)
        started = time.perf_counter()
        assert self.templates is not None  # `open_bundle` sees to it where there is a refiner
        done = Repairer(self._judge, refiner, self.policy, self.templates).repair(judged)
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

    def _decide(self, prompt: str, flagged: Sequence[str]) -> tuple[Decision, str | None]:
        """The decision on a prompt, and the reason if it is not its categories'."""
        decision, other = self.policy.decide(flagged), self.policy.other_language
        if other == "read" or STRENGTH.index(decision) >= STRENGTH.index(other):
            return decision, None
        count = self._judge.unknown_language(prompt, self.bundle.least_known)
        if count is None:
            return decision, None
        return other, f"it does not seem to be in a language that the screener knows: {count}"

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
            spans=self._judge.spans(judged, flagged),
            gradients=self._judge.gradients(prompt.text, labels),
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
