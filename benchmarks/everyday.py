"""How well the bundle screens what people type every day: `python benchmarks/everyday.py`.

On the project's own held-out rows (training/data/prompts/dev.jsonl.gz): groups of prompts that share a topic and
its words, most of them harmless. Nothing was chosen on them; their writer knew the screener's mistakes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from environment import environment, save

import lance_edge
from lance_edge_training.data import development_examples

ROWS = Path(__file__).parents[1] / "training" / "data"


def main(bundle: Annotated[Path | None, typer.Option()] = None) -> None:
    """Measure and write benchmarks/results/everyday.json."""
    with lance_edge.load(bundle, device="cpu") as guard:
        examples = development_examples(ROWS, list(guard.policy.categories))
        verdicts = guard.screen_many([example.prompt for example in examples])
        sha256 = guard.bundle.sha256
    right: dict[bool, int] = {True: 0, False: 0}
    wrong: dict[bool, list[str]] = {True: [], False: []}
    for example, verdict in zip(examples, verdicts, strict=True):
        assert example.harmful is not None, example.prompt  # no row is borderline
        if bool(verdict.flagged) == example.harmful:
            right[example.harmful] += 1
        else:
            wrong[example.harmful].append(example.prompt)
    result = {
        "benchmark": "everyday",
        "bundle": sha256,
        "hazardous": right[True] + len(wrong[True]),
        "found": right[True],
        "harmless": right[False] + len(wrong[False]),
        "flagged": len(wrong[False]),
        "missed": wrong[True],
        "false_alarms": wrong[False],
        "environment": environment("onnxruntime"),
    }
    save("everyday", result)


if __name__ == "__main__":
    typer.run(main)
