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


PAST, PRESENT = "past.", "present."  # a state's array goes in by one name and out by the other


class State(Protocol):
    """Arrays that a graph reads as inputs `past.*` and updates in place as outputs `present.*`.

    They stay on the device between runs. One run at a time may use a state.
    """

    def load(self, values: Mapping[str, Array]) -> None:
        """Write arrays by name, without the `past.`, to the start of their longest axis."""
        ...

    def read(self, name: str) -> Array:
        """A copy of one array."""
        ...


class Session(Protocol):
    """One loaded graph on one device. `run` may be called from several threads at once."""

    @property
    def device(self) -> str: ...

    @property
    def inputs(self) -> Sequence[TensorSpec]: ...

    @property
    def outputs(self) -> Sequence[TensorSpec]: ...

    def allocate(self, capacity: int) -> State:
        """A state of zeros; `capacity` is the length of its arrays' open axis."""
        ...

    def run(self, inputs: Mapping[str, Array], state: State | None = None) -> dict[str, Array]:
        """All outputs by name, but for those that update the state.

        Raises SessionError if the inputs do not fit the graph.
        """
        ...

    def close(self) -> None:
        """Free the graph's memory; the session cannot be used afterwards."""
        ...


class FakeState:
    """A state for tests: whatever a fake session's function keeps in it."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.arrays: dict[str, Array] = {}

    def load(self, values: Mapping[str, Array]) -> None:
        self.arrays.update(values)

    def read(self, name: str) -> Array:
        return self.arrays[name].copy()


class FakeSession:
    """A session that computes its outputs with a Python function, for tests without a model.

    compute  (inputs) -> outputs, or (inputs, state) -> outputs if it is run with a state
    """

    device = "fake"

    def __init__(
        self,
        compute: Callable[..., dict[str, Array]],
        inputs: Sequence[TensorSpec] = (),
        outputs: Sequence[TensorSpec] = (),
    ) -> None:
        self._compute = compute
        self.inputs = inputs
        self.outputs = outputs
        self.closed = False

    def allocate(self, capacity: int) -> FakeState:
        return FakeState(capacity)

    def run(self, inputs: Mapping[str, Array], state: State | None = None) -> dict[str, Array]:
        if self.closed:
            raise SessionError("the session is closed")
        return self._compute(inputs) if state is None else self._compute(inputs, state)

    def close(self) -> None:
        self.closed = True
