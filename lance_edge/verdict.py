"""What the pipeline says of a prompt: the decision with everything that led to it."""

from __future__ import annotations

from dataclasses import dataclass, is_dataclass
from typing import Any, Literal

Decision = Literal["allow", "advise", "rewrite", "review", "block"]


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
class Gradient:
    """One category's textual feedback.

    elements   the words of the prompt that carry the hazard, as quoted in the text
    direction  which way to change them
    text       all of it in one line
    """

    category: str
    severity: float
    elements: tuple[str, ...]
    direction: str
    text: str


@dataclass(frozen=True)
class Edit:
    """A stretch of the word diff: `keep` and `delete` make the prompt, `keep` and `insert` the rewrite."""

    kind: Literal["keep", "delete", "insert"]
    text: str


@dataclass(frozen=True)
class RefineStep:
    """One rewrite and what came of it.

    source        what was rewritten: the prompt or a passage of it, or the last rewrite, if that was
                  still flagged
    critique      what the refiner was told
    text          what it wrote
    flagged       categories of the rewrite at or above their threshold
    problem       why it was not accepted; None if it was
    log_probability  of it as a whole, in nats (0 is certain), given source and critique
    tokens        of the rewrite
    decode_steps  graph runs that wrote it
    drafted       tokens proposed by copying from the prompt
    accepted      of those, the ones the model agreed with
    """

    source: str
    critique: str
    text: str
    flagged: tuple[str, ...]
    problem: str | None
    log_probability: float
    tokens: int
    decode_steps: int
    drafted: int
    accepted: int


@dataclass(frozen=True)
class Timings:
    """Where the time went, in milliseconds.

    In a batch, `score_ms` is the prompt's share of the time its graph runs took, by tokens.
    """

    encode_ms: float
    score_ms: float
    look_ms: float = 0.0
    refine_ms: float = 0.0


@dataclass(frozen=True)
class Verdict:
    """The decision on one prompt.

    decision      what to do with the prompt: allow, advise, rewrite, review or block
    flagged       categories at or above their threshold, the strongest first
    severity      category -> 0..1, the calibrated mean under the model's p(z | x)
    deviation     category -> standard deviation of that severity
    distribution  `none` and each category -> share; sums to 1
    spans         the words that carry the flagged categories' hazard, in order of appearance
    gradients     per flagged category, what is hazardous and which way to change it
    look          which look decided: 1 the screener alone, 2 the refiner's language model too
    refined       the accepted rewrite; None if there is none, or none was asked for
    critique      what the refiner was told first
    steps         the rewrites that were tried
    diff          from the prompt to the accepted rewrite
    reason        why a prompt that should be rewritten was not, or what else than its categories
                  decided; None otherwise
    tokens        tokens read, once per window they stand in
    windows       stretches the prompt was read in, those included that were read once more, closely
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
    gradients: tuple[Gradient, ...] = ()
    look: Literal[1, 2] = 1
    refined: str | None = None
    critique: str | None = None
    steps: tuple[RefineStep, ...] = ()
    diff: tuple[Edit, ...] = ()
    reason: str | None = None

    def __repr__(self) -> str:
        told = ("decision", "flagged", "refined")
        return f"Verdict({', '.join(f'{name}={getattr(self, name)!r}' for name in told)})"

    def to_dict(self) -> dict[str, Any]:
        """The verdict in plain JSON types, as `verdict.schema.json` describes it."""
        return {name: _plain(value) for name, value in vars(self).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return dict(value)
    return {k: _plain(v) for k, v in vars(value).items()} if is_dataclass(value) else value
