"""Words spelled with digits for letters, or with gaps between the letters, as they are meant. Pure functions.

A person reads "b0mb" and "b o m b" as one word; a tokenizer does not. What harmless digits and lone letters
mean must not change, so a text is read in both ways: as it stands, and as it may be meant. Only a text most of
whose letters stand alone says nothing as it stands.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]

DIGITS = str.maketrans("013457", "oieast")
ARTICLES = "aAiI"  # lone letters that are words
# Digits between letters ("b0mb", not "3D" or "10am"), with no other digits in the word; or four lone letters
# and more, with the same gap between them.
_DISGUISED = re.compile(
    r"""
    (?<![^\W_]) (?: [^\W\d_]+ [013457]+ )+ [^\W\d_] [^\W_]*
    | (?<![^\W_]) [^\W\d_] (?P<gap>[ .*_-]) [^\W\d_] (?: (?P=gap) [^\W\d_] ){2,} (?![^\W_])
    """,
    re.VERBOSE,
)
# Where that many are found, the author writes so: then each word with such digits, or of them alone, is
# one, and two lone letters are enough.
MANY = 3
_LOOSE = re.compile(
    r"""
    (?<![^\W_]) [^\W_] (?P<gap>[ .*_-]) [^\W_] (?: (?P=gap) [^\W_] )* (?![^\W_])
    | (?<![^\W_]) (?: [^\W\d_]* [013457] )+ [^\W\d_]* (?![^\W_])
    """,
    re.VERBOSE,
)
# What each of the two has somewhere in it: quick to look for, and rare.
_HINT = re.compile(r"[013457][^\W\d_]|[ .*_-][^\W\d_][ .*_-][^\W\d_][ .*_-]")


@dataclass(frozen=True)
class Meant:
    """A text as it may be meant.

    places  where in the text as it stands each character is  [characters]
    apart   whether most of its letters stood alone
    """

    text: str
    places: IntArray
    apart: bool


def meant(text: str) -> Meant | None:
    """The text as it may be meant; None if it is spelled as it is meant."""
    if not _HINT.search(text):
        return None
    found = list(_DISGUISED.finditer(text))
    if not found:
        return None
    written_so = len(found) >= MANY
    pieces: list[str] = []
    places: list[int] = []

    def take(where: Iterable[int], piece: str) -> None:
        pieces.append(piece)
        places.extend(where)

    last = alone = 0
    for match in _LOOSE.finditer(text) if written_so else found:
        start, end = match.span()
        take(range(last, start), text[last:start])
        if match["gap"]:
            alone += (end - start + 1) // 2
            take(range(start, end, 2), match[0][::2].translate(DIGITS))
            # "a b o m b" is "a bomb", "a t t a c k" is "attack": both
            if text[start] in ARTICLES and not written_so:
                take([start + 1, *range(start + 2, end, 2)], " " + match[0][2::2])
        else:
            take(range(start, end), match[0].translate(DIGITS))
        last = end
    take(range(last, len(text)), text[last:])
    apart = written_so and 2 * alone > len("".join(text.split()))
    return Meant("".join(pieces), np.array(places, np.int64), apart)
