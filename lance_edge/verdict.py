"""What the pipeline says of a prompt: the decision with everything that led to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Decision = Literal["allow", "rewrite", "review", "block"]


@dataclass(frozen=True)
class Span:
    """Words of the prompt that carry a category's hazard.

    start, end  character offsets into the prompt as it was given; prompt[start:end] is the text
    weight      share of the category's positive evidence in the window that was read, 0..1
    """

    start: int
    end: int
    category: str
    weight: float


@dataclass(frozen=True)
class Timings:
    """Where the time went, in milliseconds.

    In a batch, `score_ms` is the prompt's share of the time its graph runs took, by tokens.
    """

    encode_ms: float
    score_ms: float


@dataclass(frozen=True)
class Verdict:
    """The decision on one prompt.

    decision      what to do with the prompt: allow, rewrite, review or block
    flagged       categories at or above their threshold, the strongest first
    severity      category -> 0..1, the calibrated mean under the model's p(z | x)
    deviation     category -> standard deviation of that severity
    distribution  `none` and each category -> share; sums to 1
    spans         the words that carry the flagged categories' hazard, in order of appearance
    tokens        tokens read, windows' overlaps counted once per window
    windows       stretches the prompt was read in
    bundle        SHA-256 of the bundle's manifest
    device        where the graph ran
    timings       where the time went
    """

    decision: Decision
    flagged: tuple[str, ...]
    severity: dict[str, float]
    deviation: dict[str, float]
    distribution: dict[str, float]
    spans: tuple[Span, ...]
    tokens: int
    windows: int
    bundle: str
    device: str
    timings: Timings

    def to_dict(self) -> dict[str, Any]:
        """The verdict in plain JSON types, as `verdict.schema.json` describes it."""
        return {
            "decision": self.decision,
            "flagged": list(self.flagged),
            "severity": dict(self.severity),
            "deviation": dict(self.deviation),
            "distribution": dict(self.distribution),
            "spans": [vars(span).copy() for span in self.spans],
            "tokens": self.tokens,
            "windows": self.windows,
            "bundle": self.bundle,
            "device": self.device,
            "timings": vars(self.timings).copy(),
        }
