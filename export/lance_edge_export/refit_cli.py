"""`lance-edge refit`: weights back into stripped TensorRT plans. Imports nothing heavy until it runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from lance_edge.cli import PublicKeyOption, exits, new_tool
from lance_edge.report import Steps
from lance_edge_export.plan_cli import check_extra, parse_device, read_calibration

app = new_tool("Put the weights back into stripped TensorRT plans.")


@app.command()
@exits
def refit(
    plans: Annotated[Path, typer.Argument(help="Folder that `lance-edge plan --stripped` wrote.")],
    out: Annotated[Path, typer.Option(help="A new folder for the whole plans.")],
    bundle: Annotated[
        Path | None,
        typer.Argument(help="Folder of the bundle; the installed one if none is given."),
    ] = None,
    device: Annotated[str, typer.Option(help="The GPU that will run the plans.")] = "cuda:0",
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="The file that int8 and fp8 plans were built with.",
            show_default="that of the package",
        ),
    ] = None,
    keep_fp16: Annotated[
        list[str] | None,
        typer.Option(help="As the plans were built; repeatable."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    public_key: PublicKeyOption = None,
) -> int:
    """Put the weights of a bundle back into stripped plans, on the GPU that will run them."""
    from lance_edge.bundle import open_bundle
    from lance_edge_engines.plan_record import read_record

    gpu = parse_device(device)
    record = read_record(plans)
    check_extra(record.runtime)
    from lance_edge_export.refit import refit_plans
    from lance_edge_export.to_plan import summary

    screener = record.plans.get("screener")
    precision = "fp16" if screener is None else screener.precision
    eight_bits = read_calibration(precision, calibration, keep_fp16 or ())
    opened = open_bundle(bundle, public_key)
    with Steps(sys.stderr, enabled=not quiet) as steps:
        refitted = refit_plans(plans, record, opened, out, eight_bits, gpu, steps.update)
    for line in summary(refitted):
        typer.echo(line)
    typer.echo(f"wrote {out}")
    return 0
