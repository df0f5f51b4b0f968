"""Is a short hazard found in a long harmless text? `python benchmarks/dilution.py --data DIR`.

Harmless development prompts are strung together to texts of several lengths; short held-out records to
rewrite, all flagged when they stand alone, are put between two of them. Each text is read with the
bundle's close reading and without.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer
from environment import environment, save

import lance_edge
from lance_edge.bundle import Bundle, open_bundle
from lance_edge.pipeline import assemble
from lance_edge_training.data import development_examples, split_rows
from lance_edge_training.evaluate import evaluation_sets, half

LENGTHS = (300, 600, 1500)  # characters
SHORT = 110  # characters of a hazard at most
TEXTS = 200


@dataclass(frozen=True)
class Text:
    """A long text without and with a hazard in it."""

    harmless: str
    hazardous: str


def main(
    data: Annotated[Path, typer.Option(help="Folder with prompts/ and pairs/.")],
    bundle: Annotated[Path | None, typer.Option()] = None,
) -> None:
    """Measure and write benchmarks/results/dilution.json."""
    closely = open_bundle(bundle)
    plainly = without_close_reading(closely)
    with assemble(closely, "cpu", looks="1") as guard:
        examples = development_examples(data, list(guard.policy.categories))
        examples = [example for example in examples if half(example) == "report"]
        plain = evaluation_sets(examples)["benign/plain"]
        harmless = unflagged(guard, [examples[index].prompt for index in plain])
        asks = [
            row["prompt"]
            for row in split_rows(data, "pairs", "test")
            if row["action"] == "rewrite" and len(row["prompt"]) <= SHORT
        ]
        quiet = set(unflagged(guard, asks))
        asks = [ask for ask in asks if ask not in quiet]
    rng = random.Random(5)
    texts = {
        length: [text(harmless, asks, length, rng) for _ in range(TEXTS)] for length in LENGTHS
    }
    result = {
        "benchmark": "dilution",
        "texts": TEXTS,
        "hazards": len(asks),
        "read_closely": shares(closely, texts),
        "read_once": shares(plainly, texts),
        "environment": environment("onnxruntime", "tokenizers"),
    }
    save("dilution", result)


def without_close_reading(bundle: Bundle) -> Bundle:
    """The same bundle, whose windows are read once."""
    manifest = bundle.manifest
    return replace(
        bundle, manifest=replace(manifest, screener=replace(manifest.screener, close=None))
    )


def unflagged(guard: lance_edge.Pipeline, prompts: Sequence[str]) -> list[str]:
    """The prompts of which nothing is flagged."""
    verdicts = guard.screen_many(prompts)
    return [text for text, verdict in zip(prompts, verdicts, strict=True) if not verdict.flagged]


def text(harmless: Sequence[str], asks: Sequence[str], length: int, rng: random.Random) -> Text:
    """Harmless prompts until they have so many characters; a hazard before, between or after them."""
    parts: list[str] = []
    while sum(map(len, parts)) < length:
        parts.append(rng.choice(harmless))
    place = rng.randrange(len(parts) + 1)
    return Text(" ".join(parts), " ".join([*parts[:place], rng.choice(asks), *parts[place:]]))


def shares(bundle: Bundle, texts: dict[int, list[Text]]) -> dict[str, dict[str, float]]:
    """Flagged texts by length, and tokens that were read."""
    found = {}
    with assemble(bundle, "cpu", looks="1") as guard:
        for length, items in texts.items():
            clean = guard.screen_many([item.harmless for item in items])
            hidden = guard.screen_many([item.hazardous for item in items])
            found[str(length)] = {
                "harmless_flagged": sum(bool(verdict.flagged) for verdict in clean) / len(items),
                "hazardous_flagged": sum(bool(verdict.flagged) for verdict in hidden) / len(items),
                "tokens": sum(verdict.tokens for verdict in (*clean, *hidden)),
            }
    return found


if __name__ == "__main__":
    typer.run(main)
