"""ONNX Runtime sessions, on the CPU and on CUDA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from lance_edge_engines.session import Array, DeviceUnavailable, Session, SessionError, TensorSpec

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}

_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}


def open_cpu(graph: bytes, threads: int | None = None) -> Session:
    """A session on the CPU."""
    return _open(graph, "cpu", threads)


def open_cuda(graph: bytes, threads: int | None = None) -> Session:
    """A session on the first NVIDIA GPU."""
    return _open(graph, "cuda", threads)


def why_not(device: str) -> str | None:
    """Why this process cannot use the device; None if the runtime offers it, which opening a
    session must still prove."""
    try:
        runtime = _import()
    except DeviceUnavailable as error:
        return str(error)
    if PROVIDERS[device] in runtime.get_available_providers():
        return None
    return (
        f"the installed onnxruntime {runtime.__version__} has no {PROVIDERS[device]}; "
        "install `lance-edge[gpu]` in an environment without the cpu extra"
    )


class OrtSession:
    """A graph held by ONNX Runtime; opened by `open_cpu` and `open_cuda`."""

    def __init__(self, session: Any, device: str) -> None:
        self._session = session
        self.device = device
        self.inputs: Sequence[TensorSpec] = [_spec(value) for value in session.get_inputs()]
        self.outputs: Sequence[TensorSpec] = [_spec(value) for value in session.get_outputs()]
        self._names = [spec.name for spec in self.outputs]

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        if self._session is None:
            raise SessionError("the session is closed")
        try:
            values = self._session.run(self._names, dict(inputs))
        except Exception as error:  # ONNX Runtime's errors share no base class below Exception
            raise SessionError(f"the graph failed on {self.device}: {error}") from error
        return dict(zip(self._names, values, strict=True))

    def close(self) -> None:
        self._session = None


def _open(graph: bytes, device: str, threads: int | None) -> OrtSession:
    if reason := why_not(device):
        raise DeviceUnavailable(reason)
    runtime = _import()
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or 0
    options.enable_mem_pattern = False  # lengths vary; patterns only cost memory
    try:
        session = runtime.InferenceSession(graph, options, providers=[PROVIDERS[device]])
    except Exception as error:  # as in OrtSession.run
        raise SessionError(
            f"ONNX Runtime {runtime.__version__} cannot load the graph: {error}"
        ) from error
    # ONNX Runtime drops a provider that fails to start and goes on with the CPU.
    if session.get_providers()[0] != PROVIDERS[device]:
        raise DeviceUnavailable(f"ONNX Runtime could not start {PROVIDERS[device]} on this machine")
    return OrtSession(session, device)


def _import() -> ModuleType:
    try:
        import onnxruntime
    except ImportError as error:
        raise DeviceUnavailable(
            "onnxruntime is not installed; install `lance-edge[cpu]`, or `lance-edge[gpu]` for CUDA"
        ) from error
    module: ModuleType = onnxruntime
    return module


def _spec(value: Any) -> TensorSpec:
    shape = tuple(length if isinstance(length, int) else None for length in value.shape)
    if value.type not in _DTYPES:
        raise SessionError(f"the graph's {value.name} is a {value.type}, which is not supported")
    return TensorSpec(value.name, np.dtype(_DTYPES[value.type]), shape)
