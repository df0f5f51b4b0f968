"""What plan.json says of a folder of plans, and whether they fit this machine. Loads no runtime.

A plan is a TensorRT engine: machine code for one graph, one version of the runtime and one kind of
GPU. Running a plan that fits none of these fails at best, so the record is checked before the file.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from lance_edge_engines.cuda import Gpu
from lance_edge_engines.session import SessionError

RECORD = "plan.json"
FORMAT = 3

RuntimeName = Literal["tensorrt", "rtx"]
PlanPrecision = Literal["fp32", "fp16", "int8", "fp8"]
# An input's smallest, most likely and largest shape; or value, if the graph takes lengths from it.
Span = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
Profile = dict[str, Span]


class PlanStale(SessionError):
    """A plan was built for another graph, runtime or GPU, or is damaged."""


@dataclass(frozen=True)
class PlanParity:
    """What a plan's 8 bits change against fp32, on real prompts.

    differences  of severities; decisions: the share of prompts whose decision is another
    worst_layers the layers that moved most, with their relative errors
    """

    prompts: int
    largest_difference: float
    mean_difference: float
    flipped_decisions: float
    worst_layers: dict[str, float]

    def __post_init__(self) -> None:
        figures = (self.largest_difference, self.mean_difference, self.flipped_decisions)
        if not all(isinstance(value, int | float) and 0 <= value <= 1 for value in figures):
            raise ValueError("parity's figures must be numbers from 0 to 1")


@dataclass(frozen=True)
class PlanEntry:
    """One plan.

    file, sha256, bytes  where it lies, in the record's folder
    graph_sha256  of the ONNX file that was parsed, and of the weights beside it
    sources       what it was made from: file -> SHA-256, as in the bundle's manifest
    precision     of its products: fp32, fp16, int8 or fp8; an int8 refiner has int8 weights alone
    parity        what 8 bits change; None for floating point
    targets       compute capabilities it runs on, as in sm_86
    gpu           the GPU it was built on and for; None if it was built without one
    version_compatible, hardware_compatible   newer runtimes, and other GPUs from sm_80 on, may run it
    stripped      whether its weights were left out; it cannot be run before they are put back
    profiles      lengths it can be run with; the runtime takes the first that fits
    network       layers and types of the parsed graph
    engine        layers, types, inputs and outputs as the runtime has them; None if it was not read back
    not_read_back why it was not
    build         seconds, cpu_seconds (of all threads), peak_mib: what building took; timing_lost:
                  why measured times could not be kept, where that is so
    """

    file: str
    sha256: str
    bytes: int
    graph_sha256: str
    sources: dict[str, str]
    precision: PlanPrecision
    parity: PlanParity | None
    targets: tuple[str, ...]
    gpu: str | None
    version_compatible: bool
    hardware_compatible: bool
    stripped: bool
    profiles: tuple[Profile, ...]
    network: dict[str, Any]
    engine: dict[str, Any] | None
    not_read_back: str | None
    build: dict[str, Any]


@dataclass(frozen=True)
class PlanRecord:
    """The contents of plan.json: plans by name, all for one runtime."""

    runtime: RuntimeName
    version: str
    bundle: dict[str, str]
    plans: dict[str, PlanEntry]

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=2) + "\n"


def read_record(folder: Path) -> PlanRecord:
    """The record of a folder. Raises SessionError if there is none or it cannot be understood."""
    path = folder / RECORD
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise SessionError(
            f"{path} is missing; build plans with `lance-edge plan BUNDLE --runtime rtx --out DIR`"
        ) from None
    except OSError as error:
        raise SessionError(
            f"{path} cannot be read ({error.strerror}); name the folder that `lance-edge plan` wrote"
        ) from error
    except (ValueError, RecursionError) as error:
        raise SessionError(f"{path} is not valid JSON ({error}); build the plans again") from error
    try:
        found = values.pop("format")
        if found != FORMAT:
            raise SessionError(
                f"{path} has format {found!r} and this version reads {FORMAT}; build the plans again"
            )
        plans = {name: _entry(entry) for name, entry in values.pop("plans").items()}
        if not plans:
            raise ValueError("it has plans of nothing")
        if values.get("runtime") not in get_args(RuntimeName):
            raise ValueError(f"there is no runtime {values.get('runtime')!r}")
        return PlanRecord(plans=plans, **values)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise SessionError(f"{path} is not a record of plans: {error}; build them again") from error


def check_sources(folder: Path, record: PlanRecord, name: str, sources: Mapping[str, str]) -> None:
    """Raises PlanStale if a plan was made from other files than these: name -> SHA-256."""
    entry = record.plans[name]
    if odd := [file for file, sha256 in sources.items() if entry.sources.get(file) != sha256]:
        raise PlanStale(
            f"{folder / entry.file} was built from another {' and '.join(odd)} than the bundle's; "
            f"run `{rebuild(folder, record)}`"
        )


def check_plan(
    folder: Path,
    record: PlanRecord,
    name: str,
    version: str,
    gpu: Gpu,
    sources: Mapping[str, str] | None,
) -> bytes:
    """The verified contents of a plan that fits this machine.

    version  of the installed runtime
    sources  the SHA-256 of the files it should have been made from; None to take any

    Raises PlanStale, with the command that builds it again.
    """
    if name not in record.plans:
        raise SessionError(
            f"{folder / RECORD} has no plan {name!r}, only {', '.join(record.plans)}; build it with "
            f"`{rebuild(folder, record)}`"
        )
    entry, path = record.plans[name], folder / record.plans[name].file
    if sources is not None:
        check_sources(folder, record, name, sources)
    other_gpu = _other_gpu(entry, record.runtime, gpu)
    reason = _other_version(entry, record.version, version) or other_gpu
    contents = b"" if reason or path.is_symlink() or not path.is_file() else path.read_bytes()
    if reason is None and hashlib.sha256(contents).hexdigest() != entry.sha256:
        reason = "is missing, or is not the file that plan.json describes"
    if reason:
        command = rebuild(folder, record, (gpu.sm,) if other_gpu else None)
        raise PlanStale(f"{path} {reason}; run `{command}`")
    return contents


def rebuild(folder: Path, record: PlanRecord, targets: tuple[str, ...] | None = None) -> str:
    """The command that makes a folder's plans again, in a new folder.

    targets  what rtx shall build for; None for what it did
    """
    entry = record.plans.get("screener") or next(iter(record.plans.values()))
    only = "" if len(record.plans) > 1 else f" --only {next(iter(record.plans))}"
    wanted = ",".join(entry.targets if targets is None else targets)
    target = f" --target {wanted}" if record.runtime == "rtx" and wanted else ""
    flags = {
        " --version-compatible": entry.version_compatible,
        " --hardware-compatible": entry.hardware_compatible,
        " --stripped": entry.stripped,
        " --calibration FILE": entry.parity is not None,
    }
    given = "".join(flag for flag, on in flags.items() if on)
    return (
        f"lance-edge plan BUNDLE --runtime {record.runtime} --precision {entry.precision}{only}{target}"
        f"{given} --out {folder}.new"
    )


def _entry(values: dict[str, Any]) -> PlanEntry:
    if unknown := sorted(set(values) - {item.name for item in fields(PlanEntry)}):
        raise ValueError(f"unknown keys {', '.join(unknown)}")
    if Path(values["file"]).name != values["file"]:
        raise ValueError(f"{values['file']!r} is not a plain file name")
    if values["precision"] not in get_args(PlanPrecision):
        raise ValueError(f"there is no precision {values['precision']!r}")
    if not isinstance(values["stripped"], bool):
        raise ValueError("stripped must be true or false")
    sources, targets = values["sources"], values["targets"]
    if not isinstance(sources, dict) or not isinstance(targets, list):
        raise ValueError("sources must be an object and targets a list")
    parity = None if values["parity"] is None else PlanParity(**values["parity"])
    profiles = tuple(
        {key: (tuple(span[0]), tuple(span[1]), tuple(span[2])) for key, span in profile.items()}
        for profile in values["profiles"]
    )
    typed = {"profiles": profiles, "targets": tuple(map(str, targets)), "parity": parity}
    return PlanEntry(**{**values, **typed})


def _other_version(entry: PlanEntry, built: str, installed: str) -> str | None:
    if built == installed:
        return None
    if entry.version_compatible and _numbers(built) <= _numbers(installed):
        return None
    return f"was built by version {built} and {installed} is installed"


def _other_gpu(entry: PlanEntry, runtime: RuntimeName, gpu: Gpu) -> str | None:
    if runtime == "rtx":
        if gpu.sm in entry.targets:
            return None
        built = ", ".join(entry.targets) or "GPUs that it does not name"
        return f"was built for {built} and this GPU ({gpu.name}) is {gpu.sm}"
    if gpu.sm in entry.targets and gpu.name == entry.gpu:
        return None
    ampere = (8, 0)
    if entry.hardware_compatible and capability(gpu.sm) >= ampere:
        return None
    built = f"{entry.gpu} ({', '.join(entry.targets)})"
    return f"was built on {built} and this GPU is {gpu.name} ({gpu.sm})"


def capability(sm: str) -> tuple[int, int]:
    """sm_87 -> (8, 7)"""
    digits = sm.removeprefix("sm_")
    return int(digits[:-1]), int(digits[-1])


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))
