"""Prompts to verdicts in Triton's Python back-end: `model.py` of a repository made by `lance-edge pack`.

Knows requests and tensors; all else is `lance_edge`, which must be installed where this runs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

import lance_edge
from lance_edge.judge import Prompt
from lance_edge_engines import SessionError

TASKS = ("screen", "refine")


@dataclass(frozen=True)
class Asked:
    """A prompt with what is to be done with it."""

    prompt: Prompt
    task: str


class TritonPythonModel:
    """What Triton calls; the bundle lies beside this file."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the bundle, with the policy.json beside it if there is one."""
        parameters = json.loads(args["model_config"])["parameters"]
        folder = Path(args["model_repository"]) / args["model_version"]
        policy = folder / "policy.json"
        self.task = _task(parameters["task"]["string_value"])
        self.guard = lance_edge.load(
            folder / "bundle",
            parameters["device"]["string_value"],
            rules=policy if policy.is_file() else None,
        )
        if self.task == "refine":
            _ = self.guard.refiner  # what is missing must stop the start, not the first request

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """A response for each request; what is wrong with one is an error of that one alone."""
        asked: dict[int, list[Asked]] = {}
        errors: dict[int, Any] = {}
        for index, request in enumerate(requests):
            try:
                asked[index] = self._read(request)
            except ValueError as error:  # InvalidPrompt is one
                errors[index] = pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG)
        verdicts: dict[tuple[int, int], lance_edge.Verdict] = {}
        for task, judge in (("screen", self.guard.judge), ("refine", self.guard.repair)):
            places = [
                (index, row)
                for index, rows in asked.items()
                for row, item in enumerate(rows)
                if item.task == task
            ]
            if not places:  # `repair` would load the refiner for nothing
                continue
            try:
                found = list(judge([asked[index][row].prompt for index, row in places]))
            except (lance_edge.LanceError, SessionError) as error:
                errors |= {index: pb_utils.TritonError(str(error)) for index, _ in places}
                continue
            verdicts.update(zip(places, found, strict=True))
        return [
            pb_utils.InferenceResponse(output_tensors=[], error=errors[index])
            if index in errors
            else _response([verdicts[index, row] for row in range(len(asked[index]))])
            for index in range(len(requests))
        ]

    def finalize(self) -> None:
        """Free the models' memory."""
        self.guard.close()

    def _read(self, request: Any) -> list[Asked]:
        """A request's prompts. Raises ValueError, which names the first one that cannot be read."""
        prompts = _texts(request, "prompt")
        if prompts is None:
            raise ValueError("the request has no input `prompt`")
        tasks = _texts(request, "task") or [self.task] * len(prompts)
        asked = []
        for row, (prompt, task) in enumerate(zip(prompts, tasks, strict=True)):
            try:
                asked.append(Asked(self.guard.encode(prompt), _task(task)))
            except ValueError as error:
                raise ValueError(f"prompt {row}: {error}") from error
        return asked


def _task(name: str) -> str:
    if name not in TASKS:
        raise ValueError(f"there is no task {name!r}; choose from {', '.join(TASKS)}")
    return name


def _texts(request: Any, name: str) -> list[str] | None:
    """An input's texts, one a row; None if it is not there. Raises ValueError."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    if tensor is None:
        return None
    texts = []
    for row, value in enumerate(tensor.as_numpy().reshape(-1)):
        try:
            texts.append(value.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{name} {row}: it is not valid UTF-8 (byte {error.start + 1})"
            ) from error
    return texts


def _response(verdicts: Sequence[lance_edge.Verdict]) -> Any:
    columns: dict[str, list[str]] = {
        "verdict": [json.dumps(verdict.to_dict()) for verdict in verdicts],
        "decision": [verdict.decision for verdict in verdicts],
        "refined": [verdict.refined or "" for verdict in verdicts],
    }
    return pb_utils.InferenceResponse(
        output_tensors=[
            pb_utils.Tensor(name, np.array([[text.encode()] for text in texts], dtype=np.object_))
            for name, texts in columns.items()
        ]
    )
