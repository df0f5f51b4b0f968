"""What every back-end offers, and a fake of it for tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


class SessionError(RuntimeError):
    """A graph cannot be loaded or run."""


class DeviceUnavailable(SessionError):
    """The device that was asked for, or the package that drives it, is not there."""


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of a graph; None in the shape stands for any length."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | None, ...]


class Session(Protocol):
    """One loaded graph on one device. `run` may be called from several threads at once."""

    @property
    def device(self) -> str: ...

    @property
    def inputs(self) -> Sequence[TensorSpec]: ...

    @property
    def outputs(self) -> Sequence[TensorSpec]: ...

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """All outputs by name. Raises SessionError if the inputs do not fit the graph."""
        ...

    def close(self) -> None:
        """Free the graph's memory; the session cannot be used afterwards."""
        ...


class FakeSession:
    """A session that computes its outputs with a Python function, for tests without a model."""

    device = "fake"

    def __init__(
        self,
        compute: Callable[[Mapping[str, Array]], dict[str, Array]],
        inputs: Sequence[TensorSpec] = (),
        outputs: Sequence[TensorSpec] = (),
    ) -> None:
        self._compute = compute
        self.inputs = inputs
        self.outputs = outputs
        self.closed = False

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        if self.closed:
            raise SessionError("the session is closed")
        return self._compute(inputs)

    def close(self) -> None:
        self.closed = True
