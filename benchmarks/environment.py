"""What a figure was measured on: written into every result."""

from __future__ import annotations

import json
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import lance_edge

RESULTS = Path(__file__).parent / "results"


def environment(*packages: str) -> dict[str, Any]:
    """CPU, Python, package versions and commit."""
    return {
        "cpu": _cpu(),
        "python": platform.python_version(),
        "versions": {
            "lance-edge": lance_edge.__version__,
            **{name: metadata.version(name) for name in ("numpy", *packages)},
        },
        "commit": _git("rev-parse", "--short", "HEAD")
        + ("+" if _git("status", "--porcelain") else ""),
    }


def save(name: str, result: dict[str, Any]) -> None:
    """Write results/NAME.json and print it as one JSON line."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))


def _cpu() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    values = dict(line.split(":", 1) for line in lines if ":" in line)
    trimmed = {key.strip(): value.strip() for key, value in values.items()}
    flags = set(trimmed.get("flags", "").split())
    return {
        "model": trimmed.get("model name", platform.machine()),
        "cores": sum(line.startswith("processor") for line in lines),
        "instructions": [f for f in ("avx2", "avx512f", "avx512_vnni", "avx_vnni") if f in flags],
    }


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip()
