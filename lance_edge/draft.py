"""Copy proposals: what a rewrite is likely to say next, read off the prompt it rewrites.

Most of a rewrite repeats its prompt. A pointer follows the prompt while the model agrees with
it; after an edit it is found again by the last tokens written. Pure functions over lists of ids.
Speculation by lookup in the prompt: Saxena, "Prompt Lookup Decoding", 2023; following a known
source through edits is ours.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import takewhile

LONGEST = 16  # tokens in a draft; a longer one costs more than it saves when it fails
FIRST = 4  # tokens in the first draft, and after an alignment beyond doubt
UNSURE = 2  # tokens in a draft after an alignment by few tokens
EVIDENCE = 3  # tokens that align source and output beyond doubt
REACH = 48  # how far ahead of the last aligned token the source may be taken up again, in tokens


@dataclass(frozen=True)
class Alignment:
    """Where in the source the output stands.

    source   the prompt's ids, then the token that ends a rewrite
    pointer  the source token expected next; None after an edit, until it is found again
    reached  one past the last source token that was copied
    length   tokens in the next draft
    """

    source: tuple[int, ...]
    pointer: int | None = 0
    reached: int = 0
    length: int = FIRST


def propose(alignment: Alignment) -> list[int]:
    """The next draft; empty while the output is not aligned."""
    if alignment.pointer is None:
        return []
    return list(alignment.source[alignment.pointer : alignment.pointer + alignment.length])


def accepted(draft: list[int], following: list[int]) -> int:
    """How many leading draft tokens the model would have written itself.

    following  the model's token after each draft token's predecessor
    """
    agree = (a == b for a, b in zip(draft, following, strict=False))
    return sum(takewhile(bool, agree))


def advance(alignment: Alignment, written: list[int], kept: int, output: list[int]) -> Alignment:
    """The alignment after a step.

    written  the tokens the step added: the draft's accepted ones and the model's own next
    kept     how many of them were drafted
    output   all tokens of the rewrite so far
    """
    drafted = alignment.pointer is not None
    pointer = alignment.pointer
    if drafted:
        assert pointer is not None
        copied = pointer + kept
        if copied < len(alignment.source) and alignment.source[copied] == written[-1]:
            # The whole draft held, and the token after it too.
            length = min(LONGEST, 2 * alignment.length)
            return replace(alignment, pointer=copied + 1, reached=copied + 1, length=length)
        alignment = replace(alignment, reached=max(alignment.reached, copied))
    return realign(alignment, output)


def realign(alignment: Alignment, output: list[int]) -> Alignment:
    """Find the output's last tokens in the source: the longest match, then the nearest ahead.

    Behind the last copied token nothing is sought: a rewrite seldom says a thing twice. One
    token is enough only if the source has it once in reach.
    """
    source, start = alignment.source, alignment.reached
    best: tuple[int, int] | None = None
    alone = 0
    for position in range(start, min(len(source) - 1, start + REACH)):
        if source[position] != output[-1]:
            continue
        alone += 1
        length = _matching(source, position, output)
        if best is None or length > best[0]:
            best = (length, position)
    if best is None or (best[0] == 1 and alone > 1):
        return replace(alignment, pointer=None)
    length, position = best
    sure = length >= EVIDENCE
    return replace(
        alignment,
        pointer=position + 1,
        reached=position + 1,
        length=FIRST if sure else UNSURE,
    )


def _matching(source: tuple[int, ...], position: int, output: list[int]) -> int:
    """How many tokens up to this source position equal the output's last ones, up to EVIDENCE."""
    length = 0
    while (
        length < EVIDENCE
        and position - length >= 0
        and length < len(output)
        and source[position - length] == output[-1 - length]
    ):
        length += 1
    return length
