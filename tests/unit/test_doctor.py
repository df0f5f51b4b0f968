"""What `lance-edge doctor` says of machines that are made up here, and of this one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lance_edge import cli
from lance_edge.doctor import gather
from lance_edge.doctor.judge import findings, works
from lance_edge.doctor.machine import BundleState, Clock, Cpu, Jetson, Machine, Memory
from lance_edge.doctor.trials import LoadedLibrary, RuntimeReport
from lance_edge_engines.driver import Driver, Gpu

GB = 1_000_000_000
NO_CUDA = "the installed onnxruntime has no CUDAExecutionProvider"
CPU_ONLY = RuntimeReport(
    "1.31.1", "onnxruntime", None, ("CPUExecutionProvider",), {"cpu": None, "cuda": NO_CUDA}
)
CUDA_13 = RuntimeReport(
    "1.31.1",
    "onnxruntime-gpu",
    "13.0",
    ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"),
    {"cpu": None, "cuda": None},
)
NOT_STARTED = replace(CUDA_13, refusals={"cpu": None, "cuda": "could not start"})

LAPTOP = Machine(
    system="Linux 6.8",
    architecture="x86_64",
    python=(3, 12, 3),
    cpu=Cpu("Laptop CPU", 8, ("avx2", "avx_vnni")),
    memory=Memory(16 * GB, 9 * GB),
    packages={"numpy": "2.4.6", "tokenizers": "0.23.3", "onnxruntime": "1.31.1"},
    runtime=CPU_ONLY,
    tensorrt=None,
    rtx=None,
    jetpack_python=None,
    driver=None,
    driver_release=None,
    nvidia_device=False,
    jetson=None,
    cache="/home/ann/.cache/lance-edge",
    cache_free_bytes=50 * GB,
    bundle=BundleState("/bundle", "a bundle 1.0", None, "ready", 335_000_000),
)
GPU_PACKAGES = {"numpy": "2.4.6", "onnxruntime-gpu": "1.31.1"}
H100 = replace(
    LAPTOP,
    cpu=Cpu("Server CPU", 16, ("avx2", "avx512_vnni")),
    packages=GPU_PACKAGES,
    runtime=CUDA_13,
    driver=Driver("13.0", (Gpu("NVIDIA H100", "9.0", 80 * GB),)),
    driver_release="580.65.06",
    nvidia_device=True,
)
LOCKED = (Clock("cpu", 1728, 1728, 1728), Clock("gpu", 1020, 1020, 1020))
DIST_PACKAGES = "/usr/lib/python3.10/dist-packages"
ORIN = replace(
    LAPTOP,
    architecture="aarch64",
    python=(3, 10, 12),
    cpu=Cpu(None, 6, ("neon", "dotprod")),
    memory=Memory(8 * GB, 5 * GB),
    runtime=replace(CPU_ONLY, version="1.23.2"),
    tensorrt=LoadedLibrary("10.3.0"),
    jetpack_python=DIST_PACKAGES,
    driver=Driver("12.6", (Gpu("Orin", "8.7", 8 * GB),)),
    driver_release="540.4.0",
    jetson=Jetson("NVIDIA Jetson Orin Nano Developer Kit", "36.4.3", "MAXN_SUPER", LOCKED),
)
THOR = replace(
    ORIN,
    python=(3, 12, 3),
    cpu=Cpu(None, 14, ("neon", "dotprod", "i8mm")),
    runtime=CPU_ONLY,
    tensorrt=LoadedLibrary("10.13.3"),
    driver=Driver("13.0", (Gpu("NVIDIA Thor", "11.0", 128 * GB),)),
    jetson=Jetson("NVIDIA Jetson AGX Thor Developer Kit", "38.2.0", "MAXN", LOCKED),
)
WINDOWS = replace(
    LAPTOP,
    system="Windows 11",
    architecture="AMD64",
    cpu=Cpu("Intel64 Family 6", 8, None),
    memory=None,
    nvidia_device=None,
    cache_free_bytes=None,
)

CPU_WORKS = ("works", "runs graphs on the CPU")
FAST = ("works", "int8 has instructions of its own")
FILES = ("works", "agree with its manifest")
WEIGHTS = ("works", "the refiner's weights agree")
HEALTHY = (CPU_WORKS, FAST, FILES, WEIGHTS)

MACHINES: dict[str, tuple[Machine, tuple[tuple[str, str], ...]]] = {
    "laptop without GPU": (LAPTOP, HEALTHY),
    "Windows, of which less is known": (WINDOWS, (CPU_WORKS, FILES, WEIGHTS)),
    "H100 with the gpu wheel": (H100, (*HEALTHY, ("works", "runs graphs on NVIDIA H100 (sm_90)"))),
    "H100 with the cpu wheel": (
        replace(H100, packages=LAPTOP.packages, runtime=CPU_ONLY),
        (*HEALTHY, ("advice", "NVIDIA H100 (sm_90) is not used")),
    ),
    "both wheels, the cpu one last": (
        replace(H100, packages={**LAPTOP.packages, **GPU_PACKAGES}, runtime=CPU_ONLY),
        (
            *HEALTHY,
            ("broken", "overwrote each other; what is left is onnxruntime"),
            ("advice", "is not used"),
        ),
    ),
    "driver too old for the gpu wheel": (
        replace(H100, runtime=NOT_STARTED, driver=replace(H100.driver, cuda="12.4")),
        (*HEALTHY, ("broken", "runs CUDA up to 12.4 and this onnxruntime-gpu is built for 13.0")),
    ),
    "driver too old, cpu wheel": (
        replace(
            H100,
            packages=LAPTOP.packages,
            runtime=CPU_ONLY,
            driver=replace(H100.driver, cuda="12.4"),
        ),
        (*HEALTHY, ("advice", "too old for the newest one")),
    ),
    "gpu wheel without CUDA's libraries": (
        replace(H100, runtime=NOT_STARTED),
        (*HEALTHY, ("broken", "no graph runs on NVIDIA H100 (sm_90): could not start")),
    ),
    "gpu wheel that says what it misses": (
        replace(H100, runtime=replace(NOT_STARTED, missing="libcublasLt.so.13")),
        (*HEALTHY, ("broken", "no graph runs on NVIDIA H100 (sm_90): libcublasLt.so.13 is not")),
    ),
    "GPU and gpu wheel without driver": (
        replace(H100, runtime=NOT_STARTED, driver=None, driver_release=None),
        (*HEALTHY, ("broken", "its driver is not installed")),
    ),
    "GPU and cpu wheel without driver": (
        replace(LAPTOP, nvidia_device=True),
        (*HEALTHY, ("advice", "its driver is not installed")),
    ),
    "gpu wheel without GPU": (
        replace(LAPTOP, packages=GPU_PACKAGES, runtime=NOT_STARTED),
        (*HEALTHY, ("advice", "no NVIDIA GPU was found")),
    ),
    "driver that does not start": (
        replace(H100, runtime=NOT_STARTED, driver=Driver("13.0", (), "of different releases")),
        (*HEALTHY, ("broken", "does not start: of different releases")),
    ),
    "TensorRT 11 beside ONNX Runtime's provider for 10": (
        replace(H100, tensorrt=LoadedLibrary("11.4.0")),
        (
            *HEALTHY,
            ("works", "runs graphs on NVIDIA H100"),
            ("works", "tensorrt 11.4.0 loads"),
            ("advice", "needs TensorRT 10 and does not start with 11.4.0"),
        ),
    ),
    "TensorRT without its libraries": (
        replace(H100, tensorrt=LoadedLibrary(fault="libnvinfer.so.11: cannot open")),
        (
            *HEALTHY,
            ("works", "runs graphs on NVIDIA H100"),
            ("broken", "tensorrt cannot be imported: libnvinfer.so.11"),
        ),
    ),
    "TensorRT-RTX without a GPU": (
        replace(LAPTOP, rtx=LoadedLibrary("1.7.1")),
        (*HEALTHY, ("advice", "tensorrt_rtx 1.7.1 loads, and there is no GPU")),
    ),
    "Orin Nano, JetPack 6.2": (
        ORIN,
        (
            *HEALTHY,
            ("advice", "Python 3.10 ends at ONNX Runtime 1.23"),
            ("advice", "Orin (sm_87) is not used"),
            ("works", "tensorrt 10.3.0 loads"),
        ),
    ),
    "Orin Nano in a saving mode, TensorRT out of sight": (
        replace(
            ORIN,
            tensorrt=None,
            jetson=replace(ORIN.jetson, power_mode="15W", clocks=(Clock("gpu", 306, 306, 1020),)),
        ),
        (
            *HEALTHY,
            ("advice", "Python 3.10 ends"),
            ("advice", "Orin (sm_87) is not used"),
            ("advice", f"lies in {DIST_PACKAGES}, which this Python does not see"),
            ("advice", "the power mode is 15W"),
            ("advice", "the clocks of gpu move"),
        ),
    ),
    "Orin, JetPack 5": (
        replace(ORIN, tensorrt=LoadedLibrary("8.5.2"), jetson=replace(ORIN.jetson, l4t="35.4.1")),
        (
            *HEALTHY,
            ("advice", "Python 3.10 ends"),
            ("advice", "Orin (sm_87) is not used"),
            ("advice", "TensorRT 8.5.2 is older than 10.3"),
            ("advice", "JetPack 5 has TensorRT 8.5"),
        ),
    ),
    "Thor, JetPack 7": (
        THOR,
        (
            *HEALTHY,
            ("advice", "NVIDIA Thor (sm_110) is not used"),
            ("works", "tensorrt 10.13.3 loads"),
        ),
    ),
    "Thor with the gpu wheel, JetPack's TensorRT missing": (
        replace(
            THOR,
            packages=GPU_PACKAGES,
            runtime=replace(NOT_STARTED, offered=("CUDAExecutionProvider",)),
            tensorrt=None,
            jetpack_python=None,
        ),
        (
            *HEALTHY,
            ("broken", "for aarch64 has no kernels for NVIDIA Thor (sm_110)"),
            ("advice", "JetPack's TensorRT is not installed"),
        ),
    ),
    "old CPU, little memory and disk, nothing pulled": (
        replace(
            LAPTOP,
            cpu=Cpu("Old CPU", 2, ()),
            memory=Memory(GB, GB // 4),
            cache_free_bytes=GB // 10,
            bundle=replace(LAPTOP.bundle, refiner="missing"),
        ),
        (
            CPU_WORKS,
            ("advice", "no VNNI and no AVX2"),
            ("advice", "250 MB of memory are free"),
            ("advice", "has 100 MB free and `lance-edge pull` needs 335"),
            FILES,
            ("advice", "the refiner's weights are not here"),
        ),
    ),
    "ARM without dotprod": (
        replace(LAPTOP, architecture="aarch64", cpu=Cpu(None, 4, ("neon",))),
        (CPU_WORKS, ("advice", "has no dotprod"), FILES, WEIGHTS),
    ),
    "no ONNX Runtime": (
        replace(LAPTOP, packages={}, runtime=RuntimeReport(fault="onnxruntime is not installed")),
        (("broken", "onnxruntime is not installed"), FAST, FILES, WEIGHTS),
    ),
    "an ONNX Runtime that crashes": (
        replace(H100, runtime=RuntimeReport(fault="importing onnxruntime ends the process")),
        (("broken", "ends the process"), FAST, FILES, WEIGHTS),
    ),
    "ONNX Runtime older than 1.23": (
        replace(LAPTOP, runtime=replace(CPU_ONLY, version="1.20.1")),
        (*HEALTHY, ("broken", "1.20.1 is older than 1.23")),
    ),
    "ONNX Runtime that computes nothing": (
        replace(LAPTOP, runtime=replace(CPU_ONLY, refusals={"cpu": "3 * 3 is 0.0 there"})),
        (("broken", "the CPU runs no graph: 3 * 3 is 0.0"), FAST, FILES, WEIGHTS),
    ),
    "damaged bundle": (
        replace(LAPTOP, bundle=BundleState("/bundle", fault="screener.onnx was cut short")),
        (CPU_WORKS, FAST, ("broken", "cannot be used: screener.onnx was cut short")),
    ),
    "damaged refiner": (
        replace(LAPTOP, bundle=replace(LAPTOP.bundle, refiner="damaged")),
        (CPU_WORKS, FAST, FILES, ("broken", "weights are not what the bundle names")),
    ),
}


@pytest.mark.parametrize("name", MACHINES)
def test_each_machine_has_its_findings(name: str) -> None:
    machine, expected = MACHINES[name]
    found = findings(machine)
    for level, words in expected:
        assert [f.level for f in found if words in f.text] == [level], (words, found)
    assert len(found) == len(expected), found
    assert works(found) == all(level != "broken" for level, _ in expected)


def remedy(name: str, words: str) -> str:
    """The remedy of the finding that has these words."""
    found = [finding for finding in findings(MACHINES[name][0]) if words in finding.text]
    assert len(found) == 1
    return found[0].remedy or ""


@pytest.mark.parametrize(
    ("name", "words", "command"),
    [
        ("H100 with the cpu wheel", "not used", 'pip install "onnxruntime-gpu[cuda,cudnn]"'),
        ("both wheels, the cpu one last", "overwrote", "pip uninstall -y onnxruntime onnxruntime-gpu"),
        ("driver too old for the gpu wheel", "12.4", "580 or newer"),
        ("driver too old for the gpu wheel", "12.4", "==1.23.2"),
        ("gpu wheel without CUDA's libraries", "no graph runs", "[cuda,cudnn]"),
        ("gpu wheel without GPU", "no NVIDIA GPU", "pip uninstall -y onnxruntime-gpu"),
        ("Orin Nano, JetPack 6.2", "not used", "lance-edge plan --runtime tensorrt"),
        ("Thor, JetPack 7", "not used", "lance-edge plan --runtime tensorrt"),
        ("old CPU, little memory and disk, nothing pulled", "are not here", "lance-edge pull"),
        ("an ONNX Runtime that crashes", "ends the process", "onnxruntime-gpu"),
        ("no ONNX Runtime", "not installed", "pip install onnxruntime"),
    ],
)  # fmt: skip
def test_remedies_name_what_mends_it(name: str, words: str, command: str) -> None:
    assert command in remedy(name, words)


def test_jetsons_are_not_sent_to_the_wheel_of_the_package_index() -> None:
    """It has no kernels for their GPUs, and those for CUDA 12 do not exist for aarch64."""
    for machine in (ORIN, THOR, MACHINES["Thor with the gpu wheel, JetPack's TensorRT missing"][0]):
        remedies = [finding.remedy or "" for finding in findings(machine)]
        assert not any('install "onnxruntime-gpu' in remedy for remedy in remedies)


def test_everything_broken_says_what_to_do() -> None:
    """But for a bundle: its own message does."""
    for machine, _ in MACHINES.values():
        for finding in findings(machine):
            if finding.level == "broken" and "bundle cannot be used" not in finding.text:
                assert finding.remedy, finding


# The command


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, ["doctor", *arguments])


def test_this_machine_is_examined_for_real(tiny_bundle: Path) -> None:
    done = invoke("--bundle", str(tiny_bundle), "--format", "json")
    report = json.loads(done.stdout)
    assert done.exit_code == (0 if report["works"] else 3)
    import onnxruntime

    assert report["machine"]["runtime"]["version"] == onnxruntime.__version__
    assert report["machine"]["runtime"]["refusals"]["cpu"] is None
    assert report["machine"]["bundle"] == {
        "path": str(tiny_bundle),
        "name": "tiny 1",
        "fault": None,
        "refiner": "none",
        "refiner_bytes": 0,
    }
    assert "runs graphs on the CPU" in "".join(f["text"] for f in report["findings"])


def test_the_table_shows_facts_findings_and_remedies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather, "gather", lambda bundle, public_key: ORIN)
    done = invoke()
    lines = done.stdout.splitlines()
    assert done.exit_code == 0
    assert (
        "jetson   NVIDIA Jetson Orin Nano Developer Kit, Jetson Linux 36.4.3, JetPack 6, power mode "
        "MAXN_SUPER, cpu 1728 MHz (1728 to 1728), gpu 1020 MHz (1020 to 1020)" in lines
    )
    assert "driver   NVIDIA 540.4.0, CUDA up to 12.6; Orin, sm_87, 8.0 GB" in lines
    assert "runs on  cpu" in lines
    index = next(i for i, line in enumerate(lines) if "Orin (sm_87) is not used" in line)
    assert lines[index].startswith("advice   ")
    assert lines[index + 1] == "         -> lance-edge plan --runtime tensorrt --out plans"


def test_what_is_broken_ends_in_exit_code_3(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather, "gather", lambda bundle, public_key: MACHINES["damaged bundle"][0])
    done = invoke()
    assert done.exit_code == 3
    assert "broken   the bundle cannot be used: screener.onnx was cut short" in done.stdout
