"""Does a strong hazard hide another beside it? `python benchmarks/hidden.py --data DIR`.

Held-out records that are flagged when they stand alone, put together as sentences of one prompt: one to
rewrite with one to block or to review, which must decide; and two to rewrite between harmless development
prompts, which must both be repaired.
"""

from __future__ import annotations

import random
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from environment import environment, save
from tqdm import tqdm

import lance_edge
from lance_edge.acceptance import kept_in_order, words
from lance_edge.passages import apart
from lance_edge.policy import STRENGTH
from lance_edge.verdict import Decision
from lance_edge_training.data import development_examples, split_rows
from lance_edge_training.evaluate import evaluation_sets, half

SHORT = 160  # characters of a record at most
PROMPTS = 200  # of each kind that are screened
REPAIRS = 40  # of each kind that are repaired
HARMLESS = (0, 2, 6)  # prompts around two hazards


def main(
    data: Annotated[Path, typer.Option(help="Folder with prompts/ and pairs/.")],
    bundle: Annotated[Path | None, typer.Option()] = None,
) -> None:
    """Measure and write benchmarks/results/hidden.json."""
    rng = random.Random(8)
    with lance_edge.load(bundle, "cpu", looks="1") as guard:
        records = [row["prompt"] for row in split_rows(data, "pairs", "test")]
        by_decision = decided(guard, [prompt for prompt in records if len(prompt) <= SHORT])
        examples = development_examples(data, list(guard.policy.categories))
        examples = [example for example in examples if half(example) == "report"]
        plain = [examples[index].prompt for index in evaluation_sets(examples)["benign/plain"]]
        harmless = decided(guard, [prompt for prompt in plain if len(prompt) <= SHORT])["allow"]
        asks = by_decision["rewrite"]
        stronger: dict[str, Any] = {}
        for action in ("review", "block"):
            pairs = [
                strung([rng.choice(asks), rng.choice(by_decision[action])], rng)
                for _ in range(PROMPTS)
            ]
            stronger[action] = screened(guard, pairs, action)
        repairs = {}
        for count in HARMLESS:
            parts = [(rng.sample(asks, 2), rng.sample(harmless, count)) for _ in range(REPAIRS)]
            repairs[str(count)] = repaired(guard, parts, rng)
    result = {
        "benchmark": "hidden",
        "bundle": guard.bundle.sha256,
        "screened": stronger,
        "repaired": repairs,
        "environment": environment("onnxruntime", "tokenizers"),
    }
    print(stronger, repairs, file=sys.stderr)
    save("hidden", result)


def decided(guard: lance_edge.Pipeline, prompts: Sequence[str]) -> dict[Decision, list[str]]:
    """The prompts by the decision on them."""
    found: dict[Decision, list[str]] = defaultdict(list)
    for prompt, verdict in zip(prompts, guard.screen_many(prompts), strict=True):
        found[verdict.decision].append(prompt)
    return found


def strung(parts: Sequence[str], rng: random.Random) -> str:
    """The texts as sentences of one prompt, in any order."""
    ended = [part if part[-1] in ".!?" else f"{part}." for part in parts]
    return " ".join(rng.sample(ended, len(ended)))


def screened(
    guard: lance_edge.Pipeline, prompts: Sequence[str], action: Decision
) -> dict[str, Any]:
    """Share of the prompts of which at least this is decided, with sentences read apart and without."""

    def share(decisions: Sequence[Decision]) -> float:
        enough = [STRENGTH.index(decision) >= STRENGTH.index(action) for decision in decisions]
        return float(np.mean(enough))

    policy = guard.policy
    wholes = guard.screener.score([guard.encode(prompt).windows for prompt in prompts])
    return {
        "prompts": len(prompts),
        "as_a_whole": share([policy.decide(policy.flagged(labels.severity)) for labels in wholes]),
        "by_sentence": share([verdict.decision for verdict in guard.screen_many(prompts)]),
    }


def repaired(
    guard: lance_edge.Pipeline, parts: Sequence[tuple[list[str], list[str]]], rng: random.Random
) -> dict[str, Any]:
    """What becomes of prompts of hazards and harmless parts."""
    hiding, kept, times = [], [], []
    for hazards, harmless in tqdm(parts, mininterval=10):
        verdict = guard.refine(strung([*hazards, *harmless], rng))
        times.append(verdict.timings.refine_ms)
        if verdict.refined is None:
            continue
        text = verdict.refined
        alone = guard.screen_many([text[start:end] for start, end in apart(text)])
        hiding.append(any(read.decision != "allow" for read in alone))
        kept += [kept_in_order(words(part), words(text)) for part in harmless]
    return {
        "prompts": len(parts),
        "accepted": len(hiding) / len(parts),
        "accepted_with_a_sentence_flagged_alone": sum(hiding) / len(parts),
        "harmless_words_kept": float(np.mean(kept)) if kept else None,
        "refine_ms_median": float(np.median(times)),
    }


if __name__ == "__main__":
    typer.run(main)
