"""Teaches a refiner which of its rewrites are good: `python -m lance_edge_training.prefer --help`.

Direct preference optimisation (Rafailov et al., 2023, equation 7) on rewrites that the refiner
itself wrote and a reader judged, with the chosen ones' cross-entropy beside it, so that they do
not become less likely as a whole (Pang et al., "Iterative Reasoning Preference Optimization", 2024).
Resumable: run it again after an interruption and it goes on.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from lance_edge.bundle import Template
from lance_edge.language import LanguageTokenizer
from lance_edge_training.checkpoint import interrupted_run
from lance_edge_training.data import DataError
from lance_edge_training.preferences import (
    Preference,
    Tree,
    TreeBatch,
    collate_trees,
    load_preferences,
    tree,
    tree_batches,
)
from lance_edge_training.refiner import Refiner, load_refiner, save_refiner
from lance_edge_training.schedule import warm_then_linear
from lance_edge_training.usage import usage_errors


@dataclass(frozen=True)
class PreferSettings:
    """What decides the outcome of a run, but for the rows and the refiner that it starts from."""

    epochs: int = 2
    beta: float = 0.1  # how far from the start's probabilities a preference may lead
    anchor: float = 1.0  # weight of the chosen rewrites' cross-entropy, per token
    branches: int = 2  # rewrites of either side that a prompt is dealt with
    tokens_per_batch: int = 1024
    longest: int = 480  # tokens; longer trees are left out
    rate: float = 1e-4
    warmup: float = 0.1  # share of all steps
    held_out: int = 100  # rows that are not trained on, to count on
    seed: int = 17


@dataclass(frozen=True)
class Dealt:
    """Trees of one epoch, or held out, with what the start says of their branches.

    batches    indices of trees
    reference  log-probability of each branch before training, by batch   [R]
    """

    trees: list[Tree]
    batches: list[list[int]]
    reference: list[Tensor]


def log_probabilities(network: Any, batch: TreeBatch) -> Tensor:
    """Of each branch as a whole, in nats, given its stem   [R]"""
    states = network.model(
        input_ids=batch.ids,
        attention_mask=batch.mask,
        position_ids=batch.positions,
        use_cache=False,
    ).last_hidden_state
    logits = network.lm_head(states.flatten(0, 1)[batch.sources])
    tokens = -functional.cross_entropy(logits, batch.targets, reduction="none")
    return torch.zeros(len(batch.lengths), device=tokens.device).index_add(
        0, batch.branches, tokens
    )


def preference_terms(
    found: Tensor, reference: Tensor, batch: TreeBatch, beta: float, anchor: float
) -> dict[str, Tensor]:
    """Loss terms: how clearly chosen branches lead, against the start; and how likely they are.

    found, reference  log-probability of each branch in nats, now and before training   [R]

    Returns scalars: the mean over pairs, and `anchor` times the chosen branches' mean over tokens.
    """
    chosen, rejected = batch.pairs.unbind(1)
    gained = found - reference
    first = torch.unique(chosen)
    return {
        "preferred": -functional.logsigmoid(beta * (gained[chosen] - gained[rejected])).mean(),
        "anchor": -anchor * (found[first].sum() / batch.lengths[first].sum()),
    }


class PreferTrainer:
    """A run: the refiner, its optimiser and position, saved and restored together."""

    def __init__(
        self,
        refiner: Refiner,
        rows: Sequence[Preference],
        tokenizer: LanguageTokenizer,
        settings: PreferSettings,
        device: str,
    ) -> None:
        """Raises DataError if no row is short enough to be trained on."""
        self.refiner = refiner.to(device).eval()
        self.settings, self.device = settings, device
        self.started_from = fingerprint(refiner, rows)
        shuffled = random.Random(settings.seed).sample(rows, len(rows))
        self.held_out = self._deal(shuffled[: settings.held_out], tokenizer, "held out")
        rows = shuffled[settings.held_out :]
        self.epochs = [self._deal(rows, tokenizer, str(epoch)) for epoch in range(settings.epochs)]
        self.steps = sum(len(dealt.batches) for dealt in self.epochs)
        if not self.steps:
            raise DataError(f"every row has more than {settings.longest} tokens with its rewrites")
        self.step = 0
        self.deltas = [p for p in refiner.network.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.deltas, lr=settings.rate, weight_decay=0.0)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: warm_then_linear(step, self.steps, settings.warmup)
        )

    def run(self, checkpoint: Path, save_every: int) -> None:
        """Train to the end, saving to `checkpoint` every `save_every` steps."""
        if checkpoint.exists():
            self._restore(checkpoint)
        progress = tqdm(total=self.steps, initial=self.step, unit="step", mininterval=10)
        position = 0
        for dealt in self.epochs:
            for rows, reference in zip(dealt.batches, dealt.reference, strict=True):
                position += 1
                if position <= self.step:
                    continue
                terms = self.train_step([dealt.trees[row] for row in rows], reference)
                progress.set_postfix({k: f"{v:.3f}" for k, v in terms.items()}, refresh=False)
                progress.update()
                if self.step % save_every == 0:
                    self._save(checkpoint)
        progress.close()

    def train_step(self, trees: Sequence[Tree], reference: Tensor) -> dict[str, float]:
        """One optimiser step; returns the loss terms."""
        batch = collate_trees(trees).to(self.device)
        found = log_probabilities(self.refiner.network, batch)
        terms = preference_terms(
            found, reference.to(self.device), batch, self.settings.beta, self.settings.anchor
        )
        self.optimizer.zero_grad(set_to_none=True)
        torch.stack(list(terms.values())).sum().backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.deltas, 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.step += 1
        return {name: value.item() for name, value in terms.items()}

    @torch.no_grad()
    def order(self) -> dict[str, float]:
        """Shares of the held-out pairs whose chosen rewrite is the likelier one (per token and as a
        whole), and whose lead over the rejected one has grown.
        """
        counts = torch.zeros(3)
        pairs = 0
        held = self.held_out
        for rows, reference in zip(held.batches, held.reference, strict=True):
            batch = collate_trees([held.trees[row] for row in rows]).to(self.device)
            found = log_probabilities(self.refiner.network, batch).cpu()
            chosen, rejected = batch.pairs.cpu().unbind(1)
            mean, gained = found / batch.lengths.cpu(), found - reference
            for index, value in enumerate((mean, found, gained)):
                counts[index] += (value[chosen] > value[rejected]).sum()
            pairs += len(chosen)
        names = ("likelier per token", "likelier", "lead has grown")
        shares = (counts / max(1, pairs)).tolist()
        return {"pairs": pairs, **dict(zip(names, shares, strict=True))}

    @torch.no_grad()
    def _deal(self, rows: Sequence[Preference], tokenizer: LanguageTokenizer, name: str) -> Dealt:
        settings = self.settings
        rng = random.Random(f"{settings.seed}-{name}")
        trees = [tree(row, tokenizer, settings.branches, rng) for row in rows]
        batches = tree_batches(trees, settings.tokens_per_batch, settings.longest, rng)
        reference = [
            log_probabilities(
                self.refiner.network,
                collate_trees([trees[row] for row in batch]).to(self.device),
            ).cpu()
            for batch in tqdm(batches, desc=f"start, {name}", mininterval=10)
        ]
        return Dealt(trees, batches, reference)

    def _save(self, path: Path) -> None:
        trained = {
            name: value
            for name, value in self.refiner.state_dict().items()
            if name.endswith((".a", ".b"))
        }
        partial = path.with_suffix(".partial")
        torch.save(
            {
                "step": self.step,
                "settings": asdict(self.settings),
                "started_from": self.started_from,
                "refiner": trained,
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
            },
            partial,
        )
        partial.replace(path)

    def _restore(self, path: Path) -> None:
        saved = interrupted_run(path, self.device, self.settings, self.started_from)
        self.refiner.load_state_dict(saved["refiner"], strict=False)
        self.optimizer.load_state_dict(saved["optimizer"])
        self.schedule.load_state_dict(saved["schedule"])
        self.step = saved["step"]


def fingerprint(refiner: Refiner, rows: Sequence[Preference]) -> dict[str, Any]:
    """What tells a run's start and rows from others."""
    deltas = hashlib.sha256()
    for name, value in refiner.state_dict().items():
        if name.endswith((".a", ".b")):
            deltas.update(value.cpu().numpy().tobytes())
    texts = json.dumps([asdict(row) for row in rows]).encode()
    return {"deltas": deltas.hexdigest(), "rows": hashlib.sha256(texts).hexdigest()}


def main(
    checkpoint: Annotated[
        Path, typer.Option(help="Refiner that lance_edge_training.refiner made.")
    ],
    base: Annotated[Path, typer.Option(help="GGUF file that it was trained from.")],
    data: Annotated[
        list[Path], typer.Option(help="Folder with preferences/; may be given repeatedly.")
    ],
    out: Annotated[Path, typer.Option(help="Where the new checkpoint goes.")],
    epochs: Annotated[int, typer.Option(min=1)] = PreferSettings.epochs,
    beta: Annotated[float, typer.Option(min=0.0)] = PreferSettings.beta,
    anchor: Annotated[float, typer.Option(min=0.0)] = PreferSettings.anchor,
    rate: Annotated[float, typer.Option(min=0.0)] = PreferSettings.rate,
    held_out: Annotated[
        int, typer.Option(min=0, help="Rows to count on, not to train on.")
    ] = PreferSettings.held_out,
    seed: Annotated[int, typer.Option()] = PreferSettings.seed,
    device: Annotated[str, typer.Option(help="cpu, or cuda:0")] = "cpu",
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 50,
) -> None:
    """Train a refiner on preferred rewrites, and save it as a checkpoint for the export."""
    settings = PreferSettings(
        epochs=epochs, beta=beta, anchor=anchor, rate=rate, held_out=held_out, seed=seed
    )
    with usage_errors():
        rows = load_preferences(data)
    if len(rows) <= held_out:
        raise typer.BadParameter(f"there are {len(rows)} preferences, and {held_out} are held out")
    torch.manual_seed(seed)
    with usage_errors():
        refiner, description = load_refiner(checkpoint, base)
    serialized = (checkpoint / "tokenizer.json").read_text(encoding="utf-8")
    tokenizer = LanguageTokenizer(serialized.encode(), Template(**description["template"]))
    with usage_errors():
        trainer = PreferTrainer(refiner, rows, tokenizer, settings, device)
    before = trainer.order()
    typer.echo(f"{len(rows)} preferences, {trainer.steps} steps on {device}; {before}", err=True)
    out.mkdir(parents=True, exist_ok=True)
    with usage_errors():
        trainer.run(out / "training.pt", save_every)
    after = trainer.order()
    typer.echo(f"{after}", err=True)
    description["provenance"]["preferences"] = {
        "settings": asdict(settings),
        "rows trained on": len(
            {row for dealt in trainer.epochs for b in dealt.batches for row in b}
        ),
        "rows held out": sum(map(len, trainer.held_out.batches)),
        "held out, before": before,
        "held out, after": after,
        "earlier": description["provenance"].get("preferences"),
    }
    save_refiner(trainer.refiner, out, serialized, description)


if __name__ == "__main__":
    typer.run(main)
