"""Text to the refiner's token ids and back, and the template around them. Knows tokens, not models.

A user's text never becomes a control token: what is between the template's control tokens is
encoded without any, so no text can close its own part or open another.
"""

from __future__ import annotations

from tokenizers import Tokenizer as HFTokenizer

from lance_edge.bundle import Template
from lance_edge.errors import BundleError


class LanguageTokenizer:
    """A lossless byte-level tokenizer with the refiner's template.

    Raises BundleError if the tokenizer cannot be read or the template's end is not one token.
    """

    def __init__(self, serialized: bytes, template: Template) -> None:
        try:
            self._tokenizer = HFTokenizer.from_str(serialized.decode("utf-8"))
        except Exception as error:  # `tokenizers` raises nothing more precise
            raise BundleError(f"the refiner's tokenizer cannot be read: {error}") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        added = self._tokenizer.get_added_tokens_decoder()
        self.control = frozenset(index for index, token in added.items() if token.special)
        self._control_texts = [token.content for token in added.values() if token.special]
        self._tokenizer.encode_special_tokens = False
        self.prefix = self._with_controls(template.prefix)
        self._read = self._with_controls(template.read)
        self._write = self._with_controls(template.write)
        end = self._with_controls(template.end)
        if len(end) != 1 or end[0] not in self.control:
            raise BundleError(f"the template's end {template.end!r} must be one control token")
        for name, opening in (("read", self._read), ("write", self._write)):
            if not opening or opening[0] not in self.control:
                raise BundleError(f"the template's {name} must begin with a control token")
        for index in {*self.prefix, *self._read, *self._write} & set(added) - self.control:
            raise BundleError(
                f"the template's {added[index].content!r} is an added token that is not special, so a user "
                "could type it; mark it special in tokenizer.json"
            )
        self.end = end[0]
        self.size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self._tokenizer.encode_special_tokens = True

    def encode(self, text: str) -> list[int]:
        """A user's text: every character as text, none as a control token."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of ids, control tokens spelled out; bytes that are no UTF-8 become U+FFFD."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False)
        return text

    def count(self, text: str) -> int:
        """How many tokens a text has."""
        return len(self.encode(text))

    def has_control(self, text: str) -> bool:
        """Whether a text spells out a control token."""
        return any(token in text for token in self._control_texts)

    def before_critique(self, prompt: list[int]) -> list[int]:
        """All that precedes the critique; the second look reads at its last token."""
        return [*self.prefix, *prompt, *self._read]

    def after_prompt(self, critique: str) -> list[int]:
        """The critique and the opening of the rewrite."""
        return [*self.encode(critique), *self._write]

    def _with_controls(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids
