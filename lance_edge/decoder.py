"""The refiner's graph with its cache: prefill, verify, roll back. Knows tokens, not text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lance_edge.errors import BundleError
from lance_edge.screener import FloatArray
from lance_edge_engines import Session, State

Float32Array = npt.NDArray[np.float32]

OUTPUTS = ("tokens", "log_probabilities", "mean", "deviation")
BLOCK = 64  # rows; attention's own blocks are of a multiple of this


@dataclass
class Cache:
    """Keys and values of the tokens read so far.

    state   on the device; what lies past `length` is overwritten by the next step
    length  tokens kept
    """

    state: State
    length: int
    capacity: int

    def rollback(self, length: int) -> None:
        """Forget the tokens from `length` on."""
        assert 0 <= length <= self.length
        self.length = length


@dataclass(frozen=True)
class Step:
    """What one step says.

    tokens             the most likely next token after each wanted row
    log_probabilities  theirs, in nats
    mean, deviation    the second look's latent severities at the first wanted row   [C]
    """

    tokens: list[int]
    log_probabilities: list[float]
    mean: FloatArray
    deviation: FloatArray


class Decoder:
    """A decoder graph behind a session.

    prefix         keys and values of the template's first tokens: the state's arrays by name
    prefix_length  how many tokens those are
    context        the longest cache the graph's tables cover, in tokens
    """

    def __init__(
        self, session: Session, prefix: Mapping[str, Float32Array], prefix_length: int, context: int
    ) -> None:
        names = {spec.name for spec in session.outputs}
        if not names.issuperset(OUTPUTS):
            raise BundleError(
                f"the refiner's graph has no {', '.join(sorted(set(OUTPUTS) - names))}: it is an earlier "
                "version's; export the refiner, and build its plans, again"
            )
        self._session = session
        self._prefix = prefix
        self._prefix_length = prefix_length
        self.context = context

    @property
    def device(self) -> str:
        return self._session.device

    def start(self, tokens: int) -> Cache:
        """A cache that holds the prefix and has room for so many tokens more."""
        capacity = self._prefix_length + tokens + 1  # one to spare for a step of a single token
        if capacity > self.context:
            raise ValueError(f"{capacity} tokens do not fit a context of {self.context}")
        state = self._session.allocate(capacity)
        state.load(self._prefix)
        return Cache(state, self._prefix_length, capacity)

    def step(self, cache: Cache, ids: Sequence[int], first: int = 0) -> Step:
        """Read new tokens into the cache.

        first  the first of them whose next token is wanted, and where the second look is read
        """
        # Attention sums a row that is alone in its block of rows in another order than one in
        # company (ONNX Runtime 1.31). One row more, whose result nobody reads, keeps a token's
        # result the same whichever step it is in.
        rows = [*ids, ids[-1]] if len(ids) % BLOCK == 1 else list(ids)
        assert cache.length + len(rows) <= cache.capacity
        outputs = self._session.run(
            {
                "ids": np.array([rows], np.int64),
                "past": np.array([cache.length], np.int32),
                "first": np.array([first], np.int64),
            },
            cache.state,
        )
        cache.length += len(ids)
        return Step(
            outputs["tokens"][: len(ids) - first].tolist(),
            outputs["log_probabilities"][: len(ids) - first].tolist(),
            outputs["mean"].astype(np.float64),
            outputs["deviation"].astype(np.float64),
        )

    def close(self) -> None:
        self._session.close()
