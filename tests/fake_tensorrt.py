"""A stand-in for `tensorrt` and `tensorrt_rtx` that computes: it has their names and refuses what they
refuse, holds ONNX graphs as engines, and runs them with ONNX Runtime on the addresses it is given.

`make` gives a module with the API of one version: what that version does not have is not there.
A GPU's memory is this process's, in blocks that every access is checked against.
"""

from __future__ import annotations

import ctypes
import enum
import json
from collections.abc import Mapping
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import onnx

from lance_edge_engines.cuda import Gpu
from lance_edge_engines.session import SessionError

MAGIC = b"fake plan "
DTYPES = {
    onnx.TensorProto.FLOAT: "FLOAT",
    onnx.TensorProto.FLOAT16: "HALF",
    onnx.TensorProto.INT32: "INT32",
    onnx.TensorProto.INT64: "INT64",
}
NUMPY = {"FLOAT": np.float32, "HALF": np.float16, "INT32": np.int32, "INT64": np.int64}

ORIN = Gpu("Orin", "sm_87")


class Choice(enum.Enum):
    """An enum as pybind11 makes them: has a name and converts to a number."""

    def __int__(self) -> int:
        return self.value


def choices(name: str, *members: str) -> Any:
    return Choice(name, {member: index for index, member in enumerate(members)})


# Memory


class FakeMemory:
    """A GPU's memory in this process. All live blocks of all instances are in `BLOCKS`."""

    BLOCKS: ClassVar[dict[int, Any]] = {}

    def __init__(self, gpu: Gpu = ORIN) -> None:
        self.gpu, self.stream = gpu, 7
        self.used = False
        self.full = False  # whether the next block finds no room
        self.own: list[int] = []

    def use(self) -> None:
        self.used = True

    def free_bytes(self) -> int:
        return 2**30

    def allocate(self, size: int) -> int:
        assert self.used, "no device was made current"
        if self.full:
            self.full = False
            raise SessionError("the CUDA driver's cuMemAlloc_v2 failed: out of memory (2)")
        block = (ctypes.c_ubyte * max(size, 1))()
        address = ctypes.addressof(block)
        self.BLOCKS[address] = block
        self.own.append(address)
        return address

    def free(self, address: int) -> None:
        del self.BLOCKS[address]
        self.own.remove(address)

    def write(self, address: int, array: np.ndarray) -> None:
        within(address, array.nbytes)
        ctypes.memmove(address, array.ctypes.data, array.nbytes)

    def read(self, array: np.ndarray, address: int) -> None:
        within(address, array.nbytes)
        ctypes.memmove(array.ctypes.data, address, array.nbytes)

    def wait(self) -> None:
        pass

    def close(self) -> None:
        self.stream = 0  # which a run refuses


def within(address: int, size: int) -> None:
    """Every access to the device must lie in one live block."""
    for start, block in FakeMemory.BLOCKS.items():
        if start <= address and address + size <= start + len(block):
            return
    raise AssertionError(f"{size} bytes at {address} are not in any block")


# Modules


def make(name: str, version: str) -> ModuleType:
    """`tensorrt` "10.3..." or "11.4...", or `tensorrt_rtx`."""
    module: Any = ModuleType(name)
    module.__version__ = version
    rtx, ten = name == "tensorrt_rtx", version.startswith("10.")

    class ILogger:
        Severity = choices("Severity", "INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE")

        def __init__(self) -> None:
            pass

    class IProgressMonitor:
        def __init__(self) -> None:
            pass

    flags = ["REFIT", "TF32", "STRIP_PLAN", "REFIT_IDENTICAL", "VERSION_COMPATIBLE"]
    module.ILogger, module.IProgressMonitor = ILogger, IProgressMonitor
    module.BuilderFlag = choices("BuilderFlag", *(["FP16", "INT8"] if ten else []), *flags)
    # 11 has strongly typed networks only; rtx keeps the name for what it does anyway.
    named = (
        ["EXPLICIT_BATCH", "STRONGLY_TYPED"] if ten else ["STRONGLY_TYPED"] if rtx else ["OTHER"]
    )
    module.NetworkDefinitionCreationFlag = choices("NetworkDefinitionCreationFlag", *named)
    excluded = ["EXCLUDE_WEIGHTS", "EXCLUDE_LEAN_RUNTIME"]
    module.SerializationFlag = choices("SerializationFlag", *excluded)
    module.MemoryPoolType = choices("MemoryPoolType", "WORKSPACE")
    module.ProfilingVerbosity = choices("ProfilingVerbosity", "LAYER_NAMES_ONLY", "DETAILED")
    module.HardwareCompatibilityLevel = choices("HardwareCompatibilityLevel", "NONE", "AMPERE_PLUS")
    module.LayerInformationFormat = choices("LayerInformationFormat", "ONELINE", "JSON")
    module.TensorIOMode = choices("TensorIOMode", "NONE", "INPUT", "OUTPUT")
    module.TensorLocation = choices("TensorLocation", "DEVICE", "HOST")
    module.DataType = choices("DataType", *NUMPY)
    module.LayerType = choices("LayerType", "NODE")
    module.nptype = lambda dtype: NUMPY[dtype.name]
    if rtx:
        module.ComputeCapability = choices(
            "ComputeCapability", "NONE", "CURRENT", "SM75", "SM86", "SM89", "SM120"
        )
    module.Builder = lambda log: Builder(module, log, typed_by_flag=ten)
    module.OnnxParser = Parser
    module.Refitter, module.OnnxParserRefitter = Refitter, ParserRefitter
    module.Runtime = lambda log: Runtime(module, log)
    return module


def fail(log: Any, message: str) -> None:
    log.log(type(log).Severity.ERROR, message)


# Building


class Tensor:
    def __init__(self, module: Any, value: onnx.ValueInfoProto, by_value: set[str]) -> None:
        kind = value.type.tensor_type
        self.name = value.name
        self.dtype = module.DataType[DTYPES[kind.elem_type]]
        self.shape = tuple(dim.dim_value or -1 for dim in kind.shape.dim)
        self.is_shape_tensor = value.name in by_value


class Layer:
    num_outputs = 1

    def __init__(self, module: Any) -> None:
        self.type, self.dtype = module.LayerType.NODE, module.DataType.FLOAT

    def get_output(self, index: int) -> Layer:
        return self


class Network:
    def __init__(self, module: Any, flags: int) -> None:
        self.module, self.flags = module, flags
        self.model = onnx.ModelProto()
        self.inputs: list[Tensor] = []

    @property
    def num_inputs(self) -> int:
        return len(self.inputs)

    def get_input(self, index: int) -> Tensor:
        return self.inputs[index]

    @property
    def num_layers(self) -> int:
        return len(self.model.graph.node)

    def get_layer(self, index: int) -> Layer:
        return Layer(self.module)


class Parser:
    def __init__(self, network: Network, log: Any) -> None:
        self.network, self.log = network, log
        self.errors: list[str] = []

    def parse_from_file(self, path: str) -> bool:
        model = onnx.load(path)
        odd = {node.op_type for node in model.graph.node if node.domain} | {
            node.op_type for node in model.graph.node if node.op_type == "MatMulInteger"
        }
        self.errors = [f"no importer for {op}" for op in sorted(odd)]
        self.network.model = model
        self.network.inputs = inputs_of(self.network.module, model)
        return not self.errors

    @property
    def num_errors(self) -> int:
        return len(self.errors)

    def get_error(self, index: int) -> Any:
        message = self.errors[index]
        return type("Error", (), {"desc": lambda self: message})()


def inputs_of(module: Any, model: onnx.ModelProto) -> list[Tensor]:
    """The inputs; a graph takes lengths from those that a Slice begins or ends at."""
    by_value = {
        name for node in model.graph.node if node.op_type == "Slice" for name in node.input[1:3]
    }
    return [Tensor(module, value, by_value) for value in model.graph.input]


class Profile:
    def __init__(self) -> None:
        self.spans: dict[str, Any] = {}
        self.values: set[str] = set()

    def set_shape(self, name: str, *span: tuple[int, ...]) -> None:
        assert all(isinstance(shape, tuple) for shape in span)
        self.spans[name] = span

    def set_shape_input(self, name: str, *span: tuple[int, ...]) -> None:
        self.set_shape(name, *span)
        self.values.add(name)


class TimingCache:
    def __init__(self, contents: bytes) -> None:
        self.contents = contents

    def serialize(self) -> bytes:
        return self.contents + b"timed "


class Config:
    def __init__(self, module: Any) -> None:
        self.module = module
        self.flags: set[str] = {"TF32"}
        self.profiles: list[Profile] = []
        self.targets: list[str] = []
        self.workspace = 0
        self.profiling_verbosity = self.hardware_compatibility_level = None
        self.progress_monitor: Any = None

    def set_flag(self, flag: Any) -> None:
        self.flags.add(flag.name)

    def clear_flag(self, flag: Any) -> None:
        self.flags.discard(flag.name)

    def set_memory_pool_limit(self, pool: Any, size: int) -> None:
        assert pool.name == "WORKSPACE"
        self.workspace = size

    def add_optimization_profile(self, profile: Profile) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def create_timing_cache(self, contents: bytes) -> TimingCache:
        return TimingCache(contents)

    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool:
        return not cache.contents.startswith(b"other")

    @property
    def num_compute_capabilities(self) -> int:
        return len(self.targets)

    @num_compute_capabilities.setter
    def num_compute_capabilities(self, count: int) -> None:
        self.targets = [""] * count

    def set_compute_capability(self, target: Any, index: int) -> bool:
        assert isinstance(target, self.module.ComputeCapability)
        self.targets[index] = target.name
        return True


class Builder:
    """`last` is the configuration of the latest build, for tests to look at."""

    last: Config | None = None

    def __init__(self, module: Any, log: Any, typed_by_flag: bool) -> None:
        self.module, self.log, self.typed_by_flag = module, log, typed_by_flag

    def create_network(self, flags: int = 0) -> Network:
        return Network(self.module, flags)

    def create_builder_config(self) -> Config:
        return Config(self.module)

    def create_optimization_profile(self) -> Profile:
        return Profile()

    def build_serialized_network(self, network: Network, config: Config) -> Any:
        Builder.last = config
        if self.typed_by_flag and not network.flags & 1 << 1:
            fail(self.log, "this fake builds strongly typed networks only")
            return None
        for profile in config.profiles:
            for tensor in network.inputs:
                open_ended = -1 in tensor.shape or tensor.is_shape_tensor
                if open_ended and tensor.name not in profile.spans:
                    fail(self.log, f"no span for {tensor.name}")
                    return None
                if (tensor.name in profile.values) != tensor.is_shape_tensor:
                    fail(self.log, f"{tensor.name} is given by the wrong call")
                    return None
        self.tell(config.progress_monitor)
        spans = [profile.spans for profile in config.profiles]
        stripped = {"STRIP_PLAN", "REFIT_IDENTICAL"} <= config.flags
        return serialized(self.module, spans, network.model, stripped)

    def tell(self, monitor: Any) -> None:
        """Two phases, one within the other."""
        monitor.phase_start("building", None, 2)
        monitor.phase_start("timing", "building", 2)
        assert monitor.step_complete("timing", 0)
        monitor.phase_finish("timing")
        assert monitor.step_complete("building", 1)
        monitor.phase_finish("building")


def serialized(
    module: Any, profiles: list[dict[str, Any]], model: onnx.ModelProto, stripped: bool
) -> memoryview:
    """A plan; a stripped one has zeros for weights."""
    header = {"version": module.__version__, "profiles": profiles, "stripped": stripped}
    kept = onnx.ModelProto()
    kept.CopyFrom(model)
    for tensor in weights_of(kept) if stripped else ():
        zeros = np.zeros_like(onnx.numpy_helper.to_array(tensor))
        tensor.CopyFrom(onnx.numpy_helper.from_array(zeros, tensor.name))
    return memoryview(MAGIC + json.dumps(header).encode() + b"\n" + kept.SerializeToString())


def weights_of(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    """Floating-point constants; lengths and indices stay in a stripped plan."""
    kinds = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
    return [tensor for tensor in model.graph.initializer if tensor.data_type in kinds]


# Refitting


class Refitter:
    def __init__(self, engine: Engine, log: Any) -> None:
        self.engine, self.log = engine, log
        self.given: dict[str, onnx.TensorProto] = {}

    def get_missing_weights(self) -> list[str]:
        return [t.name for t in weights_of(self.engine.model) if t.name not in self.given]

    def refit_cuda_engine(self) -> bool:
        if self.get_missing_weights():
            return bool(fail(self.log, "weights are missing"))
        for tensor in weights_of(self.engine.model):
            tensor.CopyFrom(self.given[tensor.name])
        return True


class ParserRefitter:
    def __init__(self, refitter: Refitter, log: Any) -> None:
        self.refitter, self.log = refitter, log

    def refit_from_file(self, path: str) -> bool:
        if not self.refitter.engine.stripped:
            return bool(fail(self.log, "the engine is not refittable"))
        self.refitter.given = {tensor.name: tensor for tensor in weights_of(onnx.load(path))}
        return True


class SerializationConfig:
    def __init__(self, flags: set[str]) -> None:
        self.flags = flags

    def set_flag(self, flag: Any) -> None:
        self.flags.add(flag.name)

    def clear_flag(self, flag: Any) -> None:
        self.flags.discard(flag.name)


# Running


class Runtime:
    def __init__(self, module: Any, log: Any) -> None:
        self.module, self.log = module, log

    def deserialize_cuda_engine(self, contents: bytes) -> Engine | None:
        header, _, model = bytes(contents).partition(b"\n")
        if not header.startswith(MAGIC):
            return fail(self.log, "the plan has no magic tag")
        values = json.loads(header.removeprefix(MAGIC))
        if values["version"] != self.module.__version__:
            return fail(self.log, f"the plan is of version {values['version']}")
        loaded = onnx.load_from_string(model)
        return Engine(self.module, self.log, values["profiles"], loaded, values["stripped"])


class Engine:
    device_memory_size_v2 = 12345

    def __init__(
        self,
        module: Any,
        log: Any,
        profiles: list[dict[str, Any]],
        model: onnx.ModelProto,
        stripped: bool,
    ) -> None:
        self.module, self.log, self.profiles, self.model = module, log, profiles, model
        self.stripped = stripped
        self.tensors = {tensor.name: tensor for tensor in inputs_of(module, model)}
        self.input_names = list(self.tensors)
        outputs = [Tensor(module, value, set()) for value in model.graph.output]
        self.tensors |= {tensor.name: tensor for tensor in outputs}
        self.num_io_tensors, self.num_layers = len(self.tensors), len(model.graph.node)
        self.num_optimization_profiles = len(profiles)

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> Any:
        modes = self.module.TensorIOMode
        return modes.INPUT if name in self.input_names else modes.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return self.tensors[name].dtype

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def get_tensor_location(self, name: str) -> Any:
        places = self.module.TensorLocation
        return places.HOST if self.tensors[name].is_shape_tensor else places.DEVICE

    def create_serialization_config(self) -> SerializationConfig:
        return SerializationConfig({"EXCLUDE_WEIGHTS"} if self.stripped else set())

    def serialize_with_config(self, config: SerializationConfig) -> memoryview:
        stripped = "EXCLUDE_WEIGHTS" in config.flags
        return serialized(self.module, self.profiles, self.model, stripped)

    def create_engine_inspector(self) -> Any:
        layer = {"Name": "one", "Outputs": [{"Format/Datatype": "Half"}]}
        text = json.dumps({"Layers": [layer, {**layer, "Name": "two"}]})
        return type("Inspector", (), {"get_engine_information": lambda self, kind: text})()

    def create_execution_context(self) -> Context:
        return Context(self)


class Context:
    def __init__(self, engine: Engine) -> None:
        import onnxruntime

        self.engine, self.profile = engine, 0
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(engine.model.SerializeToString(), options)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.inferred: Mapping[str, tuple[int, ...]] = {}

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        assert stream
        self.profile, self.shapes, self.inferred = index, {}, {}
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert name in self.engine.input_names
        least, _, most = self.engine.profiles[self.profile].get(name, (shape,) * 3)
        if self.engine.tensors[name].is_shape_tensor:
            least = most = self.engine.tensors[name].shape
        if len(shape) != len(least) or not all(
            a <= n <= b for a, n, b in zip(least, shape, most, strict=True)
        ):
            fail(self.engine.log, f"{name} {shape} is outside {least} to {most}")
            return False
        self.shapes[name], self.inferred = tuple(shape), {}
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert name in self.engine.tensors and isinstance(address, int)
        on_host = self.engine.tensors[name].is_shape_tensor
        assert on_host != (address in FakeMemory.BLOCKS), f"{name} lies in the wrong memory"
        self.addresses[name] = address
        return True

    def infer_shapes(self) -> list[str]:
        missing = [name for name in self.engine.input_names if name not in self.shapes]
        by_value = [n for n in self.engine.input_names if self.engine.tensors[n].is_shape_tensor]
        missing += [name for name in by_value if name not in self.addresses]
        if not missing:  # lengths follow from lengths, and from values that lie on the host
            zeros = {name: self.array(name, known=name in by_value) for name in self.shapes}
            values = self.session.run(None, zeros)
            names = [value.name for value in self.session.get_outputs()]
            self.inferred = {name: value.shape for name, value in zip(names, values, strict=True)}
        return missing

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.inferred.get(name) or self.engine.tensors[name].shape

    def execute_async_v3(self, stream: int) -> bool:
        assert stream
        if not self.inferred or set(self.addresses) != set(self.engine.tensors):
            fail(self.engine.log, "a tensor has no address, or lengths were not inferred")
            return False
        inputs = {name: self.array(name, known=True) for name in self.engine.input_names}
        names = [value.name for value in self.session.get_outputs()]
        try:
            values = self.session.run(names, inputs)
        except Exception as error:
            fail(self.engine.log, str(error))
            return False
        for name, value in zip(names, values, strict=True):
            within(self.addresses[name], value.nbytes)
            ctypes.memmove(self.addresses[name], value.ctypes.data, value.nbytes)
        return True

    def array(self, name: str, known: bool) -> np.ndarray:
        """What lies at a tensor's address; zeros if its values may not be looked at."""
        found = np.zeros(self.shapes[name], NUMPY[self.engine.tensors[name].dtype.name])
        if known:
            if not self.engine.tensors[name].is_shape_tensor:
                within(self.addresses[name], found.nbytes)
            ctypes.memmove(found.ctypes.data, self.addresses[name], found.nbytes)
        return found
