"""Preferred rewrites and the token trees made of them. Knows rows and tokens, not models.

All rewrites of one prompt stand behind one copy of it: a tree, whose branches do not see each
other. So a prompt and its critique are read once, however many rewrites are compared.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lance_edge.language import LanguageTokenizer
from lance_edge_training.data import DataError, fill_batches, split_rows


@dataclass(frozen=True)
class Preference:
    """Rewrites of one prompt after one critique; each chosen one is better than each rejected one."""

    prompt: str
    critique: str
    chosen: tuple[str, ...]
    rejected: tuple[str, ...]


@dataclass(frozen=True)
class Tree:
    """A prompt with its critique, and the rewrites that may follow.

    stem      tokens up to where a rewrite starts
    branches  each rewrite's tokens, the ending one included
    chosen    so many branches, the first ones, are the better ones
    """

    stem: list[int]
    branches: list[list[int]]
    chosen: int

    @property
    def tokens(self) -> int:
        """Tokens that are read: a branch's last one is only predicted."""
        return len(self.stem) + sum(len(branch) - 1 for branch in self.branches)


@dataclass(frozen=True)
class TreeBatch:
    """Tensors of some trees; B trees, T tokens, N tokens to predict, R branches, P pairs.

    ids, positions  [B, T]; a branch's positions go on from the stem's
    mask            whether a token sees another   [B, 1, T, T]
    sources         where the state stands that predicts a token, in B x T   [N]
    targets         that token   [N]
    branches        the branch that it belongs to   [N]
    lengths         tokens of each branch   [R]
    pairs           a chosen branch and a rejected one of the same tree   [P, 2]
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor
    sources: Tensor
    targets: Tensor
    branches: Tensor
    lengths: Tensor
    pairs: Tensor

    def to(self, device: str) -> TreeBatch:
        return TreeBatch(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


def load_preferences(folders: Sequence[Path]) -> list[Preference]:
    """The rows of each folder's preferences/train.jsonl that may be trained on.

    Raises DataError for a folder without them, and for a row that prefers nothing.
    """
    found = []
    for folder in folders:
        rows = list(split_rows(folder, "preferences", "train"))
        if not rows:
            raise DataError(f"{folder} has no preferences/train.jsonl with rows to train on")
        found += [_preference(row) for row in rows]
    return found


def tree(
    preference: Preference, tokenizer: LanguageTokenizer, most: int, rng: random.Random
) -> Tree:
    """The preference as tokens, with at most so many chosen and so many rejected rewrites."""
    ids = tokenizer.before_critique(tokenizer.encode(preference.prompt))
    sides = [
        rng.sample(texts, min(most, len(texts)))
        for texts in (preference.chosen, preference.rejected)
    ]
    return Tree(
        ids + tokenizer.after_prompt(preference.critique),
        [[*tokenizer.encode(text), tokenizer.end] for side in sides for text in side],
        len(sides[0]),
    )


def tree_batches(
    trees: Sequence[Tree], tokens_per_batch: int, longest: int, rng: random.Random
) -> list[list[int]]:
    """The trees of at most `longest` tokens, by index, as shuffled batches of similar length."""
    short = [index for index, item in enumerate(trees) if item.tokens <= longest]
    ordered = sorted(short, key=lambda index: trees[index].tokens * rng.uniform(0.95, 1.05))
    batches = fill_batches(ordered, lambda index: trees[index].tokens, tokens_per_batch)
    rng.shuffle(batches)
    return batches if short else []


def collate_trees(trees: Sequence[Tree]) -> TreeBatch:
    """The tensors of some trees."""
    tokens = max(item.tokens for item in trees)
    ids = torch.zeros(len(trees), tokens, dtype=torch.long)
    positions = torch.zeros_like(ids)
    # Every token sees itself, padding too: attention to nothing at all is not a number.
    mask = torch.eye(tokens, dtype=torch.bool).repeat(len(trees), 1, 1)
    sources: list[int] = []
    targets: list[int] = []
    owners: list[int] = []
    lengths: list[int] = []
    pairs: list[tuple[int, int]] = []
    for row, item in enumerate(trees):
        first, start = len(lengths), len(item.stem)
        ids[row, :start] = torch.tensor(item.stem)
        positions[row, :start] = torch.arange(start)
        mask[row, :start, :start] = torch.ones(start, start, dtype=torch.bool).tril()
        for branch in item.branches:
            end = start + len(branch) - 1
            ids[row, start:end] = torch.tensor(branch[:-1], dtype=torch.long)
            positions[row, start:end] = torch.arange(len(item.stem), len(item.stem) + end - start)
            mask[row, start:end, : len(item.stem)] = True
            mask[row, start:end, start:end] = torch.ones(end - start, end - start).tril().bool()
            # The stem's last state predicts a branch's first token.
            sources += [row * tokens + at for at in (len(item.stem) - 1, *range(start, end))]
            targets += branch
            owners += [len(lengths)] * len(branch)
            lengths.append(len(branch))
            start = end
        pairs += product(
            range(first, first + item.chosen), range(first + item.chosen, len(lengths))
        )
    return TreeBatch(
        ids,
        positions,
        mask.unsqueeze(1),
        torch.tensor(sources),
        torch.tensor(targets),
        torch.tensor(owners),
        torch.tensor(lengths),
        torch.tensor(pairs),
    )


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _preference(row: dict[str, Any]) -> Preference:
    for key in ("prompt", "critique"):
        if not isinstance(row.get(key), str):
            raise DataError(f"row {row.get('id')}: {key} must be a text")
    for key in ("chosen", "rejected"):
        texts = row.get(key)
        if not isinstance(texts, list) or not texts or not all(map(_is_text, texts)):
            raise DataError(f"row {row.get('id')}: chosen and rejected must be lists of texts")
    sides = [tuple(row["chosen"]), tuple(row["rejected"])]
    if both := set(sides[0]) & set(sides[1]):
        raise DataError(f"row {row.get('id')}: {both.pop()!r} is chosen and rejected")
    return Preference(row["prompt"], row["critique"], *sides)
