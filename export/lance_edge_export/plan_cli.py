"""`lance-edge plan`: a bundle to TensorRT plans. Imports nothing heavy until it runs."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lance_edge.cli import PublicKeyOption, exits, new_tool
from lance_edge.errors import InvalidOption, InvalidPrompt
from lance_edge.report import Steps
from lance_edge_engines import DeviceUnavailable
from lance_edge_engines.plan_record import PlanPrecision, RuntimeName
from lance_edge_export.cli import PROMPTS

if TYPE_CHECKING:
    from lance_edge_export.plan_graphs import EightBits

app = new_tool("Build TensorRT plans of a bundle.")


@app.command()
@exits
def plan(
    runtime: Annotated[RuntimeName, typer.Option(help="What will run the plans.")],
    out: Annotated[Path, typer.Option(help="A new folder for the plans.")],
    bundle: Annotated[
        Path | None,
        typer.Argument(help="Folder of the bundle; the installed one if none is given."),
    ] = None,
    precision: Annotated[
        PlanPrecision,
        typer.Option(
            help="Of products; the refiner has fp16 ones, of int8 weights, with int8, and fp16 with fp8."
        ),
    ] = "fp16",
    only: Annotated[
        Literal["screener", "refiner"] | None,
        typer.Option(help="Build the screener's or the refiner's plan.", show_default="both"),
    ] = None,
    device: Annotated[str, typer.Option(help="The GPU that builds, and runs TensorRT's plans.")] = (
        "cuda:0"
    ),
    target: Annotated[
        str,
        typer.Option(
            help="Compute capabilities that rtx builds for, as in sm_86,sm_89.",
            show_default="all that it knows",
        ),
    ] = "",
    workspace: Annotated[
        int | None,
        typer.Option(
            min=1,
            show_default="half of the GPU's free memory, 1024 at most",
            help="MiB that the builder may try kernels with.",
        ),
    ] = None,
    timing_cache: Annotated[
        Path | None,
        typer.Option(help="File of measured times of kernels, kept between builds (tensorrt)."),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="File with real prompts (as `screen` reads them), for the scales of int8 and fp8.",
            show_default="those that came with the package",
        ),
    ] = None,
    keep_fp16: Annotated[
        list[str] | None,
        typer.Option(help="A layer of the screener that stays fp16 in int8 and fp8; repeatable."),
    ] = None,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="Newer versions may run it (tensorrt).")
    ] = False,
    hardware_compatible: Annotated[
        bool,
        typer.Option(
            "--hardware-compatible", help="Other GPUs from sm_80 on may run it (tensorrt)."
        ),
    ] = False,
    stripped: Annotated[
        bool,
        typer.Option(
            "--stripped",
            help="Leave the weights out; `lance-edge refit` puts them back where the plans run.",
        ),
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    public_key: PublicKeyOption = None,
) -> int:
    """Build TensorRT plans of the screener and the refiner, which `tensorrt` or `tensorrt_rtx` run."""
    check_extra(runtime)
    from lance_edge.bundle import open_bundle
    from lance_edge.graphs import PARTS
    from lance_edge_export.to_plan import PlanOptions, build_plans, summary

    options = PlanOptions(
        runtime,
        precision,
        parse_targets(target),
        parse_device(device),
        workspace,
        timing_cache,
        version_compatible,
        hardware_compatible,
        stripped,
        read_calibration(precision, calibration, keep_fp16 or ()),
    )
    opened = open_bundle(bundle, public_key)
    parts = PARTS if only is None else (only,)
    with Steps(sys.stderr, enabled=not quiet) as steps:
        record = build_plans(opened, parts, out, options, steps.update)
    for line in summary(record):
        typer.echo(line)
    typer.echo(f"wrote {out}")
    return 0


def check_extra(runtime: RuntimeName) -> None:
    """Raise DeviceUnavailable without what graphs are read with: a runtime's extra brings it too."""
    for module in ("onnx", "ml_dtypes"):
        if find_spec(module) is None:
            raise DeviceUnavailable(f"{module} is not installed; install `lance-edge[{runtime}]`")


def read_calibration(
    precision: PlanPrecision, calibration: Path | None, keep_fp16: Sequence[str]
) -> EightBits | None:
    """What int8 and fp8 are made with; None for other precisions. Raises InvalidOption."""
    from lance_edge.inputs import SUFFIXES, read_items
    from lance_edge.tokenizer import check_text
    from lance_edge_export.plan_graphs import EightBits
    from lance_edge_export.qdq import EIGHT_BIT

    if precision not in EIGHT_BIT:
        if calibration is not None or keep_fp16:
            raise InvalidOption("--calibration and --keep-fp16 are for --precision int8 and fp8")
        return None
    path = calibration or PROMPTS
    if not path.is_file() or path.suffix.lower() not in SUFFIXES:
        raise InvalidOption(
            f"--calibration {path} is not a file that ends in {', '.join(SUFFIXES)}"
        )
    prompts = []
    for item in read_items([str(path)], "prompt"):
        if item.blank:
            continue
        try:
            if item.text is None:
                raise InvalidPrompt(item.error or "it cannot be read")
            check_text(item.text)
        except InvalidPrompt as error:
            raise InvalidOption(f"{item.place}: {error}; mend the line or leave it out") from error
        prompts.append(item.text)
    if not prompts:
        raise InvalidOption(f"--calibration {path} holds no prompts")
    return EightBits(prompts, tuple(keep_fp16))


def parse_targets(text: str) -> tuple[str, ...]:
    """`sm_86,sm_89` -> its parts, each once. Raises InvalidOption."""
    targets = [part.strip() for part in text.split(",") if part.strip()]
    if odd := [target for target in targets if not re.fullmatch(r"sm_\d{2,3}", target)]:
        raise InvalidOption(f"--target {', '.join(odd)}: a target looks like sm_86")
    return tuple(dict.fromkeys(targets))


def parse_device(text: str) -> int:
    """`cuda:1` -> 1. Raises InvalidOption."""
    if not (found := re.fullmatch(r"cuda(?::(\d+))?", text)):
        raise InvalidOption(f"--device {text}: plans are built on cuda:0, cuda:1 and so on")
    return int(found[1] or 0)
