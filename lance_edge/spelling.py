"""Words spelled with digits or symbols for letters, or with gaps between them, as they are meant. Pure functions.

A person reads "b0mb", "k!ll" and "b o m b" as one word; a tokenizer does not. What harmless digits, symbols and
lone letters mean must not change, so a text is read in both ways: as it stands, and as it may be meant.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]

DIGITS, SYMBOLS = dict(zip("013457", "oieast", strict=True)), dict(zip("@!$", "ais", strict=True))
ARTICLES = "aAiI"  # lone letters that are words
# Such signs between letters ("b0mb", not "3D" or "10am"), with no other digits in the word; or four lone
# letters and more, with the same gap between them. Addresses of mail are none.
_DISGUISED = re.compile(
    r"""
    (?<![^\W_]) (?: [^\W\d_]+ (?: [013457!$] | @(?![\w-]+\.\w) )+ )+ [^\W\d_] [^\W_]*
    | (?<![^\W_]) [^\W\d_] (?P<gap>[ .*_-]) [^\W\d_] (?: (?P=gap) [^\W\d_] ){2,} (?![^\W_])
    """,
    re.VERBOSE,
)
# Where that many are found, the author writes so: then each word with such signs anywhere, or of such digits
# alone, is one, and two lone letters are enough.
MANY = 3
_LOOSE = re.compile(
    r"""
    (?<![^\W_]) [^\W_] (?P<gap>[ .*_-]) [^\W_] (?: (?P=gap) [^\W_] )* (?![^\W_])
    | (?<![^\W_]) (?: [^\W\d_]* (?: [013457$] | @(?![\w-]+\.\w) | !(?=[^\W_]|[@$]) ) )+ [^\W\d_]* (?![^\W_])
    """,
    re.VERBOSE,
)
# What each has somewhere in it: quick to look for, and rare.
_HINT = re.compile(r"[013457@!$][^\W\d_]|[ .*_-][^\W\d_][ .*_-][^\W\d_][ .*_-]")


@dataclass(frozen=True)
class Spelling:
    """A text as it may be read.

    places  where in the text as it stands each character is  [characters]; None: where it is
    """

    text: str
    places: IntArray | None


def spellings(text: str) -> list[Spelling]:
    """The ways to read a text: as it stands, and, if words in it may be meant otherwise, as these.

    Where many are, the text says little as it stands: gaps and symbols are read as they are meant alone, and
    digits, if there are any, once as digits ("C4" is no "ca") and once as letters.
    """
    as_it_stands = Spelling(text, None)
    found = list(_DISGUISED.finditer(text)) if _HINT.search(text) else []
    if not found:
        return [as_it_stands]
    if len(found) < MANY:
        return [as_it_stands, _spelled(text, found, DIGITS | SYMBOLS, both=True)]
    found = list(_LOOSE.finditer(text))
    plain = _spelled(text, found, SYMBOLS)
    full = _spelled(text, found, DIGITS | SYMBOLS)
    return [plain] if plain.text == full.text else [plain, full]


def _spelled(
    text: str, found: Iterable[re.Match[str]], letters: dict[str, str], both: bool = False
) -> Spelling:
    """The text with what was found as it is meant.

    letters  what signs in it stand for
    both     "a b o m b" is "a bomb", "a t t a c k" is "attack": whether it is read as both
    """
    as_letters = str.maketrans(letters)
    pieces: list[str] = []
    places: list[int] = []

    def take(where: Iterable[int], piece: str) -> None:
        pieces.append(piece)
        places.extend(where)

    last = 0
    for match in found:
        start, end = match.span()
        take(range(last, start), text[last:start])
        if match["gap"]:
            take(range(start, end, 2), match[0][::2].translate(as_letters))
            if both and text[start] in ARTICLES:
                take([start + 1, *range(start + 2, end, 2)], " " + match[0][2::2])
        else:
            take(range(start, end), match[0].translate(as_letters))
        last = end
    take(range(last, len(text)), text[last:])
    return Spelling("".join(pieces), np.array(places, np.int64))
