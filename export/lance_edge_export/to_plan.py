"""A bundle's graphs to TensorRT plans in a folder, with a record of what they fit."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lance_edge.bundle import Bundle
from lance_edge.errors import ExportError, InvalidOption
from lance_edge.graphs import Part
from lance_edge_engines.driver import load_library, read_driver
from lance_edge_engines.plan_record import (
    RECORD,
    PlanEntry,
    PlanPrecision,
    PlanRecord,
    RuntimeName,
    capability,
)
from lance_edge_engines.trt import import_runtime
from lance_edge_export.build_plan import Built, Job, answer_path, known_targets
from lance_edge_export.place import check_new, whole
from lance_edge_export.plan_graphs import EightBits, PlanGraph, check_part, write_graph
from lance_edge_export.qdq import EIGHT_BIT

FP8_FROM = (8, 9)  # the first compute capability with fp8
WHOLE, STRIPPED = ".plan", ".stripped.plan"  # how plans' files end

Report = Callable[[str, float], None]  # what is being done, and which share of it is done


@dataclass(frozen=True)
class PlanOptions:
    """How plans are built.

    precision      of products. With int8 a refiner has int8 weights and fp16 products, with fp8 fp16 ones
    targets        compute capabilities, as in sm_86, that rtx plans run on; none for all it knows
    gpu            number of the GPU to build on
    workspace_mib  memory for trying kernels; None for half of what the GPU has free, 1 GiB at most
    timing_cache   file of measured times of kernels, kept between builds
    version_compatible, hardware_compatible   plans that newer TensorRTs, or other GPUs, can run
    stripped       plans without weights, which `refit_plans` puts back where they run
    eight_bits     what int8 and fp8 are made with
    """

    runtime: RuntimeName
    precision: PlanPrecision = "fp16"
    targets: tuple[str, ...] = ()
    gpu: int = 0
    workspace_mib: int | None = None
    timing_cache: Path | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    stripped: bool = False
    eight_bits: EightBits | None = None

    def __post_init__(self) -> None:
        if (self.precision in EIGHT_BIT) != (self.eight_bits is not None):
            raise InvalidOption(
                "int8 and fp8 need real prompts to choose their scales on (eight_bits), and other "
                "precisions take none"
            )
        if self.precision == "fp8" and self.runtime == "rtx":
            old = [target for target in self.targets if capability(target) < FP8_FROM]
            if old or not self.targets:
                raise InvalidOption(
                    f"fp8 is for GPUs from sm_89 on, and {', '.join(old) or 'no --target'} was given; "
                    "name those with --target"
                )
        if self.runtime == "tensorrt" and self.targets:
            raise InvalidOption(
                "TensorRT builds for the GPU that it runs on; leave --target out and run the "
                "command on that GPU, or use --runtime rtx"
            )
        tensorrt_only = {
            "--version-compatible": self.version_compatible,
            "--hardware-compatible": self.hardware_compatible,
            "--timing-cache": self.timing_cache is not None,
        }
        if self.runtime == "rtx" and (given := [name for name, on in tensorrt_only.items() if on]):
            raise InvalidOption(f"{', '.join(given)}: only --runtime tensorrt has this")


def build_plans(
    bundle: Bundle, parts: Sequence[Part], out: Path, options: PlanOptions, report: Report
) -> PlanRecord:
    """Build plans of a bundle's parts into a new folder, which appears whole or not at all.

    Raises InvalidOption for options that do not fit, DeviceUnavailable without the runtime or its
    GPU, RefinerMissing for a refiner that was never pulled, BundleError for a graph that cannot be
    read, ExportError for a part that no plan is made of, or if a build fails.
    """
    check_new(out)
    if options.precision == "fp8" and "screener" not in parts:
        raise InvalidOption(
            "fp8 is for the screener, and only the refiner's plan was asked for; build that in fp16 "
            "or int8"
        )
    check_targets(options)
    check_fp8(options)
    for part in parts:
        check_part(bundle, part, options.precision)
    with whole(out, new=True) as folder:
        built = [build_part(bundle, part, folder, options, report) for part in parts]
        record = PlanRecord(
            runtime=options.runtime,
            version=built[0][1],
            bundle={
                "name": bundle.manifest.name,
                "version": bundle.manifest.version,
                "sha256": bundle.sha256,
            },
            plans={part: entry for part, (entry, _) in zip(parts, built, strict=True)},
        )
        (folder / RECORD).write_text(record.to_json(), encoding="utf-8")
    return record


def check_targets(options: PlanOptions) -> None:
    """Raises InvalidOption for targets that the installed runtime cannot build for."""
    runtime = import_runtime(options.runtime)
    if not options.targets:
        return
    known = known_targets(runtime)
    if unknown := [target for target in options.targets if target not in known]:
        raise InvalidOption(
            f"{options.runtime} {runtime.__version__} has no target {', '.join(unknown)}; choose "
            f"from {', '.join(known)}, or use --runtime tensorrt on that GPU"
        )


def check_fp8(options: PlanOptions) -> None:
    """Raises InvalidOption if TensorRT's GPU is too old for fp8; whether there is one shows later."""
    if options.precision != "fp8" or options.runtime == "rtx":
        return
    library = load_library()
    gpus = () if library is None else read_driver(library).gpus
    for gpu in gpus[options.gpu : options.gpu + 1]:
        if capability(gpu.sm) < FP8_FROM:
            raise InvalidOption(
                f"fp8 is for GPUs from sm_89 on, and {gpu.name} is {gpu.sm}; use --precision int8 "
                "or fp16"
            )


def build_part(
    bundle: Bundle, part: Part, folder: Path, options: PlanOptions, report: Report
) -> tuple[PlanEntry, str]:
    """Build one plan into a folder; its entry, and the runtime's version."""
    what = f"building the {part}'s plan"
    with tempfile.TemporaryDirectory(prefix="graph-", dir=folder) as scratch:
        report(f"writing the {part}'s graph", 0.0)
        graph = write_graph(bundle, part, options.precision, Path(scratch), options.eight_bits)
        plan = Path(scratch) / f"{part}.plan"
        report(what, 0.0)
        answer = run_build(job_of(graph, plan, options), lambda share: report(what, share))
        report(what, 1.0)
        contents = plan.read_bytes()
        entry = entry_of(graph, contents, answer, options)
        plan.replace(folder / entry.file)
    return entry, answer.version


def job_of(graph: PlanGraph, plan: Path, options: PlanOptions) -> Job:
    """What the building process is told."""
    workspace = options.workspace_mib
    timing = options.timing_cache
    return Job(
        runtime=options.runtime,
        graph=str(graph.path.resolve()),
        out=str(plan.resolve()),
        profiles=graph.profiles,
        targets=list(options.targets),
        gpu=options.gpu,
        workspace=None if workspace is None else workspace * 2**20,
        timing=None if timing is None else str(timing.resolve()),
        version_compatible=options.version_compatible,
        hardware_compatible=options.hardware_compatible,
        stripped=options.stripped,
    )


def run_build(job: Job, progress: Callable[[float], None]) -> Built:
    """Do a job in a process of its own. Raises ExportError with what it says, or how it died."""
    path = Path(job.out).with_suffix(".job.json")
    path.write_text(json.dumps(asdict(job)), encoding="utf-8")
    command = [sys.executable, "-m", "lance_edge_export.build_plan", str(path)]
    with (
        path.with_suffix(".log").open("w+b") as log,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=child_environment(),
        ) as child,
    ):
        try:
            assert child.stdout is not None
            for line in child.stdout:
                if (share := _share(line)) is not None:
                    progress(share)
            code = child.wait()
        except BaseException:  # also of a person who interrupts: no builder is left behind
            child.kill()
            raise
        log.seek(0)
        written = log.read().decode("utf-8", errors="replace").splitlines()
        complaints = [line for line in written if line and not line[0].isspace()]
    answer = answer_path(path)
    built = Built(**json.loads(answer.read_bytes())) if answer.is_file() else None
    if built is None or (code != 0 and built.error is None):
        died = f"signal {-code}" if code < 0 else f"exit code {code}"
        last = f": {complaints[-1]}" if complaints else ""
        raise ExportError(
            f"the builder died ({died}){last}; if the machine ran out of memory, close other "
            "programs or give --workspace a smaller number"
        )
    if built.error is not None:
        raise ExportError(built.error)
    return built


def child_environment() -> dict[str, str]:
    """The builder finds what this process finds, also what was put on sys.path by hand."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, sys.path))}


def entry_of(graph: PlanGraph, contents: bytes, built: Built, options: PlanOptions) -> PlanEntry:
    """The record of a plan; its file's name carries the fingerprint of what it was built from."""
    targets = tuple(built.targets)
    graph_sha256 = graph.sha256()
    fingerprint = {
        "graph": graph_sha256,
        "runtime": [options.runtime, built.version],
        "gpu": built.gpu if options.runtime == "tensorrt" else None,
        "targets": targets,
        "sources": graph.sources,
        "precision": graph.precision,
        "profiles": graph.profiles,
        "compatible": [options.version_compatible, options.hardware_compatible],
    }
    short = hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:12]
    return PlanEntry(
        file=f"{graph.part}-{options.runtime}-{graph.precision}-{short}"
        + (STRIPPED if options.stripped else WHOLE),
        sha256=hashlib.sha256(contents).hexdigest(),
        bytes=len(contents),
        graph_sha256=graph_sha256,
        sources=graph.sources,
        precision=graph.precision,
        parity=graph.parity,
        targets=targets,
        gpu=built.gpu if options.runtime == "tensorrt" else None,
        version_compatible=options.version_compatible,
        hardware_compatible=options.hardware_compatible,
        stripped=options.stripped,
        profiles=tuple(graph.profiles),
        network=built.network or {},
        engine=built.engine,
        not_read_back=built.not_read_back,
        build=built.build,
    )


def summary(record: PlanRecord) -> list[str]:
    """What was built, in lines."""
    lines = [f"runtime   {record.runtime} {record.version}"]
    for name, entry in record.plans.items():
        where = ", ".join(entry.targets)
        peak = entry.build["peak_mib"]
        memory = "" if peak is None else f", {peak:.0f} MiB at its peak"
        types = ", ".join(f"{count} {kind}" for kind, count in entry.network["types"].items())
        weights = ", without weights" if entry.stripped else ""
        lines += [
            f"{name:<9} {entry.file}",
            f"          {entry.bytes / 1e6:.1f} MB{weights}, {entry.precision}, for {where}",
            f"          built in {entry.build['seconds']:.1f} s{memory}",
            f"          {entry.network['layers']} layers in the network: {types}",
        ]
        if "timing_lost" in entry.build:
            lines.append(f"          measured times were not kept: {entry.build['timing_lost']}")
        if entry.parity is not None:
            lines.append(
                f"          8 bits against fp32, on {entry.parity.prompts} prompts: severities "
                f"differ by at most {entry.parity.largest_difference:.3f}, "
                f"{entry.parity.flipped_decisions:.2%} of the decisions change"
            )
        if entry.engine is None:
            lines.append(f"          not read back: {entry.not_read_back}")
        else:
            lines.append(
                f"          {entry.engine['layers']} layers in the plan, "
                f"{entry.engine['profiles']} profiles, {entry.engine['device_bytes'] / 1e6:.1f} MB "
                "of GPU memory beside the weights"
            )
    return lines


def _share(line: bytes) -> float | None:
    try:
        return float(json.loads(line)["share"])
    except (ValueError, KeyError, TypeError):  # a runtime's own words on standard output
        return None
