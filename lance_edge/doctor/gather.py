"""Gathers the facts about this machine that `lance-edge doctor` judges. Changes nothing.

A probe gives a value, or None for what cannot be known here; none of them raises. What may crash
the process (an ONNX Runtime that does not fit the CPU) is tried in a process of its own.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from lance_edge.doctor.machine import BundleState, Clock, Cpu, Jetson, Machine, Memory
from lance_edge.doctor.trials import CRASHED, LoadedLibrary, RuntimeReport, ask, missing_library
from lance_edge_engines.driver import Driver, load_library, read_driver

T = TypeVar("T")
Run = Callable[[Sequence[str]], "str | None"]  # a command -> what it printed, None if it failed

PACKAGES = ("numpy", "tokenizers", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx")
NVIDIA_VENDOR, DISPLAY_CLASS = "0x10de", "0x03"
# What int8 gains from, by the name that Linux gives it.
INSTRUCTIONS = {
    "avx2": "avx2",
    "avx512_vnni": "avx512_vnni",
    "avx_vnni": "avx_vnni",
    "amx_int8": "amx_int8",
    "asimd": "neon",
    "asimddp": "dotprod",
    "i8mm": "i8mm",
}


def gather(bundle: Path | None = None, public_key: Path | None = None) -> Machine:
    """All facts about this machine, and about a bundle: the installed one if none is given."""
    root = Path("/")
    cache = _attempt(_cache_folder)
    return Machine(
        system=f"{platform.system()} {platform.release()}",
        architecture=platform.machine(),
        python=sys.version_info[:3],
        cpu=cpu(root),
        memory=_attempt(memory, root),
        packages=packages(),
        runtime=runtime(),
        tensorrt=library("tensorrt"),
        rtx=library("tensorrt_rtx"),
        jetpack_python=_attempt(jetpack_python, root),
        driver=_attempt(driver),
        driver_release=_attempt(driver_release, root, output_of),
        nvidia_device=_attempt(nvidia_device, root),
        jetson=_attempt(jetson, root, output_of),
        cache="none" if cache is None else str(cache),
        cache_free_bytes=_attempt(free_bytes, cache),
        bundle=bundle_state(bundle, public_key),
    )


def output_of(command: Sequence[str]) -> str | None:
    """What a command prints; None if it is not there, fails, or takes longer than 10 seconds."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return done.stdout


def cpu(root: Path) -> Cpu:
    """The CPU: Linux says what it can do, macOS its name, Windows neither."""
    text = _attempt((root / "proc/cpuinfo").read_text) or ""
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    known = None
    if flags:
        listed = set(flags[1].split())
        known = tuple(name for flag, name in INSTRUCTIONS.items() if flag in listed)
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return Cpu(name[1].strip() if name else platform.processor() or None, cores, known)


def memory(root: Path) -> Memory | None:
    """The machine's memory, or the container's limit where that is less."""
    sizes = {
        name: int(kilobytes) * 1024
        for name, kilobytes in re.findall(
            r"^(\w+):\s+(\d+) kB", (root / "proc/meminfo").read_text(), re.MULTILINE
        )
    }
    total, free = sizes["MemTotal"], sizes.get("MemAvailable")
    limit = _attempt((root / "sys/fs/cgroup/memory.max").read_text)
    if limit and limit.strip().isdigit() and int(limit) < total:
        used = _attempt((root / "sys/fs/cgroup/memory.current").read_text)
        # What the page cache holds of it is given back when it is needed.
        stat = _attempt((root / "sys/fs/cgroup/memory.stat").read_text) or ""
        cached = re.search(r"^inactive_file (\d+)$", stat, re.MULTILINE)
        spare = int(cached.group(1)) if cached else 0
        left = int(limit) - int(used) + spare if used else None
        return Memory(int(limit), left if free is None or left is None else min(left, free))
    return Memory(total, free)


def packages() -> dict[str, str]:
    """The versions of PACKAGES, as pip sees them."""
    found = {name: _attempt(metadata.version, name) for name in PACKAGES}
    return {name: version for name, version in found.items() if version is not None}


def runtime() -> RuntimeReport:
    """ONNX Runtime, if this Python can see it."""
    if _attempt(find_spec, "onnxruntime") is None:
        return RuntimeReport(fault="onnxruntime is not installed")
    report, complaints = ask("runtime", RuntimeReport)
    if report is None:
        return RuntimeReport(fault=CRASHED.format("onnxruntime"))
    return replace(report, missing=missing_library(complaints))


def library(name: str) -> LoadedLibrary | None:
    """A Python package that loads libraries of its own; None if this Python cannot see it."""
    if _attempt(find_spec, name) is None:
        return None
    loaded, _ = ask(name, LoadedLibrary)
    return loaded or LoadedLibrary(fault=CRASHED.format(name))


def jetpack_python(root: Path) -> str | None:
    """The folder in which JetPack's packages put TensorRT for the system's Python."""
    found = sorted(root.glob("usr/lib/python3*/dist-packages/tensorrt"))
    return str(found[0].parent) if found else None


def driver() -> Driver | None:
    """NVIDIA's driver and its GPUs."""
    loaded = load_library()
    return None if loaded is None else read_driver(loaded)


def driver_release(root: Path, run: Run) -> str | None:
    """The driver's release number."""
    said = run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    text = said or _attempt((root / "proc/driver/nvidia/version").read_text) or ""
    found = re.search(r"\b\d{3}\.\d+(?:\.\d+)?\b", text)
    return found[0] if found else None


def nvidia_device(root: Path) -> bool | None:
    """Whether a graphics device of NVIDIA is on the PCI bus; None where that cannot be read."""
    folder = root / "sys/bus/pci/devices"
    if not folder.is_dir():
        return None
    return any(
        (device / "vendor").read_text().strip() == NVIDIA_VENDOR
        and (device / "class").read_text().startswith(DISPLAY_CLASS)
        for device in folder.iterdir()
    )


def jetson(root: Path, run: Run) -> Jetson | None:
    """The board, if it is a Jetson."""
    text = _attempt((root / "proc/device-tree/model").read_text) or ""
    model = text.strip("\0 \n") or None
    release = _attempt((root / "etc/nv_tegra_release").read_text)
    if release is None and "Jetson" not in text:
        return None
    numbers = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", release or "")
    said = re.search(r"Power Mode: *(.+)", run(["nvpmodel", "-q"]) or "")
    return Jetson(
        model,
        f"{numbers[1]}.{numbers[2]}" if numbers else None,
        said[1].strip() if said else None,
        clocks(root),
    )


def clocks(root: Path) -> tuple[Clock, ...]:
    """The clocks of the CPU's clusters, which Linux gives in kHz, and of the GPU, in Hz."""
    policies = sorted(root.glob("sys/devices/system/cpu/cpufreq/policy*"))
    gpus = sorted(root.glob("sys/class/devfreq/*gp[uc]*"))
    found = [_attempt(_clock, policy, "scaling_{}_freq", "cpu", 1_000) for policy in policies]
    found += [_attempt(_clock, gpu, "{}_freq", "gpu", 1_000_000) for gpu in gpus]
    return tuple(clock for clock in found if clock is not None)


def _clock(folder: Path, file: str, name: str, per_mhz: int) -> Clock:
    values = [int((folder / file.format(part)).read_text()) for part in ("cur", "min", "max")]
    return Clock(name, *(value // per_mhz for value in values))


def free_bytes(folder: Path) -> int | None:
    """Room on the disk that a folder is, or would be, on."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(there).free


def bundle_state(path: Path | None, public_key: Path | None = None) -> BundleState:
    """Whether every file of a bundle, and its refiner's weights, have the hashes they should, and is
    signed by a key's owner if one is given."""
    from lance_edge.bundle import default_bundle, open_bundle
    from lance_edge.errors import LanceError

    place = str(path or default_bundle())
    try:
        bundle = open_bundle(path, public_key)
        bundle.verify()
    except (LanceError, OSError) as error:
        return BundleState(place, fault=str(error))
    name = f"{bundle.manifest.name} {bundle.manifest.version}"
    spec = bundle.manifest.refiner
    if spec is None:
        return BundleState(place, name)
    from lance_edge.cache import is_whole, weights_path

    weights = weights_path(bundle, spec)
    state = "missing"
    if weights.is_file():
        state = "ready" if _attempt(is_whole, weights, spec) else "damaged"
    base = 0 if spec.base is None else spec.base.bytes  # without one, nothing is pulled
    return BundleState(place, name, None, state, 2 * base + spec.weights.bytes)


def _cache_folder() -> Path:
    from lance_edge.cache import cache_folder

    return cache_folder()


def _attempt(probe: Callable[..., T], *arguments: Any) -> T | None:
    """What a probe finds, or None."""
    try:
        return probe(*arguments)
    except Exception:  # a machine may lack, forbid or garble anything; the other facts still count
        return None
