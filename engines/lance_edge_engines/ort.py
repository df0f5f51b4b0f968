"""ONNX Runtime sessions, on the CPU and on CUDA."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from lance_edge_engines.external import Malformed, tensors_in_files
from lance_edge_engines.session import (
    PAST,
    PRESENT,
    Array,
    DeviceUnavailable,
    Session,
    SessionError,
    State,
    TensorSpec,
)

# A graph may read no files: what it names as external data must be given as `weights`.
NOWHERE = os.path.join(os.devnull, "no-files")  # noqa: PTH118 - a name that cannot exist, not a path

EXTERNAL_FOLDER = "session.model_external_initializers_file_folder_path"

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


def open_cpu(
    graph: bytes, threads: int | None = None, weights: Mapping[str, Array] | None = None
) -> Session:
    """A session on the CPU."""
    return _open(graph, "cpu", threads, weights)


def open_cuda(
    graph: bytes, threads: int | None = None, weights: Mapping[str, Array] | None = None
) -> Session:
    """A session on the first NVIDIA GPU."""
    return _open(graph, "cuda", threads, weights)


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


class OrtState:
    """Arrays on the session's device; made by `OrtSession.allocate`."""

    def __init__(self, specs: Sequence[TensorSpec], capacity: int, device: str) -> None:
        runtime = _import()
        self.values = {}
        for spec in specs:
            shape = [
                1 if axis == 0 else length or capacity for axis, length in enumerate(spec.shape)
            ]
            zeros = np.zeros(shape, spec.dtype)
            self.values[spec.name] = runtime.OrtValue.ortvalue_from_numpy(zeros, device)

    def load(self, values: Mapping[str, Array]) -> None:
        for name, value in values.items():
            held = self.values[PAST + name]
            array = held.numpy()
            array[tuple(slice(length) for length in value.shape)] = value
            held.update_inplace(array)

    def read(self, name: str) -> Array:
        array: Array = self.values[PAST + name].numpy()
        return array.copy()


class OrtSession:
    """A graph held by ONNX Runtime; opened by `open_cpu` and `open_cuda`."""

    def __init__(self, session: Any, device: str, weights: Sequence[Any] = ()) -> None:
        self._session = session
        self._weights = weights  # ONNX Runtime reads them in place
        self.device = device
        self.inputs: Sequence[TensorSpec] = [_spec(value) for value in session.get_inputs()]
        self.outputs: Sequence[TensorSpec] = [_spec(value) for value in session.get_outputs()]
        self._names = [spec.name for spec in self.outputs if not spec.name.startswith(PRESENT)]

    def allocate(self, capacity: int) -> OrtState:
        kept = [spec for spec in self.inputs if spec.name.startswith(PAST)]
        return OrtState(kept, capacity, self.device)

    def run(self, inputs: Mapping[str, Array], state: State | None = None) -> dict[str, Array]:
        if self._session is None:
            raise SessionError("the session is closed")
        try:
            if isinstance(state, OrtState):
                values = self._run_bound(inputs, state)
            else:
                values = self._session.run(self._names, dict(inputs))
        except Exception as error:  # ONNX Runtime's errors share no base class below Exception
            raise SessionError(f"the graph failed on {self.device}: {error}") from error
        return dict(zip(self._names, values, strict=True))

    def close(self) -> None:
        self._session = None
        self._weights = ()

    def _run_bound(self, inputs: Mapping[str, Array], state: OrtState) -> list[Array]:
        binding = self._session.io_binding()
        for name, value in inputs.items():
            binding.bind_cpu_input(name, value)
        for name in self._names:
            binding.bind_output(name)
        for name, value in state.values.items():
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(PRESENT + name.removeprefix(PAST), value)
        self._session.run_with_iobinding(binding)
        return [value.numpy() for value in binding.get_outputs()[: len(self._names)]]


def _open(
    graph: bytes, device: str, threads: int | None, weights: Mapping[str, Array] | None
) -> OrtSession:
    if reason := why_not(device):
        raise DeviceUnavailable(reason)
    _check_reads_no_files(graph, weights or {})
    runtime = _import()
    if device == "cuda" and hasattr(runtime, "preload_dlls"):
        # CUDA libraries that pip installed are on no search path. What fails is printed.
        with contextlib.redirect_stdout(sys.stderr):
            runtime.preload_dlls()
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or 0
    options.enable_mem_pattern = False  # lengths vary; patterns only cost memory
    # Planning which buffers to use again takes four fifths of a language model's start, and saves it
    # neither time nor memory. Smaller graphs are planned quickly, and gain a little.
    options.enable_mem_reuse = not weights
    if weights:  # its graph is fused when it is exported; looking for more to fuse takes 60 ms
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry(EXTERNAL_FOLDER, NOWHERE)
    # ONNX Runtime's own format would be loaded unchecked.
    options.add_session_config_entry("session.load_model_format", "ONNX")
    held = [runtime.OrtValue.ortvalue_from_numpy(array) for array in (weights or {}).values()]
    try:
        if weights:
            options.add_external_initializers(list(weights), held)
        session = runtime.InferenceSession(graph, options, providers=[PROVIDERS[device]])
    except Exception as error:  # as in OrtSession.run
        raise SessionError(
            f"ONNX Runtime {runtime.__version__} cannot load the graph: {error}"
        ) from error
    # ONNX Runtime drops a provider that fails to start and goes on with the CPU.
    if session.get_providers()[0] != PROVIDERS[device]:
        raise DeviceUnavailable(f"ONNX Runtime could not start {PROVIDERS[device]} on this machine")
    return OrtSession(session, device, held)


def _check_reads_no_files(graph: bytes, weights: Mapping[str, Array]) -> None:
    """Raises SessionError if a tensor lies in a file and is not given."""
    try:
        initializers, others = tensors_in_files(graph)
    except Malformed as error:
        raise SessionError(f"cannot load the graph: it is no ONNX model ({error})") from error
    missing = sorted(initializers - set(weights))
    if missing or others:
        named = f"its tensor {missing[0]!r}" if missing else "a tensor inside of it"
        raise SessionError(f"cannot load the graph: {named} lies in a file, and it may read none")


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
