"""Latency of one prompt, against the same weights elsewhere: `python benchmarks/latency.py --help`.

Contestants run in turn, in blocks, with a pause before each block: idle thread pools spin for a
while after a run and would slow the next contestant. Ratios are taken block by block.

ours          lance_edge, text to verdict (tokenising, severities, spans, decision)
transformers  BertTokenizerFast and the torch model with its head, eager, fp32
optimum       BertTokenizerFast and ORTModelForFeatureExtraction, fp32: the encoder alone, so it does less
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from environment import environment, save
from optimum.onnxruntime import ORTModelForFeatureExtraction
from transformers import BertTokenizerFast

import lance_edge
from lance_edge_training.checkpoint import load_screener

WORDS = (
    "I run a small shop in the old town and would like some help with a letter to my customers . "
    "It should say that we close on Monday , that the new bread is from a mill near the river , and "
    "that nobody has to queue outside when it rains . Please keep it short and friendly . Also tell "
    "me how to count the cash at the end of the day without making the same mistake twice . "
).split()


def main(
    checkpoint: Annotated[
        Path, typer.Option(help="The checkpoint that the bundle was exported from.")
    ],
    rounds: Annotated[int, typer.Option(min=3)] = 20,
    runs: Annotated[int, typer.Option(min=3, help="Timed runs in a block.")] = 10,
) -> None:
    """Measure and write benchmarks/results/latency.json."""
    guard = lance_edge.load(device="cpu")
    contestants: dict[str, Callable[[str], object]] = {
        "ours": guard.screen,
        "transformers": transformers_contestant(checkpoint),
        "optimum": optimum_contestant(checkpoint),
    }
    lengths = {}
    for tokens in (16, 64, 128):
        text = prompt_of(guard, tokens)
        blocks = {name: [] for name in contestants}
        for _ in range(rounds):
            for name, run in contestants.items():
                blocks[name].append(block(run, text, runs))
        medians = {name: np.array([np.median(b) for b in times]) for name, times in blocks.items()}
        lengths[tokens] = {
            name: {
                "p50_ms": float(np.median(np.concatenate(times))),
                "p99_ms": float(np.percentile(np.concatenate(times), 99)),
                "ratio_to_ours": float(np.median(medians[name] / medians["ours"])),
            }
            for name, times in blocks.items()
        }
        for name, row in lengths[tokens].items():
            print(
                f"{tokens:4} tokens  {name:13} p50 {row['p50_ms']:7.2f} ms  p99 {row['p99_ms']:7.2f} ms"
                f"  {row['ratio_to_ours']:5.2f} x ours"
            )
    result = {
        "benchmark": "latency",
        "rounds": rounds,
        "runs_per_block": runs,
        "bundle": guard.bundle.sha256,
        "tokens": lengths,
        "environment": environment(
            "onnxruntime", "torch", "transformers", "optimum", "optimum-onnx"
        ),
    }
    save("latency", result)


def block(run: Callable[[str], object], text: str, runs: int) -> np.ndarray:
    """Milliseconds of each run, after a pause and three runs to warm up."""
    time.sleep(0.15)
    for _ in range(3):
        run(text)
    times = []
    for _ in range(runs):
        started = time.perf_counter()
        run(text)
        times.append((time.perf_counter() - started) * 1000)
    return np.array(times)


def prompt_of(guard: lance_edge.Pipeline, tokens: int) -> str:
    """A text of exactly this many tokens, special tokens included."""
    words: list[str] = []
    while sum(len(w.ids) for w in guard.encode(" ".join([*words, "a"])).windows) <= tokens:
        words.append(WORDS[len(words) % len(WORDS)])
        if len(guard.encode(" ".join(words)).windows[0].ids) == tokens:
            return " ".join(words)
    raise RuntimeError(f"no prefix of the text has {tokens} tokens")


def transformers_contestant(checkpoint: Path) -> Callable[[str], object]:
    """Tokenise and run the torch model with its head."""
    tokenizer = BertTokenizerFast(tokenizer_file=str(checkpoint / "tokenizer.json"))
    screener, _ = load_screener(checkpoint)

    def run(text: str) -> object:
        with torch.inference_mode():
            inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=512)
            reading = screener(inputs["input_ids"], inputs["attention_mask"])
            return reading.labels.mean.sigmoid().tolist()

    return run


def optimum_contestant(checkpoint: Path) -> Callable[[str], object]:
    """Tokenise and run the encoder that optimum exports."""
    tokenizer = BertTokenizerFast(tokenizer_file=str(checkpoint / "tokenizer.json"))
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for name in ("config.json", "model.safetensors"):
            (Path(folder) / name).symlink_to((checkpoint / name).resolve())
        model = ORTModelForFeatureExtraction.from_pretrained(folder, export=True)

    def run(text: str) -> object:
        inputs = tokenizer(text, return_tensors="np", truncation=True, max_length=512)
        return model(**inputs)["last_hidden_state"]

    return run


if __name__ == "__main__":
    typer.run(main)
