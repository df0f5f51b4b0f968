"""From a judged prompt to its repair: which passages are rewritten, and when the whole prompt is."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lance_edge.bundle import Templates
from lance_edge.errors import InvalidPrompt
from lance_edge.gradient import critique, widened
from lance_edge.judge import Judge, Judged
from lance_edge.passages import Range, carrying, joined
from lance_edge.policy import Policy
from lance_edge.refiner import Reading, Refiner, Rewrite
from lance_edge.repair import Repair, repair, repair_passages
from lance_edge.verdict import Gradient, RefineStep

LONGEST_JOINED = 96  # tokens of neighbouring sentences that are rewritten as one passage


class Repairer:
    """Hands the repair loop (repair.py) what a judge says and a refiner writes."""

    def __init__(
        self, judge: Judge, refiner: Refiner, policy: Policy, templates: Templates
    ) -> None:
        self._judge = judge
        self._refiner = refiner
        self._policy = policy
        self._templates = templates

    def repair(self, judged: Judged) -> Repair:
        """Rewrites the passages that carry the hazard; where that does not do, the prompt as a whole. Where
        no sentence is hazardous by itself, the other way round: what makes it so is around it."""
        prompt, least_known = judged.prompt.text, self._refiner.least_known
        for start, end in self._passages(judged):
            if count := self._judge.unknown_language(prompt[start:end], least_known):
                reason = (
                    f"a passage does not seem to be in a language that the refiner writes: {count}"
                )
                return Repair(None, (), reason)
        attempts = [self._in_passages, self._as_a_whole]
        if not any(self._judge.stopped(alone.severity) for alone in judged.sentences.values()):
            attempts.reverse()
        steps: list[RefineStep] = []
        reasons: list[str] = []
        for attempt in attempts:
            made = attempt(judged)
            steps += made.steps
            if made.refined is not None:
                return replace(made, steps=tuple(steps))
            if made.reason is not None:
                reasons.append(made.reason)
        return Repair(None, tuple(steps), "; ".join(reasons))

    def _as_a_whole(self, judged: Judged) -> Repair:
        """Rewrites the prompt, if the refiner can read it."""
        prompt, refiner = judged.prompt.text, self._refiner
        if refiner.fits(prompt):
            found = self._judge.to_change(prompt, judged.labels)
            return self._of_text(prompt, found, judged.reading)
        reason = (
            f"the refiner reads {refiner.prompt_tokens} tokens and the prompt has "
            f"{refiner.tokenizer.count(prompt)}"
        )
        return Repair(None, (), reason)

    def _in_passages(self, judged: Judged) -> Repair:
        """Rewrites the passages that carry the hazard, each by itself."""
        prompt, latest, refiner = judged.prompt.text, judged, self._refiner
        count = refiner.tokenizer.count
        # Of a prompt that is mostly hazard, what is left is better changed with the rest in view.
        part = sum(count(prompt[start:end]) for start, end in self._passages(judged))
        is_lesser = 2 * part < count(prompt)

        def judge(text: str) -> tuple[Gradient, ...]:
            nonlocal latest
            latest = replace(self._judge.read(text), reading=None)  # which holds a cache
            return self._judge.to_change(text, latest.labels)

        return repair_passages(
            prompt,
            passages=lambda _: self._passages(latest),
            found_in=lambda passage: self._found_in(passage, latest),
            repair_alone=self._of_text,
            judge=judge,
            is_control=refiner.tokenizer.has_control,
            least_kept=refiner.least_kept,
            count=count,
            most_tokens=refiner.prompt_tokens,
            max_rounds=self._policy.max_steps if is_lesser else 1,
        )

    def _passages(self, judged: Judged) -> list[Range]:
        """The sentences that would be stopped if they stood alone, or, if there are none, those that carry
        what is to change; neighbours as one, if they are short. None if that is all of the prompt."""
        text, parts, judge = judged.prompt.text, [*judged.sentences], self._judge
        chosen = [part for part in parts if judge.stopped(judged.sentences[part].severity)]
        if not chosen:
            chosen = carrying(parts, judge.spans(judged, judge.stopped(judged.labels.severity)))

        def is_short(start: int, end: int) -> bool:
            return self._refiner.tokenizer.count(text[start:end]) <= LONGEST_JOINED

        passages = joined(parts, chosen, is_short)
        return [] if len(passages) < 2 and len(chosen) == len(parts) else passages

    def _found_in(self, passage: Range, judged: Judged) -> tuple[Gradient, ...]:
        """The gradients of a passage: of what its sentences would be stopped for, or else of what the
        prompt is flagged for, in their words."""
        start, end = passage
        inside = [read for part, read in judged.sentences.items() if start <= part[0] < end]
        windows = tuple(window for read in inside for window in read.windows)
        severity = np.max([read.severity for read in inside], axis=0)
        if not self._judge.stopped(severity):
            severity = judged.labels.severity
        labels = replace(judged.labels, severity=severity, windows=windows)
        return self._judge.to_change(judged.prompt.text, labels)

    def _of_text(
        self, text: str, found: tuple[Gradient, ...], reading: Reading | None = None
    ) -> Repair:
        """Rewrites a text that the refiner can read."""
        refiner = self._refiner
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
            again = self._judge.read(text)
            left = self._judge.to_change(text, again.labels)
            if left:  # it is the next text to be rewritten
                readings.clear()
                readings[text] = again.reading
            return left

        return repair(
            text,
            found,
            compose=lambda found: critique(found, refiner.tokenizer.count, self._templates),
            rewrite=rewrite,
            judge=judge,
            widen=lambda text, found: widened(text, found, self._templates),
            is_control=refiner.tokenizer.has_control,
            least_kept=refiner.least_kept,
            least_log_probability=self._policy.least_log_probability,
            max_steps=self._policy.max_steps,
        )
