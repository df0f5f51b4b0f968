"""Judges GPUs, their drivers, TensorRT and Jetson boards: the part of `doctor` that knows NVIDIA's versions."""

from __future__ import annotations

from collections.abc import Iterator

from lance_edge.doctor.finding import CPU_WHEEL, GPU_WHEEL, Finding, numbers
from lance_edge.doctor.machine import Jetson, Machine
from lance_edge_engines.driver import Driver, Gpu

OLDEST_TENSORRT = (10, 3)
ARM = ("aarch64", "arm64")
# The CUDA provider of Microsoft's aarch64 wheel has kernels for these alone (ONNX Runtime #31992):
# none for Orin (8.7) and Thor (11.0).
AARCH64_KERNELS = ("8.9", "9.0", "12.0", "12.1")
# CUDA's major version -> the oldest driver that runs it.
OLDEST_DRIVER = {"12": "525", "13": "580"}
LAST_CUDA_12 = "1.23.2"  # of onnxruntime-gpu, of those that lance-edge runs on
# Provider of the x86 wheels, linked to libnvinfer.so.10 (ONNX Runtime #32278).
PROVIDER, PROVIDER_TENSORRT = "TensorrtExecutionProvider", 10

PLAN = "lance-edge plan --runtime tensorrt --out plans"


def gpu_findings(machine: Machine) -> Iterator[Finding]:
    """Whether ONNX Runtime uses the GPU, and what keeps it from that."""
    driver, wheel = machine.driver, "onnxruntime-gpu" in machine.packages
    install = "flash JetPack again" if machine.jetson else "install NVIDIA's driver, and restart"
    if driver is not None and driver.fault is not None:
        yield Finding(
            "broken", f"NVIDIA's driver does not start: {driver.fault}", f"restart, or {install}"
        )
    elif driver is None and machine.nvidia_device:
        yield Finding(
            "broken" if wheel else "advice",
            "an NVIDIA GPU is on the bus and its driver is not installed",
            install,
        )
    elif driver is None or not driver.gpus:
        if wheel:
            yield Finding(
                "advice",
                "onnxruntime-gpu is installed and no NVIDIA GPU was found: everything runs on the CPU",
                f"pip uninstall -y onnxruntime-gpu && {CPU_WHEEL}",
            )
    elif "cuda" in machine.runtime.refusals and machine.runtime.refusals["cuda"] is None:
        yield Finding(
            "works",
            f"ONNX Runtime runs graphs on {_named(driver.gpus[0])}; int8 bundles, as the default one is, "
            "stay on the CPU, where no plans of them are given",
        )
    elif "CUDAExecutionProvider" in machine.runtime.offered:
        yield _cuda_refused(machine, driver)
    elif machine.runtime.fault is None:
        yield _unused(machine, driver)


def _cuda_refused(machine: Machine, driver: Driver) -> Finding:
    """The wheel has CUDA, there is a GPU, and no graph runs on it: which of the reasons is it?"""
    gpu, built = driver.gpus[0], machine.runtime.cuda
    if not _has_stock_kernels(machine, gpu):
        return Finding(
            "broken",
            f"onnxruntime-gpu for aarch64 has no kernels for {_named(gpu)}",
            f"pip uninstall -y onnxruntime-gpu && {CPU_WHEEL}, then {PLAN}",
        )
    if built and driver.cuda and numbers(driver.cuda)[0] < numbers(built)[0]:
        return Finding(
            "broken",
            f"{_release(machine)} runs CUDA up to {driver.cuda} and this onnxruntime-gpu is built "
            f"for {built}",
            _newer_driver(machine, built) + _older_wheel(machine, driver),
        )
    missing = machine.runtime.missing
    cause = f"{missing} is not found" if missing else machine.runtime.refusals.get("cuda")
    return Finding(
        "broken",
        f"no graph runs on {_named(gpu)}: {cause}",
        GPU_WHEEL + ", which brings CUDA's libraries, or name their folder in LD_LIBRARY_PATH",
    )


def _unused(machine: Machine, driver: Driver) -> Finding:
    """There is a GPU, and an ONNX Runtime that knows only the CPU."""
    gpu = driver.gpus[0]
    text = f"{_named(gpu)} is not used by the installed ONNX Runtime"
    if not _has_stock_kernels(machine, gpu):
        return Finding("advice", text + ", nor has the wheel for aarch64 kernels for it", PLAN)
    newest = numbers(driver.cuda)[0]
    swap = "pip uninstall -y onnxruntime && "
    if newest >= 13 or driver.cuda is None:
        return Finding("advice", text, f"{swap}{GPU_WHEEL}, or {PLAN}")
    return Finding(
        "advice",
        f"{text}, and {_release(machine)} is too old for the newest one",
        _newer_driver(machine, "13") + f", then {swap}{GPU_WHEEL}" + _older_wheel(machine, driver),
    )


def tensorrt_findings(machine: Machine) -> Iterator[Finding]:
    """Whether TensorRT can be imported and is one that plans can use."""
    gpus = machine.driver.gpus if machine.driver else ()
    for name, library in (("tensorrt", machine.tensorrt), ("tensorrt_rtx", machine.rtx)):
        if library is None:
            continue
        if library.fault is not None:
            yield Finding(
                "broken", f"{name} cannot be imported: {library.fault}", _mend(machine, name)
            )
        elif name == "tensorrt" and numbers(library.version) < OLDEST_TENSORRT:
            yield Finding(
                "advice",
                f"TensorRT {library.version} is older than 10.3, which plans need",
                "flash JetPack 6 or newer" if machine.jetson else 'pip install "tensorrt>=10.3"',
            )
        elif gpus:
            yield Finding("works", f"{name} {library.version} loads; `lance-edge plan` uses it")
        else:
            yield Finding(
                "advice", f"{name} {library.version} loads, and there is no GPU to run plans on"
            )
    if _linked_otherwise(machine):
        assert machine.tensorrt is not None
        yield Finding(
            "advice",
            f"ONNX Runtime's own TensorRT provider needs TensorRT 10 and does not start with "
            f"{machine.tensorrt.version}; lance-edge does not use it",
            PLAN,
        )


def _linked_otherwise(machine: Machine) -> bool:
    loaded = machine.tensorrt
    if loaded is None or loaded.version is None or PROVIDER not in machine.runtime.offered:
        return False
    return numbers(loaded.version)[0] != PROVIDER_TENSORRT


def _mend(machine: Machine, name: str) -> str:
    if name == "tensorrt_rtx":
        return "pip install --force-reinstall tensorrt-rtx"
    if machine.jetson is not None:
        return f"pip uninstall -y tensorrt, then use JetPack's: {_see_jetpack()}"
    return (
        "install TensorRT's libraries from NVIDIA's package index (PyPI has only their stub), "
        "or `pip install tensorrt-rtx`"
    )


def jetson_findings(machine: Machine) -> Iterator[Finding]:
    """What a Jetson board lacks or holds back."""
    board = machine.jetson
    if board is None:
        return
    if board.jetpack == 5:
        yield Finding(
            "advice", "JetPack 5 has TensorRT 8.5: only the CPU is used", "flash JetPack 6 or newer"
        )
    elif machine.tensorrt is None and machine.jetpack_python is not None:
        yield Finding(
            "advice",
            f"JetPack's TensorRT lies in {machine.jetpack_python}, which this Python does not see",
            _see_jetpack(),
        )
    elif machine.tensorrt is None:
        yield Finding(
            "advice", "JetPack's TensorRT is not installed", "sudo apt install nvidia-jetpack"
        )
    yield from _power(board)


def _power(board: Jetson) -> Iterator[Finding]:
    mode = board.power_mode
    if mode is not None and not mode.upper().startswith("MAXN"):
        yield Finding(
            "advice",
            f"the power mode is {mode}, which limits clocks and cores",
            "sudo nvpmodel -p --verbose lists the modes, sudo nvpmodel -m NUMBER takes one",
        )
    loose = sorted({clock.name for clock in board.clocks if clock.least_mhz < clock.most_mhz})
    if loose:
        yield Finding(
            "advice",
            f"the clocks of {' and '.join(loose)} move with the load, and so do times measured here",
            "sudo jetson_clocks, before measuring",
        )


def _see_jetpack() -> str:
    return "/usr/bin/python3 -m venv --system-site-packages ENVIRONMENT"


def stock_wheel_serves(machine: Machine) -> bool:
    """Whether the GPU wheel of the package index serves a GPU of this machine."""
    driver = machine.driver
    return driver is not None and any(_has_stock_kernels(machine, gpu) for gpu in driver.gpus)


def _has_stock_kernels(machine: Machine, gpu: Gpu) -> bool:
    return machine.architecture not in ARM or gpu.capability in AARCH64_KERNELS


def _named(gpu: Gpu) -> str:
    return f"{gpu.name} ({gpu.sm})"


def _release(machine: Machine) -> str:
    return f"NVIDIA's driver {machine.driver_release or ''}".rstrip()


def _newer_driver(machine: Machine, cuda: str) -> str:
    if machine.jetson is not None:
        return "flash a newer JetPack"
    return (
        f"update NVIDIA's driver to {OLDEST_DRIVER.get(cuda.split('.')[0], 'a newer one')} or newer"
    )


def _older_wheel(machine: Machine, driver: Driver) -> str:
    """What serves a driver that runs CUDA 12 and not 13; for aarch64 there is none."""
    if numbers(driver.cuda)[0] != 12 or machine.architecture in ARM:
        return ""
    return f', or pip install "onnxruntime-gpu[cuda,cudnn]=={LAST_CUDA_12}", which has CUDA 12'
