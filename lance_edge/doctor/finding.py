"""One judgement on a machine, and what the judges share."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Level = Literal["works", "advice", "broken"]

CPU_WHEEL = "pip install onnxruntime"
GPU_WHEEL = 'pip install "onnxruntime-gpu[cuda,cudnn]"'


@dataclass(frozen=True)
class Finding:
    """One judgement; `remedy` is the command, or the step, that mends or improves it."""

    level: Level
    text: str
    remedy: str | None = None


def numbers(version: str | None) -> tuple[int, ...]:
    """The leading numbers of a version, to compare with; (0,) if there are none."""
    return tuple(int(part) for part in re.findall(r"\d+", version or "")[:3]) or (0,)
