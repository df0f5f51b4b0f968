"""Builds one plan: `python -m lance_edge_export.build_plan JOB`, a process of its own.

So the builder's memory is gone when it is done, and a crash in it is an error message. Progress goes
to standard output as lines of JSON; the job's answer is a file.
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from lance_edge_engines.cuda import Device, NoSuchGpu
from lance_edge_engines.plan_record import Profile, RuntimeName
from lance_edge_engines.session import DeviceUnavailable, SessionError
from lance_edge_engines.trt import collecting_logger, import_runtime

MIB = 2**20
WORKSPACE = 1024 * MIB  # what the builder may try kernels with, if there is room


@dataclass(frozen=True)
class Job:
    """What to build.

    graph       ONNX file
    out         the plan's file
    targets     compute capabilities, as in sm_86; none for all (rtx)
    gpu         number of the GPU to build on; rtx needs none
    workspace   bytes; None for half of the GPU's free memory, 1 GiB at most
    timing      file in which measured times of kernels are kept between builds
    stripped    whether weights are left out
    """

    runtime: RuntimeName
    graph: str
    out: str
    profiles: list[Profile]
    targets: list[str]
    gpu: int
    workspace: int | None
    timing: str | None
    version_compatible: bool
    hardware_compatible: bool
    stripped: bool


@dataclass(frozen=True)
class Built:
    """What came of it; fields as in PlanEntry, or `error` alone."""

    error: str | None = None
    version: str = ""
    gpu: str | None = None
    sm: str | None = None
    targets: list[str] = field(default_factory=list)
    network: dict[str, Any] | None = None
    engine: dict[str, Any] | None = None
    not_read_back: str | None = None
    build: dict[str, Any] = field(default_factory=dict)


def main(path: Path) -> int:
    """Do a job and answer in the file beside it."""
    job = Job(**json.loads(path.read_bytes()))
    try:
        answer = build(job, _print_progress)
    except (SessionError, OSError) as error:
        answer = Built(error=str(error))
    answer_path(path).write_text(json.dumps(asdict(answer)), encoding="utf-8")
    return 0 if answer.error is None else 1


def answer_path(job: Path) -> Path:
    """Where the answer to a job lies."""
    return job.with_suffix(".answer.json")


def build(job: Job, progress: Callable[[float], None]) -> Built:
    """Parse, build, write, read back. Raises SessionError if the runtime refuses."""
    trt: Any = import_runtime(job.runtime)
    device, unread = _device(job, trt)
    if job.stripped and device is None:
        raise SessionError(
            f"{job.runtime} strips plans only on a machine with a GPU; run this on one, or leave "
            "--stripped out"
        )
    log = collecting_logger(trt)
    started = time.perf_counter()
    builder = trt.Builder(log)
    network = builder.create_network(strongly_typed(trt))
    parse(trt, network, log, Path(job.graph))
    config = builder.create_builder_config()
    configure(trt, builder, network, config, job, device)
    if hasattr(trt, "IProgressMonitor"):
        config.progress_monitor = _monitor(trt, progress)
    timing = load_timing(config, job)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise SessionError(f"{job.runtime} cannot build the plan: {complaint(log)}")
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time()
    Path(job.out).write_bytes(plan)
    lost = None if timing is None else keep_timing(timing, job)
    engine = read_back(trt, log, bytes(plan)) if unread is None else None
    return Built(
        version=trt.__version__,
        gpu=None if device is None else device.gpu.name,
        sm=None if device is None else device.gpu.sm,
        targets=runs_on(job, trt, device),
        network=describe_network(network),
        engine=engine,
        not_read_back=unread,
        build={
            "seconds": round(seconds, 2),
            "cpu_seconds": round(cpu_seconds, 2),
            "peak_mib": peak_mib(),
            **({} if lost is None else {"timing_lost": lost}),
        },
    )


def strongly_typed(trt: Any) -> int:
    """The network's creation flags: types come from the graph. TensorRT 11 knows no other networks."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def parse(trt: Any, network: Any, log: Any, path: Path) -> None:
    """Fill the network from an ONNX file. Raises SessionError with what the parser says."""
    parser = trt.OnnxParser(network, log)
    if parser.parse_from_file(str(path)):
        return
    errors = [parser.get_error(index).desc() for index in range(parser.num_errors)]
    raise SessionError(f"the parser refuses {path.name}: {'; '.join(errors[:3])}")


def configure(
    trt: Any, builder: Any, network: Any, config: Any, job: Job, device: Device | None
) -> None:
    """What may be built and how. Raises SessionError if the runtime refuses a setting."""
    # TF32 keeps 10 bits of a factor's 23; fp32 shall be fp32.
    config.clear_flag(trt.BuilderFlag.TF32)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # so that layers can be counted
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace(job, device))
    if job.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if job.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if job.stripped:  # TensorRT keeps the weights that it chose kernels by; the same ones come back
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
        config.set_flag(trt.BuilderFlag.REFIT_IDENTICAL)
    if job.targets and job.runtime == "rtx":
        config.num_compute_capabilities = len(job.targets)
        for index, target in enumerate(job.targets):
            config.set_compute_capability(known_targets(trt)[target], index)
    tensors = {network.get_input(i).name: network.get_input(i) for i in range(network.num_inputs)}
    for wanted in job.profiles:
        profile = builder.create_optimization_profile()
        for name, span in wanted.items():
            by_value = tensors[name].is_shape_tensor
            limits = [tuple(lengths) for lengths in span]
            (profile.set_shape_input if by_value else profile.set_shape)(name, *limits)
        if config.add_optimization_profile(profile) < 0:
            raise SessionError(f"{job.runtime} refuses a profile of {wanted}")


def workspace(job: Job, device: Device | None) -> int:
    """Bytes for trying kernels. On a Jetson the GPU's memory is the machine's."""
    if job.workspace is not None:
        return job.workspace
    return WORKSPACE if device is None else min(WORKSPACE, device.free_bytes() // 2)


def known_targets(trt: Any) -> dict[str, Any]:
    """Compute capabilities that the runtime can build for: sm_86 -> its enum."""
    names = [name for name in dir(trt.ComputeCapability) if re.fullmatch(r"SM\d+", name)]
    names.sort(key=lambda name: int(name[2:]))
    return {f"sm_{name[2:]}": getattr(trt.ComputeCapability, name) for name in names}


def runs_on(job: Job, trt: Any, device: Device | None) -> list[str]:
    """Compute capabilities that the plan is for."""
    if job.runtime == "tensorrt":
        return [] if device is None else [device.gpu.sm]
    return job.targets or list(known_targets(trt))


def load_timing(config: Any, job: Job) -> Any:
    """The timing cache in use; None for rtx, which times nothing before a plan runs."""
    if job.runtime == "rtx" or job.timing is None:
        return None
    path = Path(job.timing)
    timing = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if timing is None or not config.set_timing_cache(timing, False):
        raise SessionError(f"{path} is a timing cache of another GPU or version; delete it")
    return timing


def keep_timing(timing: Any, job: Job) -> str | None:
    """Write measured times for the next build; why they cannot be written, which costs no plan."""
    assert job.timing is not None
    try:
        Path(job.timing).write_bytes(timing.serialize())
    except OSError as error:
        return str(error)
    return None


def read_back(trt: Any, log: Any, contents: bytes) -> dict[str, Any]:
    """What the runtime says of the plan. Raises SessionError if it cannot load it."""
    runtime = trt.Runtime(log)
    engine = runtime.deserialize_cuda_engine(contents)
    if engine is None:
        raise SessionError(f"the runtime cannot load the plan it built: {complaint(log)}")
    inspector = engine.create_engine_inspector()
    text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    layers = json.loads(text).get("Layers", [])
    formats = [
        output.get("Format/Datatype", "unknown")
        for layer in layers
        if isinstance(layer, dict)
        for output in layer.get("Outputs", [])
    ]
    tensors = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    return {
        "layers": engine.num_layers,
        "formats": dict(Counter(formats)),
        "profiles": engine.num_optimization_profiles,
        "device_bytes": int(engine.device_memory_size_v2),
        "tensors": {
            name: {
                "type": _name(engine.get_tensor_dtype(name)),
                "shape": [int(n) for n in engine.get_tensor_shape(name)],
                "host": engine.get_tensor_location(name) == trt.TensorLocation.HOST,
            }
            for name in tensors
        },
    }


def describe_network(network: Any) -> dict[str, Any]:
    """Layers of the parsed network by kind, and by the type of what they give."""
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    types = [_name(layer.get_output(0).dtype) for layer in layers if layer.num_outputs]
    return {
        "layers": len(layers),
        "kinds": dict(Counter(_name(layer.type) for layer in layers).most_common()),
        "types": dict(Counter(types).most_common()),
    }


def peak_mib() -> float | None:
    """This process's largest resident size; None where the system does not tell.

    Linux's getrusage counts what the parent had too, so its own record is asked first.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return round(int(status.split("VmHWM:")[1].split()[0]) / 1024, 1)
    except (OSError, IndexError, ValueError):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (MIB if sys.platform == "darwin" else 1024), 1)


def complaint(log: Any) -> str:
    """The last things the runtime complained of."""
    return "; ".join(log.messages[-3:]) or "it does not say why"


def _device(job: Job, trt: Any) -> tuple[Device | None, str | None]:
    """The GPU to build on, if there is one, and why the plan cannot be read back here if it cannot."""
    try:
        device = Device(job.gpu)
    except DeviceUnavailable as error:
        if job.runtime == "tensorrt" or isinstance(error, NoSuchGpu):
            raise
        return None, str(error)
    if device.gpu.sm not in runs_on(job, trt, device):
        return (
            device,
            f"the plan is not for this machine's GPU, {device.gpu.name} ({device.gpu.sm})",
        )
    return device, None


def _monitor(trt: ModuleType, progress: Callable[[float], None]) -> Any:
    """Tells the share of the work that is done, from phases within phases."""
    base: Any = trt.IProgressMonitor

    class Monitor(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)
            self.phases: dict[str, list[int]] = {}  # name -> steps done, steps

        def phase_start(self, phase_name: str, parent_phase: str, num_steps: int) -> None:
            self.phases[phase_name] = [0, max(num_steps, 1)]

        def step_complete(self, phase_name: str, step: int) -> bool:
            self.phases.get(phase_name, [0, 1])[0] = step + 1
            progress(share_done([tuple(phase) for phase in self.phases.values()]))
            return True  # go on

        def phase_finish(self, phase_name: str) -> None:
            self.phases.pop(phase_name, None)

    return Monitor()


def share_done(phases: list[Any]) -> float:
    """The share of the outermost phase, given (steps done, steps) of each, outermost first."""
    share = 0.0
    for done, steps in reversed(phases):
        share = min((done + share) / steps, 1.0)
    return share


def _print_progress(share: float) -> None:
    sys.stdout.write(json.dumps({"share": round(share, 3)}) + "\n")
    sys.stdout.flush()


def _name(value: Any) -> str:
    return str(value).rpartition(".")[2]


def _die_with_parent() -> None:
    """The parent holds the other end of standard input; when it is gone, nobody waits for the plan."""

    def watch() -> None:
        while os.read(0, 1):  # not sys.stdin, whose lock the interpreter wants when it ends
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    _die_with_parent()
    sys.exit(main(Path(sys.argv[1])))
