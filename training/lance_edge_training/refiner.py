"""Trains the refiner and the second look: `python -m lance_edge_training.refiner --help`.

One low-rank delta on a frozen language model learns both at once: the state at the end of the
prompt gives the severities (the second look), and the tokens after the critique are the rewrite.
One command, fixed seeds, resumable: run it again after an interruption and it goes on.
"""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

import lance_edge
from lance_edge.bundle import Template, default_bundle
from lance_edge.language import LanguageTokenizer
from lance_edge_training.base_model import base_tokenizer, load_base
from lance_edge_training.checkpoint import earlier_run, interrupted_run, take_over, write_json
from lance_edge_training.data import DataError
from lance_edge_training.lowrank import add_low_rank, low_rank_layers
from lance_edge_training.model import Enhancer, Head, Reading
from lance_edge_training.objective import Weights, variational_terms
from lance_edge_training.records import (
    IGNORED,
    Composer,
    Record,
    RecordBatch,
    RecordCorpus,
    load_records,
)
from lance_edge_training.schedule import warm_then_linear
from lance_edge_training.usage import usage_errors

TEMPLATE = Template(
    prefix="<|im_start|>prompt\n",
    read="<|im_end|>\n<|im_start|>critique\n",
    write="<|im_end|>\n<|im_start|>rewrite\n",
    end="<|im_end|>",
)


@dataclass(frozen=True)
class RefinerSettings:
    """Everything that decides the outcome of a training run."""

    rank: int = 16
    scale: float = 2.0
    # The blocks below stay as they are: a sixth less work a step. None for a third of all.
    first_layer: int | None = None
    epochs: int = 2
    steps: int | None = None  # stop, with the rate at zero, after so many; None for all epochs
    prompt_share: float = 0.2  # of the rows that only teach the second look, in each epoch
    tokens_per_batch: int = 1024
    longest: int = 480  # tokens; longer sequences are left out
    written_weight: float = 2.0  # of the rewrite's tokens against the second look's terms
    turn_weight: float = 1.0  # of an edit's first token against the other tokens of a rewrite
    delta_rate: float = 1e-3
    head_rate: float = 1e-3
    warmup: float = 0.05  # share of all steps
    weight_decay: float = 0.01
    seed: int = 17


class Refiner(nn.Module):
    """A causal language model with deltas, and the second look's head on its states."""

    def __init__(self, network: Any, categories: int, settings: RefinerSettings) -> None:
        super().__init__()
        first = settings.first_layer
        if first is None:
            first = len(network.model.layers) // 3
        add_low_rank(network, first, settings.rank, settings.scale)
        self.turn_weight = settings.turn_weight
        self.network = network
        self.head = Head(network.config.hidden_size, categories, "variational")

    def forward(self, batch: RecordBatch) -> tuple[Tensor, Reading]:
        """Weighted mean loss of the written tokens, and the second look's reading."""
        states = self.network.model(input_ids=batch.ids, use_cache=False).last_hidden_state
        written = batch.targets != IGNORED
        logits = self.network.lm_head(states[written])
        losses = functional.cross_entropy(logits, batch.targets[written], reduction="none")
        weights = torch.where(batch.turning[written], self.turn_weight, 1.0)
        rows = torch.arange(len(batch.read), device=states.device)
        read = states[rows, batch.read].unsqueeze(1)
        reading = self.head(read, torch.ones(read.shape[:2], device=read.device))
        return (weights * losses).sum() / weights.sum().clamp_min(1), reading


class RefinerTrainer:
    """A training run: modules, optimiser and position, saved and restored together."""

    def __init__(
        self,
        refiner: Refiner,
        corpus: RecordCorpus,
        settings: RefinerSettings,
        device: str,
    ) -> None:
        hidden = refiner.head.mean.in_features
        self.refiner = refiner.to(device).train()
        self.enhancer = Enhancer(hidden, len(corpus.categories)).to(device)
        self.corpus, self.settings, self.device = corpus, settings, device
        self.weights = replace(Weights(), span=0.0)  # one state is read: there is no pooling
        dealt = sum(len(corpus.batches(epoch)) for epoch in range(settings.epochs))
        self.steps = min(dealt, settings.steps or dealt)
        self.step = 0
        self.started_from: dict[str, Any] | None = None
        self.deltas = [p for p in refiner.network.parameters() if p.requires_grad]
        self.heads = [*refiner.head.parameters(), *self.enhancer.parameters()]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": self.deltas, "lr": settings.delta_rate},
                {"params": self.heads, "lr": settings.head_rate},
            ],
            weight_decay=settings.weight_decay,
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._rate)

    def start_from(self, path: Path) -> None:
        """Take over the weights of an earlier run's training.pt, not its optimiser and position.

        Raises DataError if they are not of such a network.
        """
        earlier = earlier_run(path, ["refiner", "enhancer"])
        take_over(self.refiner, earlier.networks["refiner"], strict=False)  # the base is not in it
        take_over(self.enhancer, earlier.networks["enhancer"])
        self.started_from = earlier.origin

    def run(self, checkpoint: Path, save_every: int) -> None:
        """Train to the end, saving to `checkpoint` every `save_every` steps."""
        if checkpoint.exists():
            self._restore(checkpoint)
        progress = tqdm(total=self.steps, initial=self.step, unit="step", mininterval=10)
        position = 0
        for epoch in range(self.settings.epochs):
            for rows in self.corpus.batches(epoch):
                position += 1
                if position <= self.step or self.step >= self.steps:
                    continue
                rng = random.Random(f"{self.settings.seed}-{position}")
                terms = self.train_step(self.corpus.collate(rows, rng).to(self.device))
                progress.set_postfix({k: f"{v:.3f}" for k, v in terms.items()}, refresh=False)
                progress.update()
                if self.step % save_every == 0:
                    self._save(checkpoint)
        progress.close()

    def train_step(self, batch: RecordBatch) -> dict[str, float]:
        """One optimiser step; returns the weighted loss terms."""
        torch.manual_seed(self.settings.seed + self.step)
        bf16 = self.device.startswith("cuda")
        with torch.autocast(self.device.split(":")[0], torch.bfloat16, enabled=bf16):
            written, reading = self.refiner(batch)
        anneal = min(1.0, self.step / max(1.0, 0.3 * self.steps))
        terms = variational_terms(reading, self.enhancer, batch.labels, self.weights, anneal)
        terms = {"written": self.settings.written_weight * written, **terms}
        self.optimizer.zero_grad(set_to_none=True)
        torch.stack(list(terms.values())).sum().backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.deltas + self.heads, 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.step += 1
        return {name: value.item() for name, value in terms.items()}

    def _rate(self, step: int) -> float:
        return warm_then_linear(step, self.steps, self.settings.warmup)

    def _trained(self) -> dict[str, Tensor]:
        return {
            name: value
            for name, value in self.refiner.state_dict().items()
            if name.endswith((".a", ".b")) or name.startswith("head.")
        }

    def _save(self, path: Path) -> None:
        partial = path.with_suffix(".partial")
        torch.save(
            {
                "step": self.step,
                "settings": asdict(self.settings),
                "started_from": self.started_from,
                "refiner": self._trained(),
                "enhancer": self.enhancer.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
            },
            partial,
        )
        partial.replace(path)

    def _restore(self, path: Path) -> None:
        saved = interrupted_run(path, self.device, self.settings, self.started_from)
        self.refiner.load_state_dict(saved["refiner"], strict=False)
        self.enhancer.load_state_dict(saved["enhancer"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.schedule.load_state_dict(saved["schedule"])
        self.step = saved["step"]


def save_refiner(
    refiner: Refiner, folder: Path, tokenizer: str, description: dict[str, Any]
) -> None:
    """Write the deltas, the second look's head, the tokenizer and refiner.json."""
    folder.mkdir(parents=True, exist_ok=True)
    deltas = {}
    for name, layer in low_rank_layers(refiner.network).items():
        deltas[f"{name}.a"] = layer.a.detach().contiguous()
        deltas[f"{name}.b"] = (layer.scale * layer.b.detach()).contiguous()
    save_file(deltas, folder / "delta.safetensors")
    save_file(refiner.head.state_dict(), folder / "head.safetensors")
    (folder / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    write_json(folder / "refiner.json", description)


def load_refiner(folder: Path, base: Path) -> tuple[Refiner, dict[str, Any]]:
    """The trained refiner in evaluation mode, and the contents of refiner.json.

    Raises DataError if it was trained from another base.
    """
    description = json.loads((folder / "refiner.json").read_text(encoding="utf-8"))
    if base_sha256(base) != description["base_sha256"]:
        raise DataError(f"{base} is not the file that {folder} was trained from")
    settings = RefinerSettings(**description["provenance"]["settings"])
    refiner = Refiner(load_base(base), len(description["categories"]), replace(settings, scale=1.0))
    deltas = load_file(folder / "delta.safetensors")  # their scale is in them
    refiner.load_state_dict({f"network.{k}": v for k, v in deltas.items()}, strict=False)
    refiner.head.load_state_dict(load_file(folder / "head.safetensors"))
    return refiner.eval(), description


def base_sha256(base: Path) -> str:
    """The hash of a base's file."""
    return hashlib.sha256(base.read_bytes()).hexdigest()


def first_looks(records: list[Record], pipeline: lance_edge.Pipeline) -> list[Record]:
    """The records with what the first look says of their prompts."""
    result = []
    for start in range(0, len(records), 64):
        chunk = records[start : start + 64]
        encoded = [pipeline.encode(record.example.prompt).windows for record in chunk]
        labels = pipeline.screener.score(encoded)
        result += [replace(r, labels=found) for r, found in zip(chunk, labels, strict=True)]
    return result


def main(
    base: Annotated[Path, typer.Option(help="GGUF file of the base language model.")],
    data: Annotated[
        list[Path], typer.Option(help="Folder with prompts/ and pairs/; may be given repeatedly.")
    ],
    out: Annotated[Path, typer.Option(help="Where the checkpoint goes.")],
    bundle: Annotated[
        Path | None, typer.Option(help="Bundle whose first look and gradients it learns from.")
    ] = None,
    epochs: Annotated[int, typer.Option(min=1)] = RefinerSettings.epochs,
    steps: Annotated[int | None, typer.Option(min=1, help="Stop after so many steps.")] = None,
    prompt_share: Annotated[float, typer.Option()] = RefinerSettings.prompt_share,
    delta_rate: Annotated[float, typer.Option(min=0.0)] = RefinerSettings.delta_rate,
    turn_weight: Annotated[
        float, typer.Option(min=0.0, help="Weight of an edit's first token.")
    ] = RefinerSettings.turn_weight,
    start: Annotated[
        Path | None, typer.Option(help="training.pt of an earlier run, to go on from its weights.")
    ] = None,
    seed: Annotated[int, typer.Option()] = RefinerSettings.seed,
    device: Annotated[str, typer.Option(help="cpu, or cuda:0")] = "cpu",
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 50,
    rows: Annotated[int | None, typer.Option(min=1, help="Use this many pairs only.")] = None,
) -> None:
    """Train the refiner with its second look, and save it as a checkpoint for the export."""
    settings = RefinerSettings(
        epochs=epochs,
        steps=steps,
        prompt_share=prompt_share,
        delta_rate=delta_rate,
        turn_weight=turn_weight,
        seed=seed,
    )
    torch.manual_seed(seed)
    serialized = base_tokenizer(base).to_str()
    tokenizer = LanguageTokenizer(serialized.encode(), TEMPLATE)
    with lance_edge.load(bundle or default_bundle(), "cpu") as pipeline:
        categories = list(pipeline.policy.categories)
        with usage_errors():
            pairs, prompts = load_records(data, categories)
        pairs = first_looks(pairs[:rows], pipeline)
        composer = Composer(
            pipeline.bundle.gradients(), categories, pipeline.policy.thresholds.tolist(), tokenizer
        )
    if not pairs:
        folders = ", ".join(map(str, data))
        raise typer.BadParameter(f"{folders}: no pairs that may be trained on")
    corpus = RecordCorpus(
        pairs,
        prompts,
        composer,
        settings.tokens_per_batch,
        settings.longest,
        settings.prompt_share,
        seed,
    )
    refiner = Refiner(load_base(base), len(categories), settings)
    trainer = RefinerTrainer(refiner, corpus, settings, device)
    if start:
        with usage_errors():
            trainer.start_from(start)
    typer.echo(
        f"{len(pairs)} pairs, {len(prompts)} prompts, {trainer.steps} steps on {device}", err=True
    )
    out.mkdir(parents=True, exist_ok=True)
    with usage_errors():
        trainer.run(out / "training.pt", save_every)
    description = {
        "template": asdict(TEMPLATE),
        "base_sha256": base_sha256(base),
        "categories": categories,
        "provenance": {
            "settings": asdict(settings),
            "started_from": trainer.started_from,
            "weights": asdict(trainer.weights),
            "pairs": len(pairs),
            "prompts": len(prompts),
            "sources": sorted({r.example.source for r in [*pairs, *prompts]}),
            "torch": torch.__version__,
        },
    }
    save_refiner(trainer.refiner, out, serialized, description)


if __name__ == "__main__":
    typer.run(main)
