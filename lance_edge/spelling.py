"""Words spelled with digits for letters, or with gaps between the letters, as they are meant. Pure functions.

A person reads "b0mb" and "b o m b" as one word; a tokenizer does not. What harmless digits and lone letters
mean must not change, so a text is read in both ways: as it stands, and as it may be meant.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

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
# What each of the two has somewhere in it: quick to look for, and rare.
_HINT = re.compile(r"[013457][^\W\d_]|[ .*_-][^\W\d_][ .*_-][^\W\d_][ .*_-]")


def meant(text: str) -> tuple[str, IntArray] | None:
    """The text as it may be meant, and where in the text each of its characters stands  [characters]

    None if it is spelled as it is meant.
    """
    if not _HINT.search(text):
        return None
    pieces: list[str] = []
    places: list[int] = []

    def take(where: Iterable[int], piece: str) -> None:
        pieces.append(piece)
        places.extend(where)

    last = 0
    for match in _DISGUISED.finditer(text):
        start, end = match.span()
        take(range(last, start), text[last:start])
        if match["gap"]:
            take(range(start, end, 2), match[0][::2])
            if text[start] in ARTICLES:  # "a b o m b" is "a bomb", "a t t a c k" is "attack": both
                take([start + 1, *range(start + 2, end, 2)], " " + match[0][2::2])
        else:
            take(range(start, end), match[0].translate(DIGITS))
        last = end
    if not pieces:
        return None
    take(range(last, len(text)), text[last:])
    return "".join(pieces), np.array(places, np.int64)
