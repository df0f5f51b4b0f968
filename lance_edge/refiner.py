"""Reads a prompt a second time and rewrites it, copying what it can.

The order of a sequence lets one prefill serve both: prefix, prompt, [second look], critique,
rewrite. A rewrite is what plain greedy decoding would write, token for token: drafts only let
one step settle several tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lance_edge.bundle import Calibration
from lance_edge.decoder import Cache, Decoder
from lance_edge.draft import LONGEST, Alignment, accepted, advance, propose
from lance_edge.language import LanguageTokenizer
from lance_edge.screener import FloatArray
from lance_edge_engines import SessionError

GROWTH, SLACK = 1.5, 32  # a rewrite may have GROWTH x the prompt's tokens + SLACK
CRITIQUE_TOKENS = 256  # room for a critique


@dataclass(frozen=True)
class Reading:
    """A prompt in the cache, and what the second look says of it.

    mean, deviation  calibrated latent severities  [C]
    length           tokens in the cache up to the critique
    """

    prompt: tuple[int, ...]
    cache: Cache
    length: int
    mean: FloatArray
    deviation: FloatArray
    read_ms: float


@dataclass(frozen=True)
class Rewrite:
    """What the refiner wrote, without the token that ends it.

    ended            whether it came to an end by itself
    log_probability  how likely the refiner finds it as a whole, in nats: the sum over its tokens, the
                     one that ends it included
    steps            graph runs; drafted, accepted: tokens proposed by copying, and agreed with
    """

    ids: tuple[int, ...]
    text: str
    ended: bool
    log_probability: float
    steps: int
    drafted: int
    accepted: int
    write_ms: float


class Refiner:
    """The refiner's language model behind a decoder.

    calibration    of the second look, in the taxonomy's order
    prompt_tokens  the longest prompt it reads
    least_kept     share of the words outside the hazard that a rewrite must keep, in order
    least_known    share of a prompt's words that must be known, for it to be in a language that it writes
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: LanguageTokenizer,
        calibration: Sequence[Calibration],
        prompt_tokens: int,
        least_kept: float,
        least_known: float = 0.0,
    ) -> None:
        self.decoder = decoder
        self.tokenizer = tokenizer
        self.prompt_tokens = prompt_tokens
        self.least_kept = least_kept
        self.least_known = least_known
        self.slope = np.array([item.slope for item in calibration])
        self.intercept = np.array([item.intercept for item in calibration])

    def fits(self, text: str) -> bool:
        """Whether a prompt is short enough to be read."""
        return self.tokenizer.count(text) <= self.prompt_tokens

    def read(self, text: str) -> Reading:
        """The second look at a prompt that `fits`; its cache serves the rewrite too."""
        started = time.perf_counter()
        prompt = self.tokenizer.encode(text)
        assert len(prompt) <= self.prompt_tokens
        ids = self.tokenizer.before_critique(prompt)[len(self.tokenizer.prefix) :]
        opening = len(self.tokenizer.after_prompt(""))
        writing = longest_rewrite(len(prompt)) + LONGEST
        cache = self.decoder.start(len(ids) + CRITIQUE_TOKENS + opening + writing)
        step = self.decoder.step(cache, ids, first=len(ids) - 1)
        if not (np.isfinite(step.mean).all() and np.isfinite(step.deviation).all()):
            raise SessionError("the refiner's graph gave values that are not numbers")
        return Reading(
            tuple(prompt),
            cache,
            cache.length,
            self.slope * step.mean + self.intercept,
            self.slope * step.deviation,
            (time.perf_counter() - started) * 1000,
        )

    def rewrite(self, reading: Reading, critique: str, speculative: bool = True) -> Rewrite:
        """Rewrite the prompt that was read along a critique.

        speculative  draft by copying; without it the same tokens are written one by one

        Raises ValueError if the critique is longer than CRITIQUE_TOKENS.
        """
        started = time.perf_counter()
        reading.cache.rollback(reading.length)
        opening = self.tokenizer.after_prompt(critique)
        if len(opening) - len(self.tokenizer.after_prompt("")) > CRITIQUE_TOKENS:
            raise ValueError(f"the critique has more than {CRITIQUE_TOKENS} tokens")
        source = (*reading.prompt, self.tokenizer.end)
        ids, counts, log_probability = generate(
            self.decoder,
            reading.cache,
            opening,
            source,
            longest_rewrite(len(reading.prompt)),
            speculative,
        )
        ended = ids[-1] == self.tokenizer.end
        kept = ids[:-1] if ended else ids
        return Rewrite(
            tuple(kept),
            self.tokenizer.decode(kept),
            ended,
            log_probability,
            *counts,
            write_ms=(time.perf_counter() - started) * 1000,
        )

    def close(self) -> None:
        self.decoder.close()


def longest_rewrite(prompt_tokens: int) -> int:
    """How many tokens a rewrite may have before it is cut off, and refused."""
    return int(GROWTH * prompt_tokens) + SLACK


def generate(
    decoder: Decoder,
    cache: Cache,
    opening: Sequence[int],
    source: tuple[int, ...],
    limit: int,
    speculative: bool,
) -> tuple[list[int], tuple[int, int, int], float]:
    """Greedy decoding after `opening`; the tokens, (steps, drafted, accepted), and their log-probability.

    source  what the output is likely to copy, and the token that ends it, which comes last
    limit   tokens at most, the ending one included

    Raises SessionError for a log-probability that is not a number.
    """
    end = source[-1]
    alignment = Alignment(source, pointer=0 if speculative else None)
    step = decoder.step(cache, opening, first=len(opening) - 1)
    output, log_probability = step.tokens, sum(step.log_probabilities)
    alignment = advance(alignment, output, 0, output)
    steps = drafted = agreed = 0
    while output[-1] != end and len(output) < limit:
        draft = propose(alignment)[: limit - len(output) - 1] if speculative else []
        step = decoder.step(cache, [output[-1], *draft])
        following = step.tokens
        kept = accepted(draft, following)
        cache.rollback(cache.length - (len(draft) - kept))
        written = following[: kept + 1]
        if end in written:
            written = written[: written.index(end) + 1]
        output = [*output, *written]
        log_probability += sum(step.log_probabilities[: len(written)])
        if speculative:
            alignment = advance(alignment, written, kept, output)
        steps, drafted, agreed = steps + 1, drafted + len(draft), agreed + kept
    if not math.isfinite(log_probability):
        raise SessionError("the refiner's graph gave values that are not numbers")
    return output, (steps + 1, drafted, agreed), log_probability
