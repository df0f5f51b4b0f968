"""Judges a machine: what works, what could work better, what is broken and the command that mends it.

Pure functions over `Machine`; `lance_edge.doctor.gather` makes it.
"""

from __future__ import annotations

from collections.abc import Iterator

from lance_edge.doctor.accelerators import (
    gpu_findings,
    jetson_findings,
    stock_wheel_serves,
    tensorrt_findings,
)
from lance_edge.doctor.finding import CPU_WHEEL, GPU_WHEEL, Finding, numbers
from lance_edge.doctor.machine import Machine

OLDEST_RUNTIME = (1, 23)
# Screening takes a quarter of this; a rewrite adds 138 MB of weights, its cache and its buffers.
ENOUGH_MEMORY = 600_000_000


def findings(machine: Machine) -> list[Finding]:
    """What works, what could be better, what is broken, in the order in which to read it."""
    parts = (_runtime, _int8, gpu_findings, tensorrt_findings, jetson_findings, _room, _bundle)
    return [finding for part in parts for finding in part(machine)]


def works(found: list[Finding]) -> bool:
    """Whether nothing that is installed is broken."""
    return all(finding.level != "broken" for finding in found)


def _runtime(machine: Machine) -> Iterator[Finding]:
    runtime = machine.runtime
    if {"onnxruntime", "onnxruntime-gpu"} <= machine.packages.keys():
        wanted = GPU_WHEEL if stock_wheel_serves(machine) else CPU_WHEEL
        yield Finding(
            "broken",
            f"onnxruntime and onnxruntime-gpu share a folder and overwrote each other; "
            f"what is left is {runtime.wheel or 'unknown'}",
            f"pip uninstall -y onnxruntime onnxruntime-gpu && {wanted}",
        )
    if runtime.fault is not None:
        absent = "not installed" in runtime.fault
        wheel = "onnxruntime-gpu" if "onnxruntime-gpu" in machine.packages else "onnxruntime"
        again = f"pip install --force-reinstall --no-deps {wheel}"
        yield Finding("broken", runtime.fault, CPU_WHEEL if absent else again)
        return
    if numbers(runtime.version) < OLDEST_RUNTIME:
        yield Finding(
            "broken",
            f"ONNX Runtime {runtime.version} is older than 1.23, the oldest that lance-edge runs on",
            f'pip install "{runtime.wheel or "onnxruntime"}>=1.23"',
        )
    refusal = runtime.refusals.get("cpu")
    if refusal is None:
        yield Finding("works", f"ONNX Runtime {runtime.version} runs graphs on the CPU")
    else:
        yield Finding("broken", f"the CPU runs no graph: {refusal}", CPU_WHEEL)
    if machine.python[:2] == (3, 10):
        yield Finding(
            "advice",
            "Python 3.10 ends at ONNX Runtime 1.23; newer ones need Python 3.11",
            None if machine.jetson else "make an environment with Python 3.11 or newer",
        )


def _int8(machine: Machine) -> Iterator[Finding]:
    has = machine.cpu.instructions
    if has is None:
        return
    arm = "neon" in has
    fast = [name for name in has if name in ("dotprod", "i8mm") or name.endswith(("vnni", "int8"))]
    if fast:
        yield Finding("works", f"int8 has instructions of its own: {', '.join(fast)}")
        return
    lacking = "dotprod" if arm else "VNNI"
    lacking += "" if arm or "avx2" in has else " and no AVX2"
    yield Finding("advice", f"the CPU has no {lacking}: int8 works, and is slower than it could be")


def _room(machine: Machine) -> Iterator[Finding]:
    free = machine.memory.free_bytes if machine.memory else None
    if free is not None and free < ENOUGH_MEMORY:
        yield Finding(
            "advice",
            f"{free / 1e6:.0f} MB of memory are free; screening and refining take up to "
            f"{ENOUGH_MEMORY / 1e6:.0f}",
            "end what is not needed, or add swap; `screen` alone needs a quarter of it",
        )
    needed, left = machine.bundle.refiner_bytes, machine.cache_free_bytes
    if machine.bundle.refiner in ("missing", "damaged") and left is not None and left < needed:
        yield Finding(
            "advice",
            f"the disk of {machine.cache} has {left / 1e6:.0f} MB free and `lance-edge pull` needs "
            f"{needed / 1e6:.0f}",
            "free some space, or set LANCE_EDGE_CACHE to a folder on another disk",
        )


def _bundle(machine: Machine) -> Iterator[Finding]:
    bundle = machine.bundle
    if bundle.fault is not None:
        yield Finding("broken", f"the bundle cannot be used: {bundle.fault}")
        return
    yield Finding(
        "works",
        f"the files of {bundle.name} agree with its manifest; `lance-edge verify` checks its numbers",
    )
    if bundle.refiner == "missing":
        yield Finding(
            "advice", "the refiner's weights are not here: `refine` needs them", "lance-edge pull"
        )
    elif bundle.refiner == "damaged":
        yield Finding(
            "broken", "the refiner's weights are not what the bundle names", "lance-edge pull"
        )
    elif bundle.refiner == "ready":
        yield Finding("works", "the refiner's weights agree with the manifest")
