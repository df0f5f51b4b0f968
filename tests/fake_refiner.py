"""A refiner without a network: a byte-level tokenizer, and a decoder whose next token is a function.

The fake cache holds the ids themselves, so a test sees what was read, kept and forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lance_edge.bundle import Template
from lance_edge.decoder import OUTPUTS, Decoder
from lance_edge.language import LanguageTokenizer
from lance_edge_engines import Array, FakeSession, FakeState, TensorSpec

CONTROLS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = (("t", "h"), ("th", "e"), ("i", "n"), ("in", "g"), ("i", "m"), ("Ġ", "the"))
TEMPLATE = Template(
    prefix="<|im_start|>prompt\n",
    read="<|im_end|>\n<|im_start|>critique\n",
    write="<|im_end|>\n<|im_start|>rewrite\n",
    end="<|im_end|>",
)

Following = Callable[[list[int]], int]  # the sequence so far -> its next token


def tokenizer() -> Tokenizer:
    """Byte-level BPE: the 256 bytes, a few merges, three control tokens."""
    tokens = [*CONTROLS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, MERGES)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=list(MERGES)))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(list(CONTROLS))
    return made


def language(template: Template = TEMPLATE) -> LanguageTokenizer:
    return LanguageTokenizer(tokenizer().to_str().encode(), template)


@dataclass
class FakeGraph:
    """A decoder graph whose next token after a sequence is `following(sequence)`.

    The looks tell where they were read: latent mean [last token, tokens so far], deviation [1, 2].

    runs  (tokens in the cache, ids read) of every run
    """

    following: Following
    runs: list[tuple[int, list[int]]] = field(default_factory=list)

    def __call__(self, inputs: Mapping[str, Array], state: FakeState) -> dict[str, Array]:
        past, first = int(inputs["past"][0]), int(inputs["first"][0])
        new = inputs["ids"][0].tolist()
        assert past <= len(state.arrays["ids"]), "the graph reads what was never written"
        ids = [*state.arrays["ids"][:past].tolist(), *new]
        assert len(ids) <= state.capacity, "the graph writes past the end of the cache"
        state.arrays["ids"] = np.array(ids, np.int64)
        self.runs.append((past, new))
        ends = range(past + first + 1, len(ids) + 1)
        tokens = np.array([self.following(ids[:end]) for end in ends])
        return {
            "tokens": tokens,
            "log_probabilities": log_probabilities(tokens),
            "mean": np.array([ids[-1], len(ids)], np.float32),
            "deviation": np.array([1, 2], np.float32),
        }


def log_probabilities(tokens: Array) -> Array:
    """How likely the graph finds its tokens: by their number, in steps that sum without rounding."""
    return (-(tokens % 8) / 16).astype(np.float32)


def decoder(graph: FakeGraph, prefix: Sequence[int] = (), context: int = 4096) -> Decoder:
    specs = [TensorSpec(name, np.dtype(np.float32), (None,)) for name in OUTPUTS]
    loaded = {"ids": np.array(prefix, np.int64)}
    return Decoder(FakeSession(graph, outputs=specs), loaded, len(prefix), context)


def writer(tokens: LanguageTokenizer, rewrite: Callable[[str, str], str]) -> Following:
    """A model that writes `rewrite(prompt, critique)` and ends; off that path it writes "?"."""
    parts = [tokens.before_critique([])[len(tokens.prefix) :], tokens.after_prompt("")]
    (lost,) = tokens.encode("?")

    def following(ids: list[int]) -> int:
        texts, start = [], len(tokens.prefix)
        for part in parts:
            end = _find(ids, part, start)
            if end is None:
                return lost
            texts.append(tokens.decode(ids[start:end]))
            start = end + len(part)
        told = [*tokens.encode(rewrite(*texts)), tokens.end]
        output = ids[start:]
        on_path = output == told[: len(output)] and len(output) < len(told)
        return told[len(output)] if on_path else lost

    return following


def _find(ids: list[int], part: list[int], start: int) -> int | None:
    starts = range(start, len(ids) - len(part) + 1)
    return next((at for at in starts if ids[at : at + len(part)] == part), None)
