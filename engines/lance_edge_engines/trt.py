"""TensorRT sessions: plans that `lance-edge plan` built, run by `tensorrt` or `tensorrt_rtx`.

Both packages have one API in the parts used here, from TensorRT 10.3 to 11.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from lance_edge_engines.cuda import Device, Memory
from lance_edge_engines.plan_record import Profile, RuntimeName, check_plan, read_record
from lance_edge_engines.session import (
    PAST,
    PRESENT,
    Array,
    DeviceUnavailable,
    SessionError,
    State,
    TensorSpec,
)

MODULES: dict[RuntimeName, str] = {"tensorrt": "tensorrt", "rtx": "tensorrt_rtx"}


def open_plan(
    folder: Path,
    name: str,
    sources: Mapping[str, str] | None = None,
    gpu: int = 0,
    memory: Memory | None = None,
) -> PlanSession:
    """A session that runs one plan of a folder.

    name     "screener" or "refiner"
    sources  SHA-256 of the bundle's files that it should have been made from; None to take any
    gpu      the device's number
    memory   of the device, for this session alone; None to open it

    Raises PlanStale if the plan fits another graph, runtime version or GPU, DeviceUnavailable
    without the runtime or a GPU, and SessionError if the plan is stripped or the runtime refuses it.
    """
    record = read_record(folder)
    runtime = import_runtime(record.runtime)
    device: Memory = Device(gpu) if memory is None else memory
    try:
        contents = check_plan(folder, record, name, runtime.__version__, device.gpu, sources)
        if record.plans[name].stripped:
            raise SessionError(
                f"{folder / record.plans[name].file} was built without its weights; put them back "
                f"with `lance-edge refit {folder} BUNDLE --out {folder}.whole`"
            )
        return PlanSession(runtime, contents, record.runtime, record.plans[name].profiles, device)
    except SessionError:
        device.close()
        raise


def import_runtime(name: RuntimeName) -> ModuleType:
    """The runtime's package. Raises DeviceUnavailable if it, or its libraries, are not there."""
    module = MODULES[name]
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise DeviceUnavailable(
            f"{error.name or module} is not installed; install `lance-edge[{name}]`"
        ) from error
    except (ImportError, OSError) as error:
        raise DeviceUnavailable(
            f"{module} is installed without its libraries ({error}); install them from NVIDIA's "
            "index (https://pypi.nvidia.com) or, on a Jetson, with JetPack"
        ) from error


def collecting_logger(runtime: ModuleType) -> Any:
    """A logger that keeps what the runtime complains of in `messages`, and prints nothing."""
    base: Any = runtime.ILogger

    class Collector(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)
            self.messages: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (base.Severity.INTERNAL_ERROR, base.Severity.ERROR):
                self.messages.append(message)

    return Collector()


class PlanState:
    """Arrays on the device, made by `PlanSession.allocate`.

    Each has two buffers: a run reads one and writes the other. TensorRT does not promise that an
    output may lie where an input does.
    """

    def __init__(self, specs: Sequence[TensorSpec], capacity: int, memory: Memory) -> None:
        self._memory = memory
        memory.use()
        self.shapes = {
            spec.name: tuple(
                1 if axis == 0 else length or capacity for axis, length in enumerate(spec.shape)
            )
            for spec in specs
        }
        self._dtypes = {spec.name: spec.dtype for spec in specs}
        self._open = {spec.name: _open_axis(spec) for spec in specs}
        self.current = {spec.name: self._allocate(spec.name) for spec in specs}
        self.spare = {spec.name: self._allocate(spec.name) for spec in specs}
        memory.wait()

    def load(self, values: Mapping[str, Array]) -> None:
        self._memory.use()
        copies = []  # kept until they have arrived
        for short, value in values.items():
            name = PAST + short
            shape, axis = self.shapes[name], self._open[name]
            rows = np.ascontiguousarray(value, self._dtypes[name])
            # One run of neighbours for each index of the axes before the open one.
            stride = rows.itemsize * int(np.prod(shape[axis:]))
            for index in np.ndindex(rows.shape[:axis]):
                at = int(np.ravel_multi_index(index, shape[:axis])) * stride
                self._memory.write(self.current[name] + at, rows[index])
            copies.append(rows)
        self._memory.wait()

    def read(self, name: str) -> Array:
        self._memory.use()
        found = np.empty(self.shapes[PAST + name], self._dtypes[PAST + name])
        self._memory.read(found, self.current[PAST + name])
        self._memory.wait()
        return found

    def swap(self) -> None:
        """What a run has written becomes what the next one reads."""
        self.current, self.spare = self.spare, self.current

    def _allocate(self, name: str) -> int:
        size = int(np.prod(self.shapes[name])) * self._dtypes[name].itemsize
        address = self._memory.allocate(size)
        # When the process ends, the driver frees everything by itself.
        weakref.finalize(self, self._memory.free, address).atexit = False
        return address


class PlanSession:
    """A plan held by the runtime. Runs take turns: one execution context serves all threads."""

    def __init__(
        self,
        runtime: ModuleType,
        contents: bytes,
        device: str,
        profiles: Sequence[Profile],
        memory: Memory,
    ) -> None:
        self.device = device
        self._trt: Any = runtime
        self._memory, self._profiles = memory, profiles
        self._log = collecting_logger(runtime)
        memory.use()
        self._runtime = self._trt.Runtime(self._log)
        self._engine = self._runtime.deserialize_cuda_engine(contents)
        if self._engine is None:
            raise SessionError(f"{device} cannot load the plan: {self._complaint()}")
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise SessionError(f"{device} cannot prepare the plan: {self._complaint()}")
        self._profile = 0
        self.inputs = self._specs(self._trt.TensorIOMode.INPUT)
        self.outputs = self._specs(self._trt.TensorIOMode.OUTPUT)
        self._on_host = {
            spec.name
            for spec in self.inputs
            if self._engine.get_tensor_location(spec.name) == self._trt.TensorLocation.HOST
        }
        self._buffers: dict[str, tuple[int, int]] = {}  # name -> address, bytes; they only grow
        self._turn = threading.Lock()

    def allocate(self, capacity: int) -> PlanState:
        kept = [spec for spec in self.inputs if spec.name.startswith(PAST)]
        return PlanState(kept, capacity, self._memory)

    def run(self, inputs: Mapping[str, Array], state: State | None = None) -> dict[str, Array]:
        with self._turn:
            if self._context is None:
                raise SessionError("the session is closed")
            held = state if isinstance(state, PlanState) else None
            arrays = self._checked(inputs, held)
            self._memory.use()
            self._log.messages.clear()
            self._choose_profile(arrays, held)
            self._bind_inputs(arrays, held)
            outputs = self._bind_outputs(held)
            if not self._context.execute_async_v3(self._memory.stream):
                raise SessionError(f"the plan failed on {self.device}: {self._complaint()}")
            for name, array in outputs.items():
                self._memory.read(array, self._buffers[name][0])
            self._memory.wait()
            if held is not None:
                held.swap()
            return outputs

    def close(self) -> None:
        with self._turn:
            if self._context is None:
                return
            self._memory.use()
            for address, _ in self._buffers.values():
                self._memory.free(address)
            self._buffers = {}
            # In this order: each needs the one after it.
            self._context = self._engine = self._runtime = None
            self._memory.close()

    def _specs(self, mode: Any) -> list[TensorSpec]:
        engine, specs = self._engine, []
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            if engine.get_tensor_mode(name) == mode:
                dtype = np.dtype(self._trt.nptype(engine.get_tensor_dtype(name)))
                lengths = tuple(None if n < 0 else int(n) for n in engine.get_tensor_shape(name))
                specs.append(TensorSpec(name, dtype, lengths))
        return specs

    def _checked(self, inputs: Mapping[str, Array], state: PlanState | None) -> dict[str, Array]:
        """Contiguous inputs of the right types. Raises SessionError."""
        wanted = {
            spec.name: spec
            for spec in self.inputs
            if state is None or not spec.name.startswith(PAST)
        }
        if odd := sorted(set(wanted) ^ set(inputs)):
            raise SessionError(f"the plan's inputs and those given differ in {', '.join(odd)}")
        for name, spec in wanted.items():
            if inputs[name].dtype != spec.dtype:
                raise SessionError(
                    f"the plan's {name} is {spec.dtype} and what was given {inputs[name].dtype}"
                )
        return {name: np.ascontiguousarray(array) for name, array in inputs.items()}

    def _choose_profile(self, inputs: Mapping[str, Array], state: PlanState | None) -> None:
        given = {
            name: tuple(array.tolist()) if name in self._on_host else array.shape
            for name, array in inputs.items()
        }
        given |= {} if state is None else state.shapes
        refusals = [_outside(given, profile) for profile in self._profiles]
        if None not in refusals:
            raise SessionError(
                f"no profile of the plan has room for {refusals[-1]}; build it for longer inputs, "
                "or give shorter ones"
            )
        number = refusals.index(None)
        if number != self._profile:
            if not self._context.set_optimization_profile_async(number, self._memory.stream):
                raise SessionError(f"the plan's profile {number} failed: {self._complaint()}")
            self._profile = number

    def _bind_inputs(self, inputs: Mapping[str, Array], state: PlanState | None) -> None:
        for name, array in inputs.items():
            self._set_shape(name, array.shape)
            if name in self._on_host:
                self._context.set_tensor_address(name, array.ctypes.data)
                continue
            address = self._buffer(name, array.nbytes)
            self._memory.write(address, array)
            self._context.set_tensor_address(name, address)
        for name, address in ({} if state is None else state.current).items():
            assert state is not None
            self._set_shape(name, state.shapes[name])
            self._context.set_tensor_address(name, address)

    def _bind_outputs(self, state: PlanState | None) -> dict[str, Array]:
        """The arrays that are to be read back, empty yet."""
        if missing := self._context.infer_shapes():
            raise SessionError(f"the plan lacks the lengths of {', '.join(missing)}")
        outputs = {}
        for spec in self.outputs:
            if state is not None and spec.name.startswith(PRESENT):
                spare = state.spare[PAST + spec.name.removeprefix(PRESENT)]
                self._context.set_tensor_address(spec.name, spare)
                continue
            shape = tuple(self._context.get_tensor_shape(spec.name))
            if min(shape, default=0) < 0:
                raise SessionError(f"the length of the plan's {spec.name} depends on its contents")
            array = np.empty(shape, spec.dtype)
            self._context.set_tensor_address(spec.name, self._buffer(spec.name, array.nbytes))
            outputs[spec.name] = array
        return outputs

    def _set_shape(self, name: str, shape: tuple[int, ...]) -> None:
        if not self._context.set_input_shape(name, shape):
            raise SessionError(f"the plan refuses {name} of shape {shape}: {self._complaint()}")

    def _buffer(self, name: str, size: int) -> int:
        address, held = self._buffers.get(name, (0, 0))
        if address and held >= size:
            return address
        if address:
            del self._buffers[name]  # first: the device may have no room for another
            self._memory.free(address)
        self._buffers[name] = self._memory.allocate(size), size
        return self._buffers[name][0]

    def _complaint(self) -> str:
        return "; ".join(self._log.messages[-3:]) or "it does not say why"


def _open_axis(spec: TensorSpec) -> int:
    """The axis whose length is the state's capacity."""
    return next((axis for axis, n in enumerate(spec.shape) if n is None and axis > 0), 0)


def _outside(given: Mapping[str, tuple[int, ...]], profile: Profile) -> str | None:
    """The first input that does not fit a profile, in words; None if all do."""
    for name, lengths in given.items():
        if name not in profile:
            continue
        least, _, most = profile[name]
        fits = len(lengths) == len(least) and all(
            low <= length <= high for low, length, high in zip(least, lengths, most, strict=True)
        )
        if not fits:
            return f"{name} of {lengths}, which may be {least} to {most}"
    return None
