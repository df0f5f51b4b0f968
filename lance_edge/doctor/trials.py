"""Tries libraries that may crash, each in a process of its own: `python -m lance_edge.doctor.trials NAME`."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from importlib import import_module
from typing import TypeVar

T = TypeVar("T")

CRASHED = "importing or running {} ends the process: it does not fit this CPU or system"
SECONDS = 120  # a first start of CUDA on a small board takes tens of seconds

# y = x * x; made with onnx.helper, opset 17. tests/unit/test_gather.py makes it again.
SQUARE = (
    b'\x08\x08:5\n\x0e\n\x01x\n\x01x\x12\x01y"\x03Mul\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04'
    b"\n\x02\x08\x01b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\x11"
)


@dataclass(frozen=True)
class RuntimeReport:
    """ONNX Runtime as it is.

    wheel     the package whose files were installed last: onnxruntime or onnxruntime-gpu
    cuda      the CUDA release that it was built for
    offered   its execution providers, whether they start or not
    refusals  device -> why a graph did not run there; None if it ran
    missing   the library that it could not open, if it complained of one
    fault     why nothing is known of it
    """

    version: str | None = None
    wheel: str | None = None
    cuda: str | None = None
    offered: tuple[str, ...] = ()
    refusals: dict[str, str | None] = field(default_factory=dict)
    missing: str | None = None
    fault: str | None = None


@dataclass(frozen=True)
class LoadedLibrary:
    """A package that was imported; `fault` is why it could not be."""

    version: str | None = None
    fault: str | None = None


def ask(name: str, kind: type[T]) -> tuple[T | None, str]:
    """A probe's answer from a new process, None if that crashed or took too long; and its complaints."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "lance_edge.doctor.trials", name],
            capture_output=True,
            text=True,
            check=True,
            timeout=SECONDS,
        )
        values = json.loads(done.stdout.splitlines()[-1])
        lists = {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
        return kind(**{**values, **lists}), done.stderr
    except (OSError, IndexError, ValueError, TypeError, subprocess.SubprocessError):
        return None, ""


def missing_library(complaints: str) -> str | None:
    """The library that the loader did not find, out of what a process wrote to standard error."""
    found = re.search(r"([\w.+-]+\.so[.\d]*): cannot open shared object", complaints)
    return found[1] if found else None


def try_runtime() -> RuntimeReport:
    """Import ONNX Runtime and run a graph on each of its devices."""
    from lance_edge_engines.ort import PROVIDERS

    try:
        import onnxruntime
        from onnxruntime.capi import build_and_package_info as build
    except Exception as error:  # whatever a package may raise while it is imported
        return RuntimeReport(fault=f"onnxruntime cannot be imported: {error}")
    return RuntimeReport(
        version=onnxruntime.__version__,
        wheel=getattr(build, "package_name", None),
        cuda=getattr(build, "cuda_version", None),
        offered=tuple(onnxruntime.get_available_providers()),
        refusals={device: _refusal(device) for device in PROVIDERS},
    )


def try_library(name: str) -> LoadedLibrary:
    """Import a package that loads libraries of its own."""
    try:
        module = import_module(name)
    except Exception as error:  # as above
        return LoadedLibrary(fault=str(error))
    return LoadedLibrary(version=str(getattr(module, "__version__", "")) or None)


def _refusal(device: str) -> str | None:
    """Why a graph does not run on a device. Only running it says whether the kernels are there."""
    import numpy as np

    from lance_edge_engines import SessionError, open_session

    try:
        session = open_session(SQUARE, device)
        outputs = session.run({"x": np.array([3.0], dtype=np.float32)})
    except SessionError as error:
        return str(error)
    found = float(outputs["y"][0])
    return None if found == 9.0 else f"3 * 3 is {found} there"


if __name__ == "__main__":
    asked = sys.argv[1]
    answer = try_runtime() if asked == "runtime" else try_library(asked)
    sys.stdout.write("\n" + json.dumps(asdict(answer)) + "\n")
