"""Does a verdict depend on its batch or thread? `python benchmarks/invariance.py --prompts FILE`.

Each prompt is screened alone, then in shuffled batches of many sizes, then from 64 threads.
"""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from environment import environment, save

import lance_edge
from lance_edge_training.data import read_rows


def main(
    prompts: Annotated[Path, typer.Option(help="JSON lines with prompts.")],
    bundle: Annotated[Path | None, typer.Option()] = None,
    count: Annotated[int, typer.Option(min=1)] = 400,
) -> None:
    """Measure and write benchmarks/results/invariance_PRECISION.json."""
    guard = lance_edge.load(bundle, device="cpu")
    rng = random.Random(5)
    texts = [row["prompt"] for row in read_rows(prompts)]
    texts = rng.sample(texts, min(count, len(texts)))
    alone = np.array([values(guard.screen(text)) for text in texts])
    largest = 0.0
    for size in (2, 3, 7, 32, 128, len(texts)):
        order = list(range(len(texts)))
        rng.shuffle(order)
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            verdicts = guard.screen_many([texts[index] for index in chosen])
            together = np.array([values(verdict) for verdict in verdicts])
            largest = max(largest, float(np.abs(together - alone[chosen]).max()))
    with ThreadPoolExecutor(64) as pool:
        threaded = np.array(list(pool.map(lambda text: values(guard.screen(text)), texts)))
    precision = guard.bundle.manifest.screener.precision
    result = {
        "benchmark": "invariance",
        "precision": precision,
        "prompts": len(texts),
        "largest_difference_batched": largest,
        "largest_difference_64_threads": float(np.abs(threaded - alone).max()),
        "environment": environment("onnxruntime"),
    }
    save(f"invariance_{precision}", result)


def values(verdict: lance_edge.Verdict) -> list[float]:
    """Severities and deviations."""
    return [*verdict.severity.values(), *verdict.deviation.values()]


if __name__ == "__main__":
    typer.run(main)
