"""Text to token ids and back to character offsets. Knows tokens, not models.

A user's text never becomes a special token: "[SEP]" typed by a user is encoded as
the plain characters it is made of.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding
from tokenizers import Tokenizer as HFTokenizer

from lance_edge.errors import BundleError, InvalidPrompt
from lance_edge.spelling import spellings

IntArray = npt.NDArray[np.int64]

VISIBLE = "LNPS"  # general categories: letters, numbers, punctuation, symbols

_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Window:
    """One stretch of a prompt that fits the encoder.

    ids      token ids, special tokens included   [tokens]
    offsets  character range of each token in the prompt   [tokens, 2]; (0, 0) if special
    words    index of the word each token belongs to   [tokens]; -1 if special
    """

    ids: IntArray
    offsets: IntArray
    words: IntArray


class Tokenizer:
    """A `tokenizers` tokenizer that cuts long prompts into overlapping windows.

    window   tokens in a window, special tokens included
    overlap  tokens that neighbouring windows share

    Raises BundleError if the serialized tokenizer cannot be read.
    """

    def __init__(self, serialized: bytes, window: int, overlap: int) -> None:
        try:
            self._tokenizer = HFTokenizer.from_str(serialized.decode("utf-8"))
        except Exception as error:  # `tokenizers` raises nothing more precise
            raise BundleError(f"the bundle's tokenizer cannot be read: {error}") from error
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(window, stride=overlap)
        self.window = window
        self.overlap = overlap

    def encode(self, text: str) -> list[Window]:
        """The prompt's windows, in order; one if the prompt is short.

        Those of each way to read it, if words in it are spelled with digits, symbols or gaps; all offsets are
        into the text as it stands.

        Raises InvalidPrompt if the text is blank or not valid Unicode.
        """
        check_text(text)
        return [
            window if spelling.places is None else _placed(window, spelling.places)
            for spelling in spellings(text)
            for window in self._windows(spelling.text)
        ]

    def encode_part(self, text: str, start: int, end: int) -> list[Window]:
        """The windows of text[start:end] as a prompt of its own; offsets are into the whole text."""
        return [_moved(window, start) for window in self.encode(text[start:end])]

    def known_words(self, text: str) -> tuple[int, int]:
        """How many words of a text's first window are one token, and how many there are.

        A language that the vocabulary was not made for is read in pieces, or letter by letter.
        """
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        unknown = getattr(self._tokenizer.model, "unk_token", None)
        words: dict[int, list[str]] = {}
        for token, word in zip(encoding.tokens, encoding.word_ids, strict=True):
            words.setdefault(word, []).append(token)
        known = total = 0
        for word, tokens in words.items():
            start, end = encoding.word_to_chars(word)
            written = text[start:end]
            if any(map(str.isalpha, written)):
                total += 1
                is_word = len(written) > 1 or written.isascii()  # not a letter of another alphabet
                known += is_word and len(tokens) == 1 and tokens[0] != unknown
        return known, total

    def _windows(self, text: str) -> list[Window]:
        first = self._tokenizer.encode(text)
        return [_window(encoding) for encoding in [first, *first.overflowing]]


def narrowed(window: Window, width: int, overlap: int) -> list[Window]:
    """A window's tokens in windows of at most `width`, each with the special tokens around it.

    overlap  tokens that neighbouring ones share

    Empty if the window is no longer than that.
    """
    if len(window.ids) <= width:
        return []
    text = np.flatnonzero(window.words >= 0)
    first, end = int(text[0]), int(text[-1]) + 1
    room = max(1, width - (len(window.ids) - (end - first)))
    found = []
    for start in range(first, max(first + 1, end - overlap), max(1, room - overlap)):
        kept = np.r_[:first, start : min(start + room, end), end : len(window.ids)]
        found.append(Window(window.ids[kept], window.offsets[kept], window.words[kept]))
    return found


def check_text(text: str) -> None:
    """Raise InvalidPrompt for a text that no tokenizer can read faithfully."""
    if not isinstance(text, str):
        raise InvalidPrompt(f"a prompt must be a str, not {type(text).__name__}")
    if not text or text.isspace():
        raise InvalidPrompt("the prompt is empty; there is nothing to screen")
    if not readable(text):
        raise InvalidPrompt(
            "the prompt holds only invisible characters; there is nothing to screen"
        )
    if (nul := text.find("\0")) >= 0:
        raise InvalidPrompt(f"the prompt has a NUL character at position {nul}; remove it")
    if surrogate := _SURROGATE.search(text):
        raise InvalidPrompt(
            f"the prompt has a lone surrogate at position {surrogate.start()}, so it is not valid "
            "Unicode; decode its bytes with the right encoding"
        )


def readable(text: str) -> bool:
    """Whether a text has at least one letter, number, punctuation mark or symbol."""
    return any(unicodedata.category(character)[0] in VISIBLE for character in text)


def _window(encoding: Encoding) -> Window:
    words: Sequence[int | None] = encoding.word_ids
    return Window(
        ids=np.array(encoding.ids, dtype=np.int64),
        offsets=np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2),
        words=np.array([-1 if word is None else word for word in words], dtype=np.int64),
    )


def _moved(window: Window, by: int) -> Window:
    """A window of a text that begins so many characters into another, with offsets of there."""
    real = window.offsets[:, 1:] > window.offsets[:, :1]  # special tokens stand nowhere
    return replace(window, offsets=window.offsets + real * by)


def _placed(window: Window, places: IntArray) -> Window:
    """A window of a text whose characters stand elsewhere  [characters], with offsets of there."""
    offsets = window.offsets.copy()
    real = offsets[:, 1] > offsets[:, 0]
    offsets[real, 0] = places[offsets[real, 0]]
    offsets[real, 1] = places[offsets[real, 1] - 1] + 1
    return replace(window, offsets=offsets)
