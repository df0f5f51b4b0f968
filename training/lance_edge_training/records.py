"""Refinement records and the sequences made of them. Knows rows and tokens, not models.

A sequence is what the refiner reads and writes in one go (docs/how-it-works.md):
prefix, prompt, [the second look reads here], critique, rewrite, end.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lance_edge.bundle import Templates
from lance_edge.gradient import MAX_ELEMENTS, critique, gradient, gradients
from lance_edge.language import LanguageTokenizer
from lance_edge.screener import Labels
from lance_edge.verdict import Gradient
from lance_edge_training.data import (
    Batch,
    Example,
    coarse_view,
    pair_examples,
    prompt_example,
    read_rows,
)

LEAST_SEVERITY = 0.3  # of a category that a record's critique speaks of
IGNORED = -100  # target of a token that is read, not written


@dataclass(frozen=True)
class Record:
    """A prompt with its severities and, where there is one, its rewrite.

    example    the prompt as the second look learns it
    sentences  category -> the record's own feedback sentence
    refined    the rewrite; None if the row only teaches the second look
    labels     what the first look says of the prompt; None without a rewrite
    """

    example: Example
    sentences: dict[str, str]
    refined: str | None
    labels: Labels | None = None


def load_records(folder: Path, categories: Sequence[str]) -> tuple[list[Record], list[Record]]:
    """Training rows whose licence allows it: refinement pairs, and prompts for the second look.

    A pair's rewrite stands among the prompts too, as the benign twin of its hazardous prompt.
    """
    pairs, prompts = [], []
    for row in read_rows(folder / "pairs" / "train.jsonl"):
        if row["may_train"] is not True:
            continue
        prompt, *twin = pair_examples(row, categories)
        if row["action"] == "rewrite":
            pairs.append(Record(prompt, row["gradient"], row["refined"]))
        else:
            prompts.append(Record(prompt, {}, None))
        prompts += [Record(example, {}, None) for example in twin]
    for row in read_rows(folder / "prompts" / "train.jsonl.gz"):
        if row["may_train"] is True and row.get("severity") is not None:
            prompts.append(Record(prompt_example(row, categories), {}, None))
    return pairs, prompts


class Composer:
    """Writes a record's critique in one of the ways the refiner will meet or may be given."""

    def __init__(
        self,
        templates: Templates,
        categories: Sequence[str],
        thresholds: Sequence[float],
        tokenizer: LanguageTokenizer,
    ) -> None:
        self.templates, self.categories, self.thresholds = templates, list(categories), thresholds
        self.tokenizer = tokenizer

    def critique(self, record: Record, kind: str) -> str:
        """`predicted`: as the runtime composes it from the first look's labels;
        `graded`: the same template with the record's severities and marked spans;
        `own`: the record's own sentences as directions.
        """
        found = {
            "predicted": self._predicted,
            "graded": self._graded,
            "own": self._own,
        }[kind](record)
        return critique(found, self.tokenizer.count, self.templates)

    def _predicted(self, record: Record) -> Sequence[Gradient]:
        labels = record.labels
        if labels is None:
            return self._graded(record)
        flagged = [
            name
            for name, severity, threshold in zip(
                self.categories, labels.severity, self.thresholds, strict=True
            )
            if severity >= threshold
        ]
        if not flagged:  # the first look missed it: speak of what the record says
            severity = record.example.severity or {}
            flagged = [max(severity, key=severity.__getitem__)]
        return gradients(record.example.prompt, labels, flagged, self.categories, self.templates)

    def _graded(self, record: Record) -> Sequence[Gradient]:
        return self._from_record(record, {})

    def _own(self, record: Record) -> Sequence[Gradient]:
        return self._from_record(record, record.sentences)

    def _from_record(self, record: Record, sentences: dict[str, str]) -> Sequence[Gradient]:
        severity = record.example.severity or {}
        chosen = [name for name, value in severity.items() if value >= LEAST_SEVERITY]
        chosen = chosen or [max(severity, key=severity.__getitem__)]
        words = record.example.spans[:MAX_ELEMENTS]
        found: list[Gradient] = []
        for name in sorted(chosen, key=lambda name: -severity[name]):
            direction = sentences.get(name)
            found.append(gradient(name, severity[name], words, self.templates, found, direction))
        return found


@dataclass(frozen=True)
class TokenRow:
    """Token ids of one sequence; `read` is where the second look reads, `written` where the rewrite starts."""

    ids: list[int]
    read: int
    written: int


class RecordCorpus:
    """Records dealt out as batches of similar length.

    The order and each record's critique depend on the seed and the epoch alone, so a resumed
    run sees the same batches. An epoch deals only a share of the prompts, another one each time.
    """

    KINDS = ("predicted", "predicted", "graded", "own")  # one is drawn for each record and epoch

    def __init__(
        self,
        pairs: Sequence[Record],
        prompts: Sequence[Record],
        composer: Composer,
        tokens_per_batch: int,
        longest: int,
        prompt_share: float,
        seed: int,
    ) -> None:
        self.records = [*pairs, *prompts]
        self.categories = composer.categories
        self._composer, self._tokenizer = composer, composer.tokenizer
        self._pairs = len(pairs)
        self._tokens_per_batch, self._longest = tokens_per_batch, longest
        self._prompt_share, self._seed = prompt_share, seed

    def batches(self, epoch: int) -> list[list[tuple[int, TokenRow]]]:
        """(record, sequence) of each batch of an epoch, shuffled as batches."""
        rng = random.Random(f"{self._seed}-{epoch}")
        dealt = []
        for index, record in enumerate(self.records):
            kind = rng.choice(self.KINDS)
            if index >= self._pairs and rng.random() >= self._prompt_share:
                continue
            sequence = self._sequence(record, kind)
            if len(sequence.ids) <= self._longest:
                dealt.append((len(sequence.ids) * rng.uniform(0.95, 1.05), index, sequence))
        dealt.sort(key=lambda item: item[0])
        result: list[list[tuple[int, TokenRow]]] = [[]]
        longest = 0
        for _, index, sequence in dealt:
            longest = max(longest, len(sequence.ids))
            if result[-1] and longest * (len(result[-1]) + 1) > self._tokens_per_batch:
                result.append([])
                longest = len(sequence.ids)
            result[-1].append((index, sequence))
        rng.shuffle(result)
        return result

    def _sequence(self, record: Record, kind: str) -> TokenRow:
        tokenizer = self._tokenizer
        ids = tokenizer.before_critique(tokenizer.encode(record.example.prompt))
        read = len(ids) - 1
        if record.refined is None:
            return TokenRow(ids, read, len(ids))
        ids = ids + tokenizer.after_prompt(self._composer.critique(record, kind))
        written = len(ids)
        return TokenRow([*ids, *tokenizer.encode(record.refined), tokenizer.end], read, written)

    def collate(self, rows: Sequence[tuple[int, TokenRow]], rng: random.Random) -> RecordBatch:
        """The tensors of one batch; padding stands at the right, where nothing attends to it."""
        tokens = max(len(sequence.ids) for _, sequence in rows)
        ids = torch.zeros(len(rows), tokens, dtype=torch.long)
        targets = torch.full((len(rows), tokens), IGNORED)
        for row, (_, sequence) in enumerate(rows):
            ids[row, : len(sequence.ids)] = torch.tensor(sequence.ids)
            written = torch.tensor(sequence.ids[sequence.written :], dtype=torch.long)
            # The state at a position predicts the next token.
            targets[row, sequence.written - 1 : len(sequence.ids) - 1] = written
        read = torch.tensor([sequence.read for _, sequence in rows])
        return RecordBatch(ids, targets, read, self._labels([index for index, _ in rows], rng))

    def _labels(self, indices: Sequence[int], rng: random.Random) -> Batch:
        rows, width = len(indices), len(self.categories)
        coarse, observed, severity = (torch.zeros(rows, width) for _ in range(3))
        graded, harmful = torch.zeros(rows), torch.full((rows,), -1.0)
        for row, index in enumerate(indices):
            example = self.records[index].example
            if example.harmful is not None:
                harmful[row] = float(example.harmful)
            labels = example.labels
            if example.severity is not None:
                graded[row] = 1
                for name, value in example.severity.items():
                    severity[row, self.categories.index(name)] = value
                labels = coarse_view(example, self.categories, rng)
            for name, value in labels.items():
                coarse[row, self.categories.index(name)] = value
                observed[row, self.categories.index(name)] = 1
        nothing = torch.zeros(rows, 1)
        return Batch(nothing.long(), nothing, coarse, observed, severity, graded, harmful, nothing)


@dataclass(frozen=True)
class RecordBatch:
    """Tensors of one training step; B rows, T tokens.

    ids      [B, T]
    targets  the next token where the rewrite is written, else IGNORED   [B, T]
    read     position of the second look   [B]
    labels   what the second look should say; its ids, mask and span are empty
    """

    ids: Tensor
    targets: Tensor
    read: Tensor
    labels: Batch

    def to(self, device: str) -> RecordBatch:
        return RecordBatch(
            self.ids.to(device),
            self.targets.to(device),
            self.read.to(device),
            self.labels.to(device),
        )
