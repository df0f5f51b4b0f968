"""`lance-edge pack`: a bundle for another machine, or for a server. Imports nothing heavy until it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from lance_edge.cli import PublicKeyOption, exits, new_tool

app = new_tool("Pack a bundle for other machines.", no_args_is_help=False)


@app.command()
@exits
def pack(
    bundle: Annotated[
        Path | None,
        typer.Argument(help="Folder of the bundle; the installed one if none is named."),
    ] = None,
    *,
    out: Annotated[
        Path, typer.Option(help="Where it goes; what was packed there before is replaced.")
    ],
    output_format: Annotated[
        Literal["bundle", "triton"],
        typer.Option("--format", help="A bundle, or a model repository for Triton."),
    ] = "bundle",
    with_weights: Annotated[
        bool,
        typer.Option(
            "--with-weights/--without-weights",
            help="Put the refiner's pulled weights in, so that nothing has to be fetched.",
            show_default="with",
        ),
    ] = True,
    taxonomy: Annotated[
        Path | None,
        typer.Option(
            help="JSON file with other titles and actions of its categories, as its taxonomy.json.",
            show_default="the bundle's",
        ),
    ] = None,
    sign: Annotated[
        Path | None,
        typer.Option(help="PEM file with a private key that signs it.", show_default="not signed"),
    ] = None,
    public_key: PublicKeyOption = None,
) -> int:
    """Pack a bundle for another machine: whole, with its weights, signed; or as a Triton repository."""
    from lance_edge.bundle import open_bundle
    from lance_edge.signature import sign as sign_bundle
    from lance_edge_export.place import check_replaceable, is_bundle, is_repository, whole
    from lance_edge_export.portable import copy_bundle
    from lance_edge_export.taxonomy import describe_anew, read_taxonomy, taxonomy_of
    from lance_edge_export.triton import MODELS, write_repository

    opened = open_bundle(bundle, public_key)
    triton = output_format == "triton"
    ours = is_repository(out, MODELS) if triton else is_bundle(out)
    check_replaceable(out, ours, f"a packed {output_format}")
    described = None if taxonomy is None else read_taxonomy(taxonomy, taxonomy_of(opened))
    with whole(out) as folder:
        if triton:
            packed = write_repository(opened, folder, with_weights)
        else:
            copy_bundle(opened, folder, with_weights)
            packed = [folder]
        for inside in packed:
            if described is not None:
                describe_anew(inside, described)
            if sign is not None:
                sign_bundle(inside, sign, opened.manifest.name)
    typer.echo(f"wrote {out}")
    return 0
