"""A tokenizer that no single character can make a whole word unknown to.

WordPiece reads a word as one unknown token if one of its characters is not in the vocabulary, or if it has
more than 100: "bomb" with a smiley behind it, or in a long row of words joined by arrows, would not be seen at
all. So such characters stand alone, and long words are read in parts. Symbols are left out: they say little,
and between words that belong together they are in the way.
"""

from __future__ import annotations

import json
import re
from typing import Any, Literal

from tokenizers import Tokenizer

from lance_edge.errors import ExportError

INSIDE = "##"  # before pieces that do not begin a word
SYMBOL = r"[\p{So}\p{Sm}\p{Sk}&&[^\x00-\x7f]]"  # smileys, arrows, blanks of Braille; not "+", no currency


def splitting_unknown(serialized: bytes) -> bytes:
    """A serialized tokenizer that splits words so, if it is a WordPiece one; else as it was.

    Words of known characters, no symbols, and no more than 100 are read as before. Raises ExportError.
    """
    try:
        whole = Tokenizer.from_buffer(serialized).to_str()  # files of old may lack keys
        tokenizer = json.loads(whole)
        model = tokenizer["model"]
        if model["type"] != "WordPiece":
            return serialized
        vocabulary, longest = set(model["vocab"]), int(model["max_input_chars_per_word"])
        own = tokenizer["pre_tokenizer"]
    except Exception as error:  # `tokenizers` raises nothing more precise
        raise ExportError(f"the tokenizer cannot be changed: {error!r}") from error
    known = sorted(c for c in vocabulary if len(c) == 1 and f"{INSIDE}{c}" in vocabulary)
    steps = [] if own is None else [own]
    steps += [
        _split(SYMBOL, "Removed"),
        *([_split(f"[^{re.escape(''.join(known))}]", "Isolated")] if known else []),
        _split(f"(?m:.{{1,{longest}}})", "Isolated"),  # m: "." is a line's end too
    ]
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    return json.dumps(tokenizer, ensure_ascii=False).encode()


def _split(pattern: str, behavior: Literal["Isolated", "Removed"]) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": False}
