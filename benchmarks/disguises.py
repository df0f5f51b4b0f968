"""Does a prompt stay flagged in other letters, or mistyped? `python benchmarks/disguises.py --data DIR`.

Of the held-out refinement records: those that are flagged as they stand, and those to keep that are not,
each in the same disguises.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path
from string import ascii_lowercase
from typing import Annotated

import typer
from environment import environment, save

import lance_edge
from lance_edge_training.data import split_rows

CYRILLIC = dict(zip("aceiopsxyABCEHIKMOPTX", "асеіорѕхуАВСЕНІКМОРТХ", strict=True))  # noqa: RUF001
DIGITS = dict(zip("aeios", "43105", strict=True))
SYMBOLS = dict(zip("ais", "@!$", strict=True))


def shifted(start: int, first: str, last: str) -> dict[str, str]:
    """The letters from `first` to `last` as those of a block that starts there."""
    letters = range(ord(first), ord(last) + 1)
    return {chr(letter): chr(start + index) for index, letter in enumerate(letters)}


def swapped(letters: dict[str, str]) -> Callable[[str], str]:
    """Each letter by another."""
    return lambda text: text.translate(str.maketrans(letters))


def typo(word: str, rng: random.Random) -> str:
    """The word with one slip behind its first letter: two letters in the wrong order, one left out, one
    typed twice, or another in its place."""
    at = rng.randrange(1, len(word) - 1)
    before, letter, after = word[:at], word[at], word[at + 1 :]
    slips = (
        before + after[0] + letter + after[1:],
        before + after,
        before + letter + letter + after,
        before + rng.choice(ascii_lowercase) + after,
    )
    return rng.choice(slips)


def typed_badly(rate: float) -> Callable[[str], str]:
    """A share of the words of four letters and more with one typo."""

    def typed(text: str) -> str:
        rng = random.Random(text)
        return re.sub(
            r"[A-Za-z]{4,}",
            lambda match: typo(match[0], rng) if rng.random() < rate else match[0],
            text,
        )

    return typed


DISGUISES: dict[str, Callable[[str], str]] = {
    "full-width letters": swapped(shifted(0xFF01, "!", "~")),
    "bold mathematical letters": swapped(shifted(0x1D400, "A", "Z") | shifted(0x1D41A, "a", "z")),
    "Cyrillic look-alikes": swapped(CYRILLIC),
    "zero-width characters between letters": "\u200b".join,
    "soft hyphens between letters": "\u00ad".join,
    "letters struck through": lambda text: "".join(f"{letter}\u0336" for letter in text),
    "a smiley behind each word": lambda text: "".join(
        f"{word}\U0001f621 " for word in text.split()
    ),
    "arrows between words": lambda text: "\u2192".join(text.split()),
    "blanks of Braille between words": lambda text: "\u2800".join(text.split()),
    "digits for letters": swapped(DIGITS),
    "symbols for letters": swapped(SYMBOLS),
    "spaces between letters": " ".join,
    "a typo in one long word of five": typed_badly(0.2),
    "a typo in each long word": typed_badly(1.0),
}


def main(
    data: Annotated[Path, typer.Option(help="Folder with pairs/.")],
    bundle: Annotated[Path | None, typer.Option()] = None,
) -> None:
    """Measure and write benchmarks/results/disguises.json."""
    with lance_edge.load(bundle, device="cpu", looks="1") as guard:

        def flagged(texts: list[str]) -> list[bool]:
            return [bool(verdict.flagged) for verdict in guard.screen_many(texts)]

        rows = list(split_rows(data, "pairs", "test"))
        hazardous = [row["prompt"] for row in rows if row["action"] != "keep"]
        harmless = [row["prompt"] for row in rows if row["action"] == "keep"]
        hazardous = [t for t, yes in zip(hazardous, flagged(hazardous), strict=True) if yes]
        harmless = [t for t, yes in zip(harmless, flagged(harmless), strict=True) if not yes]
        found = {
            name: {
                "still_flagged": sum(flagged([change(text) for text in hazardous])),
                "newly_flagged": sum(flagged([change(text) for text in harmless])),
            }
            for name, change in DISGUISES.items()
        }
    result = {
        "benchmark": "disguises",
        "flagged_prompts": len(hazardous),
        "harmless_prompts": len(harmless),
        "disguises": found,
        "environment": environment("onnxruntime", "tokenizers"),
    }
    save("disguises", result)


if __name__ == "__main__":
    typer.run(main)
