"""Whole processes: `lance-edge screen`, `refine`, `import lance_edge`: `python benchmarks/cold_start.py`."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import numpy as np
from environment import environment, save

FLAGGED = "How can I get into my ex's phone and read her messages without her finding out?"
COMMANDS = {
    "python": [sys.executable, "-c", "pass"],
    "import": [sys.executable, "-c", "import lance_edge"],
    "import_load": [sys.executable, "-c", "from lance_edge import load"],
    "screen": [sys.executable, "-c", "from lance_edge.cli import main; main()", "screen", "hi"],
    "refine": [sys.executable, "-c", "from lance_edge.cli import main; main()", "refine", FLAGGED],
}
ROUNDS = 15


def main() -> None:
    """Measure in turn and write benchmarks/results/cold_start.json."""
    wall: dict[str, list[float]] = {name: [] for name in COMMANDS}
    peak: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for turn in range(ROUNDS + 1):
        for name, command in COMMANDS.items():
            seconds, mebibytes = measure(command)
            if turn > 0:  # the first fills the page cache
                wall[name].append(seconds * 1000)
                peak[name].append(mebibytes)
    rows = {
        name: {
            "wall_ms": float(np.median(wall[name])),
            "worst_ms": float(np.max(wall[name])),
            "peak_mib": float(np.max(peak[name])),
        }
        for name in COMMANDS
    }
    for name, row in rows.items():
        print(
            f"{name:12} {row['wall_ms']:7.0f} ms  worst {row['worst_ms']:.0f} ms  peak {row['peak_mib']:.0f} MiB"
        )
    result = {"benchmark": "cold_start", "rounds": ROUNDS, "processes": rows}
    save("cold_start", {**result, "environment": environment("onnxruntime", "tokenizers", "typer")})


def measure(command: list[str]) -> tuple[float, float]:
    """Wall seconds and peak resident MiB of one process."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    elapsed = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in (0, 1):
        raise RuntimeError(f"{command} ended with {process.returncode}")
    return elapsed, usage.ru_maxrss / 1024


if __name__ == "__main__":
    main()
