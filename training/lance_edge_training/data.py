"""Labelled prompts and the batches made of them. Knows rows, not models.

Three kinds of supervision meet here, per row and per category:
graded   a severity in 0..1 for every category;
coarse   a 0/1 label for the categories the source speaks of (a benign row speaks of all);
harmful  the source's yes/no for the prompt as a whole.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from lance_edge.tokenizer import IntArray, Tokenizer, Window

Supervision = Literal["all", "binary"]
T = TypeVar("T")

HARMFUL_SEVERITY = 0.5  # a category is positive, and a prompt harmful, from here on
BENIGN_SEVERITY = 0.2  # a prompt is benign up to here; between the two it counts as neither


class DataError(ValueError):
    """Training or development data that cannot be used."""


@dataclass(frozen=True)
class Example:
    """One labelled prompt.

    labels    category -> 0 or 1, for the categories that the source speaks of
    severity  category -> 0..1, absent categories being 0; None if the row is not graded
    harmful   the yes/no for the whole prompt; None if unknown
    spans     substrings that carry the hazard
    group     near-twins share it; they stay on one side of any split
    may_train whether its licence lets it shape what ships; else it is for evaluation only
    """

    prompt: str
    source: str
    kind: str
    labels: dict[str, float]
    severity: dict[str, float] | None
    harmful: bool | None
    spans: tuple[str, ...] = ()
    group: str | None = None
    may_train: bool = True

    @property
    def easy(self) -> bool:
        """A benign prompt from a source of benign prompts: most of them teach little."""
        return self.kind == "prompt" and self.severity is None and self.harmful is False

    @property
    def harmless(self) -> bool:
        """Known to be without hazard, in every category and to the least degree."""
        return self.harmful is False and not any((self.severity or {}).values())

    @property
    def positive(self) -> frozenset[str]:
        """Categories known to apply."""
        graded = (self.severity or {}).items()
        return frozenset(
            [name for name, value in graded if value >= HARMFUL_SEVERITY]
            + [name for name, value in self.labels.items() if value and self.severity is None]
        )


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file, gzipped or not."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}, line {number}: {error}") from error


def prompt_example(row: dict[str, Any], categories: Sequence[str]) -> Example:
    """A row of a prompts file."""
    severity = row.get("severity")
    harmful = row.get("harmful")
    labels = dict.fromkeys(row.get("labels") or [], 1.0)
    if severity is not None:
        harmful = _harmful(severity)
    elif harmful is False:
        labels = dict.fromkeys(categories, 0.0)
    _check(row, categories)
    return Example(
        row["prompt"],
        row["source"],
        "prompt",
        labels,
        severity,
        harmful,
        tuple(row.get("spans", ())),
        row.get("group"),
        may_train=row["may_train"] is True,
    )


def pair_examples(row: dict[str, Any], categories: Sequence[str]) -> list[Example]:
    """A refinement record: its prompt, and its rewrite as a benign near-twin."""
    _check(row, categories)
    severity = row["severity"]
    prompt = Example(
        row["prompt"],
        row["source"],
        row["kind"],
        {},
        severity,
        _harmful(severity),
        tuple(row["spans"]),
        row.get("group"),
    )
    if row["action"] != "rewrite":
        return [prompt]
    benign = dict.fromkeys(categories, 0.0)
    return [prompt, Example(row["refined"], row["source"], "refined", benign, None, False)]


def split_rows(
    folder: Path,
    kind: Literal["prompts", "pairs", "preferences"],
    split: Literal["train", "dev", "test"],
) -> Iterator[dict[str, Any]]:
    """Rows of FOLDER/kind/split.jsonl, gzipped (.gz) or not; none if there is no such file.

    Of the training split only rows whose licence allows training. Raises DataError if there are
    both files.
    """
    plain = folder / kind / f"{split}.jsonl"
    found = [path for path in (plain, plain.with_suffix(".jsonl.gz")) if path.exists()]
    if len(found) > 1:
        raise DataError(f"{plain} stands beside {found[1].name}; remove one of them")
    for path in found:
        for row in read_rows(path):
            if split != "train" or row["may_train"] is True:
                yield row


def check_folders(folders: Sequence[Path]) -> None:
    """Raises DataError for a folder without training data, as a mistyped one is."""
    for folder in folders:
        if not any(any((folder / kind).glob("train.jsonl*")) for kind in ("prompts", "pairs")):
            raise DataError(f"{folder} has neither prompts/train.jsonl nor pairs/train.jsonl")


def training_examples(folders: Sequence[Path], categories: Sequence[str]) -> list[Example]:
    """All examples that may be trained on: of each folder its prompts, then its pairs.

    Raises DataError for a folder without training data.
    """
    check_folders(folders)
    examples = []
    for folder in folders:
        prompts = split_rows(folder, "prompts", "train")
        examples += [prompt_example(row, categories) for row in prompts]
        for row in split_rows(folder, "pairs", "train"):
            examples += pair_examples(row, categories)
    return examples


def development_examples(folder: Path, categories: Sequence[str]) -> list[Example]:
    """All examples of the development data; of a pair, its prompt alone.

    Raises DataError if there are none.
    """
    prompts = [prompt_example(row, categories) for row in split_rows(folder, "prompts", "dev")]
    pairs = split_rows(folder, "pairs", "test")
    examples = prompts + [pair_examples(row, categories)[0] for row in pairs]
    if not examples:
        raise DataError(
            f"{folder} has no rows in prompts/dev.jsonl or pairs/test.jsonl, gzipped or not"
        )
    return examples


def binarise(example: Example, categories: Sequence[str]) -> Example:
    """The same example with its severities cut to 0/1 labels, as a coarse source would give it."""
    if example.severity is None:
        return example
    labels = {
        name: float(example.severity.get(name, 0.0) >= HARMFUL_SEVERITY) for name in categories
    }
    return replace(example, labels=labels, severity=None)


def _harmful(severity: dict[str, float]) -> bool | None:
    highest = max(severity.values(), default=0.0)
    if highest >= HARMFUL_SEVERITY:
        return True
    return False if highest <= BENIGN_SEVERITY else None


def _check(row: dict[str, Any], categories: Sequence[str]) -> None:
    named = set(row.get("labels") or []) | set(row.get("severity") or {})
    if unknown := named - set(categories):
        raise DataError(f"row {row['id']}: categories {sorted(unknown)} are not in the taxonomy")


@dataclass(frozen=True)
class Batch:
    """Tensors of one training step; B rows, T tokens, C categories.

    coarse, observed  what the posterior is told: labels and which of them it sees  [B, C]
    severity, graded  continuous truth, where `graded` is 1                         [B, C], [B]
    harmful           1, 0, or -1 where unknown                                     [B]
    span              1 on tokens that carry the hazard; all 0 where not annotated  [B, T]
    """

    ids: Tensor
    mask: Tensor
    coarse: Tensor
    observed: Tensor
    severity: Tensor
    graded: Tensor
    harmful: Tensor
    span: Tensor

    def to(self, device: str) -> Batch:
        return Batch(**{name: value.to(device) for name, value in vars(self).items()})


@dataclass(frozen=True)
class Deal:
    """An example as an epoch deals it: alone, or strung together with harmless ones.

    index          the example that the labels are of
    before, after  harmless examples around it, in one text with it
    """

    index: int
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()

    @property
    def parts(self) -> tuple[int, ...]:
        """All its examples, in the order of the text."""
        return (*self.before, self.index, *self.after)


class Corpus:
    """Tokenised examples, dealt out as batches of similar length.

    The order depends on the seed and the epoch alone, so a resumed run sees the same batches.
    An epoch deals only a share of the easy rows (coarse and benign), another one each time.
    A share of the rows, too, is dealt once more in a string: between harmless rows, as a hazard
    stands in a long text. Nothing else in the data shows what a harmless neighbourhood is worth.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        categories: Sequence[str],
        tokenizer: Tokenizer,
        tokens_per_batch: int,
        seed: int,
        easy_share: float = 1.0,
        strung_share: float = 0.0,
    ) -> None:
        self.examples = examples
        self.categories = list(categories)
        self.tokens_per_batch = tokens_per_batch
        self.seed = seed
        self.easy_share = easy_share
        self.strung_share = strung_share
        self._window = tokenizer.window
        self._start, self._end = _special_tokens(tokenizer)
        self._texts = [_text_tokens(tokenizer.encode(example.prompt)[0]) for example in examples]
        self._harmless = [i for i, example in enumerate(examples) if example.harmless]

    def batches(self, epoch: int) -> list[list[Deal]]:
        """The rows of each batch of an epoch: neighbours in length, shuffled as batches."""
        rng = random.Random(f"{self.seed}-{epoch}")
        jitter = [rng.uniform(0.9, 1.1) for _ in self.examples]
        alone = [
            Deal(index)
            for index, example in enumerate(self.examples)
            if not example.easy or rng.random() < self.easy_share
        ]
        strung = [
            self._strung(deal.index, rng) for deal in alone if rng.random() < self.strung_share
        ]
        deals = [*alone, *strung]
        order = sorted(deals, key=lambda deal: self._tokens(deal) * jitter[deal.index])
        dealt = fill_batches(order, self._tokens, self.tokens_per_batch)
        rng.shuffle(dealt)
        return dealt if order else []

    def collate(self, deals: Sequence[Deal], rng: random.Random) -> Batch:
        """The tensors of one batch. `rng` decides which labels of graded rows the posterior sees."""
        rows, tokens = len(deals), max(map(self._tokens, deals))
        ids, mask, span = (torch.zeros(rows, tokens, dtype=torch.long) for _ in range(3))
        for row, deal in enumerate(deals):
            length = self._tokens(deal)
            texts = [self._texts[part].ids for part in deal.parts]
            ids[row, :length] = torch.from_numpy(np.concatenate([self._start, *texts, self._end]))
            mask[row, :length] = 1
            first = len(self._start) + sum(len(self._texts[part].ids) for part in deal.before)
            marked = _span_tokens(self.examples[deal.index], self._texts[deal.index].offsets)
            span[row, first : first + len(marked)] = marked
        examples = [self.examples[deal.index] for deal in deals]
        return Batch(ids, mask, *label_tensors(examples, self.categories, rng), span)

    def _strung(self, index: int, rng: random.Random) -> Deal:
        """The example at some place between harmless ones, which fill up to a window with it."""
        room = rng.uniform(0.4, 1.0) * self._window - self._tokens(Deal(index))
        others: list[int] = []
        while self._harmless:
            other = rng.choice(self._harmless)
            room -= max(1, len(self._texts[other].ids))
            if room < 0:
                break
            others.append(other)
        place = rng.randint(0, len(others))
        return Deal(index, tuple(others[:place]), tuple(others[place:]))

    def _tokens(self, deal: Deal) -> int:
        """Tokens of its text, special ones included."""
        special = len(self._start) + len(self._end)
        return special + sum(len(self._texts[part].ids) for part in deal.parts)


def fill_batches(
    items: Iterable[T], length: Callable[[T], int], tokens_per_batch: int
) -> list[list[T]]:
    """Items in their order, as many to a batch as fit when each is padded to the longest."""
    batches: list[list[T]] = [[]]
    longest = 0
    for item in items:
        longest = max(longest, length(item))
        if batches[-1] and longest * (len(batches[-1]) + 1) > tokens_per_batch:
            batches.append([])
            longest = length(item)
        batches[-1].append(item)
    return batches


def label_tensors(
    examples: Sequence[Example], categories: Sequence[str], rng: random.Random
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """coarse, observed, severity, graded and harmful of a Batch.

    rng  decides which labels of graded rows the posterior sees
    """
    coarse, observed, severity = (torch.zeros(len(examples), len(categories)) for _ in range(3))
    graded, harmful = torch.zeros(len(examples)), torch.full((len(examples),), -1.0)
    for row, example in enumerate(examples):
        if example.harmful is not None:
            harmful[row] = float(example.harmful)
        labels = example.labels
        if example.severity is not None:
            graded[row] = 1
            for name, value in example.severity.items():
                severity[row, categories.index(name)] = value
            labels = coarse_view(example, categories, rng)
        for name, value in labels.items():
            coarse[row, categories.index(name)] = value
            observed[row, categories.index(name)] = 1
    return coarse, observed, severity, graded, harmful


def coarse_view(
    example: Example, categories: Sequence[str], rng: random.Random
) -> dict[str, float]:
    """What a coarse source might have said of a graded row.

    The posterior learns on graded rows how coarse labels and severities go together, and is
    then trusted with rows that have only coarse labels. So it must meet every kind of these:
    all categories labelled, one positive label, or none.
    """
    kind = rng.choice(["all", "one", "none"])
    if kind == "all":
        return binarise(example, categories).labels
    positive = sorted(example.positive)
    return {rng.choice(positive): 1.0} if kind == "one" and positive else {}


def _special_tokens(tokenizer: Tokenizer) -> tuple[IntArray, IntArray]:
    """The ids that stand before each text, and those that stand after it."""
    window = tokenizer.encode("a")[0]
    text = np.flatnonzero(window.words >= 0)
    return window.ids[: text[0]], window.ids[text[-1] + 1 :]


def _text_tokens(window: Window) -> Window:
    """A window without its special tokens."""
    of_text = window.words >= 0
    return Window(window.ids[of_text], window.offsets[of_text], window.words[of_text])


def _span_tokens(example: Example, offsets: IntArray) -> Tensor:
    """1 for each token inside an annotated hazard span of the prompt  [tokens]"""
    ranges = []
    for text in example.spans:
        start = example.prompt.find(text)
        if start >= 0:
            ranges.append((start, start + len(text)))
    return torch.tensor(
        [int(any(a < end and b > start for start, end in ranges)) for a, b in offsets.tolist()],
        dtype=torch.long,
    )
