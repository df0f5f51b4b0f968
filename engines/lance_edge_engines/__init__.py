"""Sessions: one loaded graph on one device. Knows graphs and arrays; nothing of prompts."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from importlib import import_module

from lance_edge_engines.session import (
    Array,
    DeviceUnavailable,
    FakeSession,
    FakeState,
    Session,
    SessionError,
    State,
    TensorSpec,
)

__all__ = [
    "BACKENDS",
    "DeviceUnavailable",
    "FakeSession",
    "FakeState",
    "Session",
    "SessionError",
    "State",
    "TensorSpec",
    "available_devices",
    "open_session",
]

# ONNX Runtime reads it when it is imported. Without it, 1.32 keeps a device id in the user's cache and
# reports to its maker that it is used.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

# device -> "module:opener". An opener takes (graph, threads, weights) as `open_session` has them.
BACKENDS = {
    "cpu": "lance_edge_engines.ort:open_cpu",
    "cuda": "lance_edge_engines.ort:open_cuda",
}

# What "auto" tries, in this order.
PREFERENCE = ("cuda", "cpu")


Weights = Mapping[str, Array]


def open_session(
    graph: bytes,
    device: str = "auto",
    threads: int | None = None,
    weights: Weights | None = None,
) -> Session:
    """Load a serialized ONNX graph on a device: a key of BACKENDS, or "auto" for the best there is.

    threads  CPU threads for one run; None for one per physical core
    weights  the graph's external data by tensor name; the arrays must live as long as the session

    Raises DeviceUnavailable if the device, or the package that drives it, is not there, and
    SessionError if the graph cannot be loaded. Only "auto" goes on to another device.
    """
    if device != "auto":
        return _opener(device)(graph, threads, weights)
    refusals = []
    for name in PREFERENCE:
        try:
            return _opener(name)(graph, threads, weights)
        except DeviceUnavailable as refusal:
            refusals.append(f"{name}: {refusal}")
    raise DeviceUnavailable("no device can run the graph; " + "; ".join(refusals))


def available_devices() -> dict[str, str | None]:
    """Each device, and why it is not available; None if it is."""
    return {
        name: import_module(target.split(":")[0]).why_not(name) for name, target in BACKENDS.items()
    }


Opener = Callable[[bytes, "int | None", "Weights | None"], Session]


def _opener(device: str) -> Opener:
    if device not in BACKENDS:
        raise DeviceUnavailable(
            f"there is no device {device!r}; choose from auto, {', '.join(BACKENDS)}"
        )
    module, function = BACKENDS[device].split(":")
    opener: Opener = getattr(import_module(module), function)
    return opener
