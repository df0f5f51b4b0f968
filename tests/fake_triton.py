"""The part of Triton's Python back-end that our model uses: requests in, responses out."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest


@dataclass
class Tensor:
    name: str
    array: Any

    def as_numpy(self) -> Any:
        return self.array


@dataclass
class InferenceRequest:
    inputs: list[Tensor]


class TritonError:
    INTERNAL, INVALID_ARG = 1, 3

    def __init__(self, message: str, code: int = INTERNAL) -> None:
        self.message, self.code = message, code


@dataclass
class InferenceResponse:
    output_tensors: list[Tensor]
    error: TritonError | None = None

    def texts(self, name: str) -> list[str]:
        """An output, which must be a column of bytes."""
        (tensor,) = [tensor for tensor in self.output_tensors if tensor.name == name]
        assert tensor.array.dtype == np.object_ and tensor.array.shape[1:] == (1,)
        return [row[0].decode() for row in tensor.array]


def get_input_tensor_by_name(request: InferenceRequest, name: str) -> Tensor | None:
    return next((tensor for tensor in request.inputs if tensor.name == name), None)


def install(patch: pytest.MonkeyPatch) -> None:
    """Let `import triton_python_backend_utils` find the names above."""
    module = ModuleType("triton_python_backend_utils")
    for item in (Tensor, InferenceRequest, TritonError, InferenceResponse):
        setattr(module, item.__name__, item)
    module.get_input_tensor_by_name = get_input_tensor_by_name  # type: ignore[attr-defined]
    patch.setitem(sys.modules, module.__name__, module)


def start(repository: Path, name: str, **parameters: str) -> Any:
    """A model of a repository, from its own model.py, initialized as Triton does it.

    parameters  what its config.pbtxt says of them
    """
    path = repository / name / "1" / "model.py"
    spec = importlib.util.spec_from_file_location(f"{name}_model", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for their annotations
    spec.loader.exec_module(module)
    model = module.TritonPythonModel()
    config = {
        "parameters": {key: {"string_value": value} for key, value in parameters.items()},
    }
    model.initialize(
        {
            "model_config": json.dumps(config),
            "model_repository": str(repository / name),
            "model_version": "1",
        }
    )
    return model


def request(
    prompts: Sequence[str | bytes], tasks: Sequence[str | bytes] | None = None
) -> InferenceRequest:
    columns = {"prompt": prompts} if tasks is None else {"prompt": prompts, "task": tasks}
    return InferenceRequest([Tensor(name, column(texts)) for name, texts in columns.items()])


def column(texts: Sequence[str | bytes]) -> Any:
    values = [[text.encode() if isinstance(text, str) else text] for text in texts]
    return np.array(values, dtype=np.object_).reshape(-1, 1)
