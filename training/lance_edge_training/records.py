"""Refinement records and the sequences made of them. Knows rows and tokens, not models.

A sequence is what the refiner reads and writes in one go (docs/how-it-works.md):
prefix, prompt, [the second look reads here], critique, rewrite, end.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
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
    check_folders,
    fill_batches,
    label_tensors,
    pair_examples,
    prompt_example,
    split_rows,
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


def load_records(
    folders: Sequence[Path], categories: Sequence[str]
) -> tuple[list[Record], list[Record]]:
    """Training rows whose licence allows it: refinement pairs, and prompts for the second look.

    A pair's rewrite stands among the prompts too, as the benign twin of its hazardous prompt.
    Raises DataError for a folder without training data.
    """
    check_folders(folders)
    pairs, prompts = [], []
    for folder in folders:
        for row in split_rows(folder, "pairs", "train"):
            prompt, *twin = pair_examples(row, categories)
            if row["action"] == "rewrite":
                pairs.append(Record(prompt, row["gradient"], row["refined"]))
            else:
                prompts.append(Record(prompt, {}, None))
            prompts += [Record(example, {}, None) for example in twin]
        for row in split_rows(folder, "prompts", "train"):
            if row.get("severity") is not None:
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
    """One sequence.

    ids      all its tokens
    prompt   those of the prompt, and the one that ends a rewrite
    read     where the second look reads
    written  where the rewrite starts
    """

    ids: list[int]
    prompt: list[int]
    read: int
    written: int


def turns(prompt: Sequence[int], written: Sequence[int]) -> list[int]:
    """Where the written tokens leave the prompt they copied: an edit's first token, each time.

    There, many rewordings share what one copied token has for itself, and greedy decoding takes
    the copy unless the edits outweigh it one by one.
    """
    blocks = SequenceMatcher(None, prompt, written, autojunk=False).get_matching_blocks()
    ends = {block.b + block.size for block in blocks if block.size}
    if not (blocks[0].size and blocks[0].a == blocks[0].b == 0):
        ends.add(0)
    return sorted(end for end in ends if end < len(written))


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
        rows = [(index, sequence) for _, index, sequence in dealt]
        result = fill_batches(rows, lambda row: len(row[1].ids), self._tokens_per_batch)
        rng.shuffle(result)
        return result

    def _sequence(self, record: Record, kind: str) -> TokenRow:
        tokenizer = self._tokenizer
        prompt = tokenizer.encode(record.example.prompt)
        ids = tokenizer.before_critique(prompt)
        prompt, read = [*prompt, tokenizer.end], len(ids) - 1
        if record.refined is None:
            return TokenRow(ids, prompt, read, len(ids))
        ids = ids + tokenizer.after_prompt(self._composer.critique(record, kind))
        written = len(ids)
        ids = [*ids, *tokenizer.encode(record.refined), tokenizer.end]
        return TokenRow(ids, prompt, read, written)

    def collate(self, rows: Sequence[tuple[int, TokenRow]], rng: random.Random) -> RecordBatch:
        """The tensors of one batch; padding stands at the right, where nothing attends to it."""
        tokens = max(len(sequence.ids) for _, sequence in rows)
        ids = torch.zeros(len(rows), tokens, dtype=torch.long)
        targets = torch.full((len(rows), tokens), IGNORED)
        turning = torch.zeros(len(rows), tokens, dtype=torch.bool)
        for row, (_, sequence) in enumerate(rows):
            ids[row, : len(sequence.ids)] = torch.tensor(sequence.ids)
            written = sequence.ids[sequence.written :]
            # The state at a position predicts the next token.
            start = sequence.written - 1
            targets[row, start : start + len(written)] = torch.tensor(written, dtype=torch.long)
            for turn in turns(sequence.prompt, written):
                turning[row, start + turn] = True
        read = torch.tensor([sequence.read for _, sequence in rows])
        labels = self._labels([index for index, _ in rows], rng)
        return RecordBatch(ids, targets, turning, read, labels)

    def _labels(self, indices: Sequence[int], rng: random.Random) -> Batch:
        examples = [self.records[index].example for index in indices]
        labels = label_tensors(examples, self.categories, rng)
        nothing = torch.zeros(len(indices), 1)
        return Batch(nothing.long(), nothing, *labels, nothing)


@dataclass(frozen=True)
class RecordBatch:
    """Tensors of one training step; B rows, T tokens.

    ids      [B, T]
    targets  the next token where the rewrite is written, else IGNORED   [B, T]
    turning  whether that token is an edit's first                       [B, T]
    read     position of the second look   [B]
    labels   what the second look should say; its ids, mask and span are empty
    """

    ids: Tensor
    targets: Tensor
    turning: Tensor
    read: Tensor
    labels: Batch

    def to(self, device: str) -> RecordBatch:
        return RecordBatch(
            self.ids.to(device),
            self.targets.to(device),
            self.turning.to(device),
            self.read.to(device),
            self.labels.to(device),
        )
