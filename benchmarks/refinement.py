"""How well the bundle repairs prompts: `python benchmarks/refinement.py --data DIR`.

On the held-out refinement records, through the runtime, as a user gets it. Writes
benchmarks/results/refinement.json and docs/examples.md.
"""

from __future__ import annotations

import random
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from environment import environment, save
from sacrebleu.metrics import CHRF
from tokenizers import Tokenizer
from tqdm import tqdm

import lance_edge
from lance_edge.acceptance import kept_in_order, words
from lance_edge.gradient import critique
from lance_edge.screener import FloatArray
from lance_edge.verdict import Verdict
from lance_edge_training.data import read_rows

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples.md"

# Of a rewrite's log-probability, in nats: what is left if a policy asks for so much.
LEAST = (-12, -8, -6, -4, -2)

REFUSAL = re.compile(
    r"\b(I (can(no|')t|am unable|won't)|I'm (sorry|unable)|as an AI|cannot (fulfil|assist|help))",
    re.IGNORECASE,
)


def main(
    data: Annotated[Path, typer.Option(help="Folder with pairs/.")],
    bundle: Annotated[Path | None, typer.Option()] = None,
    looks: Annotated[str, typer.Option(help="1, 2 or auto")] = "auto",
    rows: Annotated[int | None, typer.Option(help="Only so many records, drawn at random.")] = None,
    name: Annotated[str, typer.Option(help="Name of the result file.")] = "refinement",
    encoder: Annotated[
        Path | None,
        typer.Option(help="Sentence encoder (mean pooling), for the cosine to the reference."),
    ] = None,
) -> None:
    """Measure and write benchmarks/results/NAME.json."""
    records = list(read_rows(data / "pairs" / "test.jsonl"))
    if rows is not None:
        records = random.Random(11).sample(records, rows)
    with lance_edge.load(bundle, "cpu", looks=looks) as guard:  # type: ignore[arg-type]
        verdicts = [guard.refine(record["prompt"]) for record in tqdm(records, mininterval=10)]
        pairs = list(zip(records, verdicts, strict=True))
        chosen = [pair for pair in compared(pairs) if guard.refiner.fits(pair[0]["prompt"])]
        told, blank = [
            [rewritten(guard, verdict, record["prompt"], critical) for record, verdict in chosen]
            for critical in (True, False)
        ]
        sha256 = guard.bundle.sha256
    result = {
        "benchmark": "refinement",
        "bundle": sha256,
        "looks": looks,
        "records": len(records),
        "rewrite": rewrites(pairs),
        "keep": keeps(pairs),
        "mixed": kept_words(pairs),
        "similarity": similarity(
            [record["refined"] for record, _ in chosen],
            {
                "as given back": [verdict.refined or "" for _, verdict in chosen],
                "as a whole, with critique": told,
                "as a whole, without critique": blank,
                "the prompt itself": [record["prompt"] for record, _ in chosen],
            },
            None if encoder is None else Embedder(encoder),
        ),
        "decoding": decoding(verdicts),
        "environment": environment("onnxruntime", "tokenizers", "sacrebleu"),
    }
    for key in ("rewrite", "keep", "mixed", "similarity", "decoding"):
        print(key, result[key], file=sys.stderr)
    save(name, result)
    if name == "refinement":
        write_examples(records, verdicts)


Pairs = list[tuple[dict[str, Any], Verdict]]


def rewrites(pairs: Pairs) -> dict[str, Any]:
    """Records that should be rewritten: what came of them."""
    wanted = [(r, v) for r, v in pairs if r["action"] == "rewrite"]
    accepted = [v for _, v in wanted if v.refined is not None]
    reasons: dict[str, int] = {}
    for _, verdict in wanted:
        if verdict.reason is not None:
            reason = re.sub(r"'.*'|for .*|: its log-.*", "...", verdict.reason)
            reasons[reason] = reasons.get(reason, 0) + 1
    return {
        "records": len(wanted),
        "flagged": float(np.mean([bool(v.flagged) for _, v in wanted])),
        "accepted": len(accepted) / len(wanted),
        "accepted_within_two_steps": sum(most_steps(v) <= 2 for v in accepted) / len(wanted),
        "accepted_of_flagged_rewrites": float(
            np.mean([v.refined is not None for _, v in wanted if v.steps])
        ),
        "not_flagged": float(np.mean([not v.flagged for _, v in wanted])),
        "blocked_by_category": float(
            np.mean([v.decision == "block" and v.reason is None for _, v in wanted])
        ),
        "sent_to_review": float(
            np.mean([v.decision == "review" and not v.steps for _, v in wanted])
        ),
        "accepted_by_least_log_probability": {
            str(least): sum(surely(v, least) for v in accepted) / len(wanted) for least in LEAST
        },
        "reasons": reasons,
        "refusal_phrases": sum(  # that are the rewrite's own: people too say "I can't face Monday"
            bool(REFUSAL.search(v.refined or "")) and not REFUSAL.search(r["prompt"])
            for r, v in wanted
        ),
    }


def most_steps(verdict: Verdict) -> int:
    """How often the prompt, or the passage that took most, was rewritten."""
    most = count = 0
    goes_on: tuple[str, ...] = ()  # what a further step of the same text may rewrite
    for step in verdict.steps:
        count = count + 1 if step.source in goes_on else 1
        most, goes_on = max(most, count), (step.source, step.text)
    return most


def surely(verdict: Verdict, least: float) -> bool:
    """Whether all that was given back reaches a log-probability."""
    kept = [step for step in verdict.steps if step.problem is None]
    return all(step.log_probability >= least for step in kept)


def keeps(pairs: Pairs) -> dict[str, float]:
    """Records that should come back byte for byte."""
    wanted = [v for r, v in pairs if r["action"] == "keep"]
    return {
        "records": len(wanted),
        "identical": float(np.mean([v.decision == "allow" for v in wanted])),
    }


def kept_words(pairs: Pairs) -> dict[str, float]:
    """On mixed records with an accepted rewrite: words outside the marked hazard kept in order."""
    shares, reference = [], []
    for record, verdict in pairs:
        if record["kind"] != "mixed" or verdict.refined is None:
            continue
        outside = record["prompt"]
        for span in record["spans"]:
            outside = outside.replace(span, " ")
        shares.append(kept_in_order(words(outside), words(verdict.refined)))
        reference.append(kept_in_order(words(outside), words(record["refined"])))
    return {
        "records": len(shares),
        "kept": float(np.mean(shares)),
        "kept_by_the_reference": float(np.mean(reference)),
    }


def compared(pairs: Pairs) -> Pairs:
    """The records whose rewrite is compared with the reference: every second that has one."""
    return [(r, v) for r, v in pairs if v.refined is not None and r["action"] == "rewrite"][::2]


def rewritten(guard: lance_edge.Pipeline, verdict: Verdict, prompt: str, critical: bool) -> str:
    """The first rewrite of a whole prompt along its critique, or along none."""
    refiner, templates = guard.refiner, guard.templates
    assert templates is not None
    told = critique(verdict.gradients, refiner.tokenizer.count, templates) if critical else ""
    return refiner.rewrite(refiner.read(prompt), told).text


def similarity(
    references: list[str], candidates: dict[str, list[str]], embed: Embedder | None
) -> dict[str, dict[str, float]]:
    """How near each kind of text is to the references, on average."""
    found = {}
    for name, texts in candidates.items():
        scores = [chrf(text, reference) for text, reference in zip(texts, references, strict=True)]
        found[name] = {"records": float(len(texts)), "chrf": float(np.mean(scores))}
        if embed is not None:
            cosines = (embed(texts) * embed(references)).sum(1)
            found[name]["cosine"] = float(cosines.mean())
    return found


class Embedder:
    """Mean-pooled states of a Hugging Face encoder, of length 1."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModel

        self.model = AutoModel.from_pretrained(folder).eval()
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(256)

    def __call__(self, texts: list[str]) -> FloatArray:
        """[texts, width]"""
        import torch

        rows = []
        for text in texts:
            ids = torch.tensor([self.tokenizer.encode(text).ids])
            with torch.inference_mode():
                state = self.model(input_ids=ids).last_hidden_state[0].mean(0)
            rows.append((state / state.norm()).numpy())
        return np.stack(rows)


def chrf(text: str, reference: str) -> float:
    """Character n-gram F-score, 0..100 (Popovic, WMT 2015)."""
    if not text.strip() or not reference.strip():
        return 0.0
    return float(CHRF().sentence_score(text, [reference]).score)


def decoding(verdicts: list[Verdict]) -> dict[str, float]:
    """What copying saved, over all rewrites."""
    steps = [step for verdict in verdicts for step in verdict.steps]
    times = [v.timings.refine_ms for v in verdicts if v.steps]
    return {
        "rewrites": len(steps),
        "tokens_per_step": sum(s.tokens + 1 for s in steps) / sum(s.decode_steps for s in steps),
        "accepted_of_drafted": sum(s.accepted for s in steps) / sum(s.drafted for s in steps),
        "in_passages": float(np.mean([_in_passages(v) for v in verdicts if v.refined is not None])),
        "refine_ms_median": float(np.median(times)),
        "refine_ms_p99": float(np.quantile(times, 0.99)),
        "second_looks": float(np.mean([v.look == 2 for v in verdicts])),
    }


def _in_passages(verdict: Verdict) -> bool:
    """Whether what was given back keeps all but some passages of the prompt."""
    assert verdict.refined is not None
    return verdict.refined != verdict.steps[-1].text


def write_examples(records: list[dict[str, Any]], verdicts: list[Verdict]) -> None:
    """40 random records, unedited."""
    chosen = random.Random(7).sample(range(len(records)), min(40, len(records)))
    lines = [
        "# Examples",
        "",
        "40 records drawn at random from the held-out refinement set, with what the default bundle",
        "makes of them; nothing is edited or left out. Written by benchmarks/refinement.py.",
        "Some prompts are offensive or ask for harmful things.",
        "",
    ]
    for number, index in enumerate(chosen, 1):
        record, verdict = records[index], verdicts[index]
        lines += [
            f"## {number}. {record['kind']}, {verdict.decision}",
            "",
            "- prompt: " + _quoted(record["prompt"]),
            *(f"- gradient: {_quoted(item.text)}" for item in verdict.gradients),
            *([f"- rewrite: {_quoted(verdict.refined)}"] if verdict.refined else []),
            *([f"- reason: {verdict.reason}"] if verdict.reason else []),
            *(
                [f"- not accepted: {_quoted(verdict.steps[-1].text)}"]
                if verdict.steps and not verdict.refined
                else []
            ),
            "- reference: " + _quoted(record["refined"] or "none: to be blocked"),
            "",
        ]
    EXAMPLES.write_text("\n".join(lines), encoding="utf-8")


def _quoted(text: str) -> str:
    return "`" + " ".join(text.replace("`", "'").split()) + "`"


if __name__ == "__main__":
    typer.run(main)
