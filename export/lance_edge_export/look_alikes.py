"""A tokenizer that reads letters of other alphabets as the Latin letters they look like.

To a tokenizer of English, "bomb" in full-width, in mathematical or in Cyrillic letters is an unknown word, and to a
person it is the same word. Normalising before anything else closes that way around the screener. Offsets still
count the characters of the text as it was typed.

For languages that are written in Latin letters: others would lose letters of their own.
"""

from __future__ import annotations

import json
from typing import Any

from lance_edge.errors import ExportError

# Letters that NFKC keeps apart from the Latin ones, after Unicode's confusables (UTS 39): Cyrillic, Greek,
# Armenian, and Latin's own variants. Letters that only resemble one another are left out.
LOOK_ALIKES = {
    "a": "\u0430\u03b1\u0251",
    "c": "\u0441",
    "d": "\u0501",
    "e": "\u0435\u04bd",
    "g": "\u0261\u0581",
    "h": "\u04bb\u0570",
    "i": "\u0456\u03b9\u0131\u0269",
    "j": "\u0458\u03f3",
    "k": "\u043a\u03ba",
    "l": "\u04cf",
    "n": "\u0578",
    "o": "\u043e\u03bf\u0585\u03c3",
    "p": "\u0440\u03c1",
    "q": "\u051b\u0563",
    "s": "\u0455",
    "u": "\u057d\u03c5",
    "v": "\u03bd\u0475",
    "w": "\u051d\u0461",
    "x": "\u0445\u03c7",
    "y": "\u0443\u04af\u03b3",
    "A": "\u0410\u0391",
    "B": "\u0412\u0392",
    "C": "\u0421",
    "E": "\u0415\u0395",
    "G": "\u050c",
    "H": "\u041d\u0397",
    "I": "\u0406\u0399\u04c0",
    "J": "\u0408\u037f",
    "K": "\u041a\u039a",
    "M": "\u041c\u039c",
    "N": "\u039d",
    "O": "\u041e\u039f\u0555",
    "P": "\u0420\u03a1",
    "S": "\u0405\u054f",
    "T": "\u0422\u03a4",
    "U": "\u054d",
    "V": "\u0474",
    "W": "\u051c",
    "X": "\u0425\u03a7",
    "Y": "\u0423\u03a5\u04ae",
    "Z": "\u0396",
}

# What looks like a space and is a letter or symbol: fillers of Hangul, as NFKC leaves them, and Braille's blank.
BLANKS = "\u115f\u1160\u2800"


def reading_look_alikes(serialized: bytes) -> bytes:
    """A serialized tokenizer that does so before its own normalisation. Raises ExportError."""
    try:
        tokenizer = json.loads(serialized)
        own = tokenizer["normalizer"]
    except (ValueError, TypeError, KeyError) as error:
        raise ExportError(f"the tokenizer cannot be changed: {error!r}") from error
    steps: list[dict[str, Any]] = [{"type": "NFKC"}]
    steps += [
        {"type": "Replace", "pattern": {"String": other}, "content": plain}
        for plain, others in {**LOOK_ALIKES, " ": BLANKS}.items()
        for other in others
    ]
    tokenizer["normalizer"] = {
        "type": "Sequence",
        "normalizers": steps + ([] if own is None else [own]),
    }
    return json.dumps(tokenizer, ensure_ascii=False).encode()
