"""Averages the weights of two trained screeners: `python -m lance_edge_training.average --help`.

Two runs from one pretrained encoder lie in one valley of the loss, and a point between them is often
better than either ("Model soups", Wortsman et al., ICML 2022). It costs no training and no size.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from lance_edge_training.checkpoint import load_screener, save_screener
from lance_edge_training.model import Screener
from lance_edge_training.usage import usage_errors

# What must be the same for an average to mean anything.
KEPT = ("head", "window", "overlap")
FILES = {"taxonomies": "taxonomy.json", "tokenizers": "tokenizer.json"}


def main(
    first: Annotated[Path, typer.Argument(help="Checkpoint of a trained screener.")],
    second: Annotated[Path, typer.Argument(help="Another one, from the same encoder.")],
    out: Annotated[Path, typer.Option(help="Where the averaged checkpoint goes.")],
    share: Annotated[float, typer.Option(min=0.0, max=1.0, help="Of the second one.")] = 0.5,
) -> None:
    """Write (1 - share) * first + share * second as a checkpoint; calibrate it before the export."""
    if out.resolve() in (first.resolve(), second.resolve()):
        raise typer.BadParameter(f"{out} is one of the two checkpoints; choose another --out")
    with usage_errors():
        averaged, description = load_screener(first)
        other, other_description = load_screener(second)
    different = [key for key in KEPT if description[key] != other_description[key]]
    different += [
        what for what, name in FILES.items() if contents(first / name) != contents(second / name)
    ]
    if shapes(averaged) != shapes(other):
        different.append("network")
    if different:
        raise typer.BadParameter(f"{first} and {second} differ in their {', '.join(different)}")
    with torch.no_grad():
        pairs = zip(averaged.parameters(), other.parameters(), strict=True)
        for parameter, theirs in pairs:
            parameter.lerp_(theirs, share)
    found = [description["provenance"], other_description["provenance"]]
    provenance = {
        "share": share,
        "first": found[0],
        "second": found[1],
        "sources": sorted({source for one in found for source in one["sources"]}),
    }
    kept = {key: description[key] for key in KEPT}
    save_screener(
        averaged,
        out,
        first / "tokenizer.json",
        contents(first / "taxonomy.json"),
        {**kept, "provenance": provenance},
    )


def contents(path: Path) -> Any:
    """What a JSON file holds."""
    return json.loads(path.read_text(encoding="utf-8"))


def shapes(screener: Screener) -> dict[str, torch.Size]:
    """The shape of each parameter."""
    return {name: parameter.shape for name, parameter in screener.named_parameters()}


if __name__ == "__main__":
    typer.run(main)
