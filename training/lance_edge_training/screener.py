"""Trains the screener: `python -m lance_edge_training.screener --help`.

One command, fixed seeds, resumable: run it again after an interruption and it goes on
from the last checkpoint with the batches it would have seen.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from tqdm import tqdm

from lance_edge.tokenizer import Tokenizer
from lance_edge_training.checkpoint import (
    earlier_run,
    interrupted_run,
    new_screener,
    save_screener,
    take_over,
)
from lance_edge_training.data import (
    Batch,
    Corpus,
    Example,
    Supervision,
    binarise,
    training_examples,
)
from lance_edge_training.model import Enhancer, HeadKind, Screener
from lance_edge_training.objective import Weights, plain_terms, total, variational_terms
from lance_edge_training.schedule import warm_then_linear
from lance_edge_training.usage import usage_errors

DEFAULT_TAXONOMY = Path(__file__).with_name("default_taxonomy.json")


@dataclass(frozen=True)
class Settings:
    """Everything that decides the outcome of a training run."""

    head: HeadKind = "variational"
    supervision: Supervision = "all"
    epochs: int = 4
    rows: int | None = None  # train on this many rows only, drawn with the seed
    tokens_per_batch: int = 2048
    easy_share: float = 0.25  # of the coarse benign rows, in each epoch
    strung_share: float = 0.0  # of the rows dealt, once more between harmless ones
    encoder_rate: float = 1.5e-4
    head_rate: float = 1e-3
    warmup: float = 0.06  # share of all steps
    weight_decay: float = 0.01
    window: int = 128  # tokens; training reads a prompt's first window, serving all of them
    overlap: int = 32
    seed: int = 17


class Trainer:
    """A training run: modules, optimiser and position, saved and restored together."""

    def __init__(
        self,
        screener: Screener,
        corpus: Corpus,
        settings: Settings,
        weights: Weights,
        device: str,
        bf16: bool,
    ) -> None:
        hidden = screener.head.mean.in_features
        self.screener = screener.to(device).train()
        self.enhancer = (
            Enhancer(hidden, len(corpus.categories)).to(device)
            if settings.head == "variational"
            else None
        )
        self.corpus, self.settings, self.weights = corpus, settings, weights
        self.device, self.bf16 = device, bf16
        self.steps = sum(len(corpus.batches(epoch)) for epoch in range(settings.epochs))
        self.step = 0
        self.started_from: dict[str, Any] | None = None
        # The embeddings stay as pretrained: half of all weights, and rare words would overfit.
        screener.encoder.get_input_embeddings().requires_grad_(False)  # type: ignore[operator]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": self._encoder_parameters(), "lr": settings.encoder_rate},
                {"params": self._head_parameters(), "lr": settings.head_rate},
            ],
            weight_decay=settings.weight_decay,
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._rate)

    def start_from(self, path: Path) -> None:
        """Take over the weights of an earlier run's training.pt, not its optimiser and position.

        Raises DataError if they are not of such a network.
        """
        networks = {"screener": self.screener, "enhancer": self.enhancer}
        wanted = {name: network for name, network in networks.items() if network is not None}
        earlier = earlier_run(path, list(wanted))
        for name, network in wanted.items():
            take_over(network, earlier.networks[name])
        self.started_from = earlier.origin

    def run(self, checkpoint: Path, save_every: int) -> None:
        """Train to the end, saving to `checkpoint` every `save_every` steps."""
        if checkpoint.exists():
            self._restore(checkpoint)
        progress = tqdm(total=self.steps, initial=self.step, unit="step", mininterval=5)
        position = 0
        for epoch in range(self.settings.epochs):
            for deals in self.corpus.batches(epoch):
                position += 1
                if position <= self.step:
                    continue
                rng = random.Random(f"{self.settings.seed}-{position}")
                terms = self.train_step(self.corpus.collate(deals, rng).to(self.device))
                progress.set_postfix(
                    {name: f"{value:.3f}" for name, value in terms.items()}, refresh=False
                )
                progress.update()
                if self.step % save_every == 0:
                    self._save(checkpoint)
        progress.close()

    def train_step(self, batch: Batch) -> dict[str, float]:
        """One optimiser step; returns the weighted loss terms."""
        torch.manual_seed(self.settings.seed + self.step)
        with torch.autocast(self.device.split(":")[0], torch.bfloat16, enabled=self.bf16):
            reading = self.screener(batch.ids, batch.mask)
        terms = self._terms(reading, batch)
        self.optimizer.zero_grad(set_to_none=True)
        total(terms).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self._encoder_parameters() + self._head_parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.step += 1
        return {name: value.item() for name, value in terms.items()}

    def _terms(self, reading: Any, batch: Batch) -> dict[str, Tensor]:
        if self.enhancer is None:
            return plain_terms(reading, batch, self.weights)
        anneal = min(1.0, self.step / max(1.0, 0.3 * self.steps))
        return variational_terms(reading, self.enhancer, batch, self.weights, anneal)

    def _rate(self, step: int) -> float:
        return warm_then_linear(step, self.steps, self.settings.warmup)

    def _head_parameters(self) -> list[nn.Parameter]:
        enhancer = [] if self.enhancer is None else list(self.enhancer.parameters())
        return list(self.screener.head.parameters()) + enhancer

    def _encoder_parameters(self) -> list[nn.Parameter]:
        return [p for p in self.screener.encoder.parameters() if p.requires_grad]

    def _save(self, path: Path) -> None:
        partial = path.with_suffix(".partial")
        torch.save(
            {
                "step": self.step,
                "settings": asdict(self.settings),
                "started_from": self.started_from,
                "screener": self.screener.state_dict(),
                "enhancer": None if self.enhancer is None else self.enhancer.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
            },
            partial,
        )
        partial.replace(path)

    def _restore(self, path: Path) -> None:
        state = interrupted_run(path, self.device, self.settings, self.started_from)
        self.step = state["step"]
        self.screener.load_state_dict(state["screener"])
        if self.enhancer is not None:
            self.enhancer.load_state_dict(state["enhancer"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])


def dealt_examples(
    data: Sequence[Path], categories: list[str], settings: Settings
) -> list[Example]:
    """The examples that a run trains on."""
    examples = training_examples(data, categories)
    if settings.supervision == "binary":
        examples = [binarise(example, categories) for example in examples]
    if settings.rows is not None and settings.rows < len(examples):
        examples = random.Random(settings.seed).sample(examples, settings.rows)
    return examples


def has_bf16(device: str) -> bool:
    """Whether bfloat16 is fast here: in hardware, not emulated."""
    if device.startswith("cuda"):
        return bool(torch.cuda.is_bf16_supported())
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def main(
    encoder: Annotated[Path, typer.Option(help="Hugging Face folder of the pretrained encoder.")],
    data: Annotated[
        list[Path], typer.Option(help="Folder with prompts/ and pairs/; may be given repeatedly.")
    ],
    out: Annotated[Path, typer.Option(help="Where the checkpoint goes.")],
    taxonomy: Annotated[Path, typer.Option()] = DEFAULT_TAXONOMY,
    head: Annotated[str, typer.Option(help="variational or plain")] = "variational",
    supervision: Annotated[str, typer.Option(help="all, or binary: severities cut to 0/1")] = "all",
    epochs: Annotated[int, typer.Option(min=1)] = Settings.epochs,
    rows: Annotated[int | None, typer.Option(min=1, help="Train on this many rows only.")] = None,
    easy_share: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Of the coarse benign rows, in each epoch.")
    ] = Settings.easy_share,
    strung_share: Annotated[
        float,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Of the rows dealt, dealt once more strung between harmless ones.",
        ),
    ] = Settings.strung_share,
    encoder_rate: Annotated[
        float, typer.Option(min=0.0, help="Highest learning rate of the encoder.")
    ] = Settings.encoder_rate,
    start: Annotated[
        Path | None, typer.Option(help="training.pt of an earlier run, to go on from its weights.")
    ] = None,
    seed: Annotated[int, typer.Option()] = Settings.seed,
    device: Annotated[str, typer.Option(help="cpu, or cuda:0")] = "cpu",
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 200,
) -> None:
    """Train a screener, or its ablations, and save it as a checkpoint for the export."""
    if head not in ("variational", "plain") or supervision not in ("all", "binary"):
        raise typer.BadParameter("--head is variational or plain; --supervision is all or binary")
    settings = Settings(
        head=head,  # type: ignore[arg-type]
        supervision=supervision,  # type: ignore[arg-type]
        epochs=epochs,
        rows=rows,
        easy_share=easy_share,
        strung_share=strung_share,
        encoder_rate=encoder_rate,
        seed=seed,
    )
    entries = json.loads(taxonomy.read_text(encoding="utf-8"))
    categories = [entry["name"] for entry in entries]
    serialized = encoder / "tokenizer.json"
    tokenizer = Tokenizer(serialized.read_bytes(), settings.window, settings.overlap)
    with usage_errors():
        examples = dealt_examples(data, categories, settings)
    if not examples:
        folders = ", ".join(map(str, data))
        raise typer.BadParameter(f"{folders}: no rows that may be trained on")
    torch.manual_seed(settings.seed)
    corpus = Corpus(
        examples,
        categories,
        tokenizer,
        settings.tokens_per_batch,
        settings.seed,
        settings.easy_share,
        settings.strung_share,
    )
    weights = Weights()
    bf16 = has_bf16(device)
    with usage_errors():
        screener = new_screener(encoder, len(categories), settings.head)
    trainer = Trainer(
        screener,
        corpus,
        settings,
        weights,
        device,
        bf16,
    )
    if start:
        with usage_errors():
            trainer.start_from(start)
    typer.echo(
        f"{len(examples)} rows, {trainer.steps} steps on {device}, {'bf16' if bf16 else 'fp32'}",
        err=True,
    )
    out.mkdir(parents=True, exist_ok=True)
    with usage_errors():
        trainer.run(out / "training.pt", save_every)
    sources = sorted({example.source for example in examples})
    description = {
        "window": settings.window,
        "overlap": settings.overlap,
        "provenance": {
            "settings": asdict(settings),
            "started_from": trainer.started_from,
            "weights": asdict(weights),
            "rows": len(examples),
            "sources": sources,
            "torch": torch.__version__,
        },
    }
    save_screener(trainer.screener, out, serialized, entries, description)


if __name__ == "__main__":
    typer.run(main)
